"""What a hostile client may try: none of it gets in, breaks anything, or costs memory."""

import gzip
import re
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.api.conftest import connections
from tests.server import PATIENCE_S, Server, Start, until

from pushforward.api.answers import Problem

GOOD = b'{"x": [[0, 1]]}'
HEAD = b"POST /v1/models/moons/log_density HTTP/1.1\r\nhost: x\r\n"
PLENTY = 4e6  # bytes of memory: far less than any of this would cost if it were kept


@pytest.fixture(scope="module")
def target(start: Start, checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Server:
    """A server of one small model that is soon tired of waiting, and takes few connections."""
    folder = tmp_path_factory.mktemp("moons")
    shutil.copytree(checkout / "model_store" / "moons", folder / "moons")
    server = start(at=folder, header_timeout_s=1, max_connections=40, max_body_bytes=1 << 20)
    with server.client() as client:
        for _ in range(20):
            assert post(client).status_code == 200
    return server


@pytest.fixture(autouse=True)
def unharmed(target: Server) -> Iterator[None]:
    """Afterwards no connection is left, memory is as before, and the server answers."""
    before = target.memory()
    yield
    with target.client() as client:
        assert post(client).status_code == 200
    assert until(lambda: connections(target) == 0)
    assert target.memory() - before < PLENTY
    assert not any("traceback" in line for line in target.log)


def post(client: httpx.Client, **headers: str) -> httpx.Response:
    kind = {"content-type": "application/json"}
    return client.post("/v1/models/moons/log_density", content=GOOD, headers=kind | headers)


def connect(server: Server) -> socket.socket:
    host, port = server.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=PATIENCE_S)


def answer(connection: socket.socket) -> bytes:
    """Everything until the server closes."""
    received = b""
    try:
        while piece := connection.recv(1 << 16):
            received += piece
    except ConnectionResetError:  # it closed with bytes of ours unread
        pass
    return received


def exchange(server: Server, *parts: bytes) -> bytes:
    with connect(server) as connection:
        try:
            for part in parts:
                connection.sendall(part)
        except (BrokenPipeError, ConnectionResetError):  # it had had enough
            pass
        return answer(connection)


def told(received: bytes) -> Problem:
    head, _, body = received.partition(b"\r\n\r\n")
    assert b"content-type: application/problem+json" in head
    assert b"x-content-type-options: nosniff" in head
    problem = Problem.model_validate_json(body)
    assert head.startswith(b"HTTP/1.1 %d " % problem.status)
    return problem


@pytest.mark.parametrize(
    ("parts", "status"),
    [
        ([HEAD, b"x: %b\r\n" % (b"a" * 100_000)], 431),  # without an end
        ([HEAD, b"x: %b\r\n\r\n" % (b"a" * 40_000)], 431),
        ([HEAD, *([b"a" * 60_000] * 200)], 431),  # a name, for ever
        ([HEAD, b"".join(b"x%d: 1\r\n" % n for n in range(101)), b"\r\n"], 431),
        ([HEAD, *([b"x: 1\r\n" * 1000] * 1000)], 431),
        ([b"GET /" + b"a" * 40_000 + b" HTTP/1.1\r\n\r\n"], 431),
        ([b"GET /", *([b"a" * 60_000] * 200)], 431),
        ([b"\r\n" * 40_000, b"x"], 431),
        ([HEAD + b"transfer-encoding: chunked\r\n\r\n1;", *([b"a" * 60_000] * 200)], 431),
        ([HEAD + b"transfer-encoding: chunked\r\n\r\n1\r\n{\r\n0\r\nx: ", *([b"a" * 60_000] * 200)], None),
        ([HEAD + b"content-length: 5\r\ncontent-length: 6\r\n\r\n"], 400),
        ([HEAD + b"content-length: 5\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n"], 400),
        ([HEAD + b"content-length: -1\r\n\r\n"], 400),
        ([HEAD + b"content-length: 99999999999999999999999\r\n\r\n"], 400),
        ([HEAD + b"transfer-encoding: chunked\r\n\r\nfffffffffffffffff\r\n"], 400),
        ([HEAD + b"transfer-encoding: chunked\r\n\r\nxyz\r\n"], 400),
        ([HEAD + b" folded\r\n\r\n"], 400),
        ([HEAD + b"bad name: 1\r\n\r\n"], 400),
        ([HEAD + b"x: a\0b\r\n\r\n"], 400),
        ([b"GET /\xff HTTP/1.1\r\n\r\n"], 400),
        ([b"GET / HTTP/9.9\r\n\r\n"], 400),
        ([b"CONNECT other:443 HTTP/1.1\r\n\r\n"], 400),
        ([b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"], 400),
        ([b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"], 400),  # TLS
        ([b"\0" * 1000], 400),
        ([HEAD + b"content-length: 1048577\r\n\r\n"], 413),
        ([HEAD + b"transfer-encoding: chunked\r\n\r\n", *[b"ffff\r\n%b\r\n" % bytes(65535)] * 40], 413),
        ([HEAD + b"content-length: 100\r\n\r\n{"], 408),  # and then nothing
        ([HEAD + b"transfer-encoding: chunked\r\n\r\n1\r\n{\r\n"], 408),
        ([HEAD + b"x: "], 408),
        ([b"POST"], 408),
        ([b""], None),  # just a connection: closed without a word
    ],
)
def test_what_is_too_much_too_slow_or_not_http_is_told_and_closed(
    target: Server, parts: list[bytes], status: int | None
) -> None:
    received = exchange(target, *parts)
    if status is not None and received:  # with more on its way than is read, a client may see a reset alone
        assert told(received).status == status
    elif status is not None:
        assert status in (413, 431)


@pytest.mark.parametrize(
    "start_of",
    [
        b"GET /health/live HTTP/1.1\r\nx: ",
        HEAD + b"content-type: application/json\r\ncontent-length: 5000\r\n\r\n",
        b"POST /v1/models/none HTTP/1.1\r\nhost: x\r\ncontent-length: 5000\r\n\r\n",  # answered early
        b"GET /health/live HTTP/1.1\r\nhost: x\r\n\r\nGET /",  # the second request on a connection
    ],
    ids=["head", "body", "unwanted body", "second head"],
)
def test_a_byte_now_and_then_keeps_no_connection(target: Server, start_of: bytes) -> None:
    """Slowloris: thirty connections that never finish what they have begun, and never rest."""
    with ExitStack() as stack:
        open_still = {stack.enter_context(connect(target)) for _ in range(30)}
        for connection in open_still:
            connection.sendall(start_of)

        def all_closed() -> bool:
            for connection in list(open_still):
                try:
                    connection.sendall(b"1")
                    connection.setblocking(False)
                    while piece := connection.recv(1 << 16):
                        assert b"too-many-connections" not in piece  # it was taken, and then closed
                    open_still.discard(connection)
                except BlockingIOError:
                    connection.settimeout(PATIENCE_S)
                except OSError:
                    open_still.discard(connection)
            time.sleep(0.1)
            return not open_still

        with target.client() as client:
            assert post(client).status_code == 200  # meanwhile others are answered
        assert until(all_closed)


def test_a_client_that_does_not_read_its_answer_is_left(target: Server) -> None:
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(PATIENCE_S)
        host, port = target.url.removeprefix("http://").split(":")
        connection.connect((host, int(port)))
        connection.sendall(b"GET /openapi.json HTTP/1.1\r\nhost: x\r\n\r\n" * 60)  # a megabyte and more
        assert connection.recv(1, socket.MSG_PEEK)  # answers are on their way, and are left there
        assert until(lambda: connections(target) == 0)


def test_idle_connections_stay_for_those_who_were_served(target: Server) -> None:
    with connect(target) as connection:
        connection.sendall(b"GET /health/live HTTP/1.1\r\nhost: x\r\n\r\n")
        first = b""
        while b"live" not in first:  # its head and its body may come apart
            first += connection.recv(1 << 16)
        assert first.startswith(b"HTTP/1.1 200")
        time.sleep(3)  # three times as long as a head may take
        connection.sendall(b"GET /health/live HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        assert answer(connection).startswith(b"HTTP/1.1 200")


def test_more_connections_than_are_taken_are_told_so(target: Server) -> None:
    with ExitStack() as stack:
        for _ in range(40):
            stack.enter_context(connect(target)).sendall(b"GET /health/live HTTP/1.1\r\nhost: x\r\n\r\n")
        assert until(lambda: connections(target) == 40)
        problem = told(exchange(target, b"GET /health/live HTTP/1.1\r\nhost: x\r\n\r\n"))
        assert (problem.status, problem.code) == (503, "too-many-connections")
        assert "40 connections" in problem.detail


def test_a_bomb_is_not_unpacked(target: Server) -> None:
    bomb = gzip.compress(b"[" + b" " * 200_000_000 + b"]", 9)
    assert len(bomb) < 1 << 20
    with target.client() as client:
        for encoding in ("gzip", "deflate", "br", "zstd", "identity, gzip", "x-gzip", "GZIP"):
            kind = {"content-type": "application/json", "content-encoding": encoding}
            refused = client.post("/v1/models/moons/log_density", content=bomb, headers=kind)
            assert refused.status_code == 415
            assert refused.headers["accept-encoding"] == "identity"


@pytest.mark.parametrize(
    "name",
    [
        "..",
        "../../etc/passwd",
        "..%2f..%2f..%2fetc%2fpasswd",
        "%2e%2e/%2e%2e/etc/passwd",
        "..%252f..%252fetc%252fpasswd",
        "%252e%252e",
        "..%5c..%5cetc",
        "..%c0%af..%c0%afetc",
        "\u2025/etc",
        "\uff0e\uff0e\uff0fetc",
        "moons%00",
        "moons%00.json",
        "%00",
        "moons%2f1",
        "moons/../moons",
        "/etc/passwd",
        "%2fetc%2fpasswd",
        "moons%20",
        "MOONS",
        ".",
        "%2e",
        "~root",
        "file:%2f%2f%2fetc",
        "a" * 10_000,
    ],
)
def test_no_name_leads_out_of_the_store(target: Server, name: str) -> None:
    quoted = "".join(chr(byte) if byte < 128 else f"%{byte:02x}" for byte in name.encode())
    for path in (f"/v1/models/{quoted}", f"/v1/models/moons/versions/{quoted}", f"/{quoted}"):
        request = f"GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"
        received = exchange(target, request.encode())  # a client library would tidy the path up
        problem = told(received)
        assert problem.status == 404
        assert b"root:" not in received
        assert not re.search(r"/(work|tmp|usr|root|home)\b", problem.detail.replace(name, ""))


def test_fields_behind_a_body_are_not_headers(target: Server) -> None:
    chunked = HEAD + b"connection: close\r\ntransfer-encoding: chunked\r\n\r\nf\r\n%b\r\n0\r\n%b\r\n"
    assert told(exchange(target, chunked % (GOOD, b"content-length: abc\r\n"))).status == 400
    for trailer in (b"x-request-id: late\r\n", b"content-encoding: gzip\r\n", b"x-timeout-ms: 0\r\n"):
        received = exchange(target, chunked % (GOOD, trailer))
        assert received.startswith(b"HTTP/1.1 200")
        assert b"late" not in received


def test_what_follows_an_upgrade_is_not_a_request(target: Server) -> None:
    upgrade = b"GET /health/live HTTP/1.1\r\nhost: x\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n"
    received = exchange(target, upgrade, b"GET /v1/models HTTP/1.1\r\nhost: x\r\n\r\n")
    assert received.startswith(b"HTTP/1.1 200")
    assert received.count(b"HTTP/1.1") == 1


def test_a_bad_request_behind_a_good_one_does_not_cut_its_answer(target: Server) -> None:
    good = HEAD + b"content-type: application/json\r\ncontent-length: 15\r\n\r\n" + GOOD
    received = exchange(target, good + b"nonsense\r\n\r\n")
    assert received.startswith(b"HTTP/1.1 200")
    assert b'"log_density":[' in received


def test_only_so_many_requests_are_taken_ahead(target: Server) -> None:
    received = exchange(target, b"GET /health/live HTTP/1.1\r\nhost: x\r\n\r\n" * 5000)
    assert received.count(b"HTTP/1.1 200") == received.count(b"HTTP/1.1") == 65  # those ahead, and the first
    assert received.count(b"connection: close") == 1


def test_every_answer_has_the_headers_that_browsers_heed(target: Server) -> None:
    with target.client() as client:
        answers = [client.get(path) for path in ("/docs", "/openapi.json", "/v1/models", "/none", "/metrics")]
        answers.append(client.post("/v1/models/moons/log_density", content=b"{"))
    for one in answers:
        assert one.headers["x-content-type-options"] == "nosniff"
        assert one.headers["cache-control"] == "no-store"
        assert one.headers["referrer-policy"] == "no-referrer"
        assert "server" not in one.headers
    policy = answers[0].headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "frame-ancestors 'none'" in policy
    assert len(re.findall("'sha256-[A-Za-z0-9+/]{43}='", policy)) == 2


def test_a_store_that_goes_away_is_told_without_its_path(
    start: Start, checkout: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "elsewhere" / "store"
    shutil.copytree(checkout / "model_store" / "moons", folder / "moons")
    (folder / "moons" / "1" / "manifest.json").rename(tmp_path / "manifest.json")
    server = start(at=folder, ready=False)
    program: Any = None
    with server.client() as client:
        broken = [client.get("/v1/models"), client.get("/v1/models/moons"), client.get("/v1/models/none")]
        (tmp_path / "manifest.json").rename(folder / "moons" / "1" / "manifest.json")
        program = next((folder / "moons" / "1" / "programs").glob("decode*"))
        program.unlink()
        broken.append(client.post("/v1/models/moons/sample", json={"n": 1}))
        shutil.rmtree(folder)
        broken += [client.get("/v1/models"), client.get("/v1/models/moons"), client.get("/v1/models/none")]
    for one in broken:
        assert str(tmp_path) not in one.text
        assert "elsewhere" not in one.text
        assert one.status_code in (200, 404, 503)
    server.stop()
