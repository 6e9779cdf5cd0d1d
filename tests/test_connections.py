"""Addresses of Redis: what they mean, and the real thing behind TLS, passwords and sentinels."""

import asyncio
import ssl
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from redis.exceptions import AuthenticationError, RedisError
from tests.redis_server import PROGRAMS, Queue, queue
from tests.server import PATIENCE_S, until

from pushforward.connections import connect, shown
from pushforward.errors import UsageError


def ping(url: str, **options: Any) -> bool:
    """Whether the server at an address answers."""

    async def ask() -> bool:
        client = connect(url, protocol=2, socket_timeout=PATIENCE_S, **options)
        try:
            return bool(await client.ping())
        finally:
            await client.aclose()

    return asyncio.run(ask())


@pytest.mark.parametrize(
    ("url", "shows"),
    [
        ("redis://user:secret@host:1/2", "redis://host:1/2"),
        ("rediss://:secret@host?password_file=/run/secret", "rediss://host"),
        ("sentinel://:secret@a:1,b:2/name", "sentinel://a:1,b:2/name"),
        ("unix:///run/redis.sock?password=secret", "unix:///run/redis.sock"),
        ("user:secret@host:6379", "host:6379"),  # which is no address, and may hold one all the same
    ],
)
def test_what_is_shown_of_an_address_hides_its_secrets(url: str, shows: str) -> None:
    assert shown(url) == shows


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("localhost:6379", "it must begin with one of redis://"),
        ("http://:secret@localhost", "it must begin with one of redis://"),
        ("redis://:secret@localhost:many", "ort"),
        ("redis://localhost/0?no_such_option=1", "no_such_option"),
        (
            "redis://:secret@localhost?password_file=/no/such/file",
            "/no/such/file cannot be read: No such file",
        ),
        ("sentinel://:secret@localhost", "must name the service"),
        ("sentinel://localhost:many/name", "many"),
    ],
)
def test_what_is_no_address_is_refused_with_the_reason(url: str, why: str) -> None:
    with pytest.raises(UsageError, match="is no address of a Redis server") as caught:
        ping(url)
    assert why in caught.value.message
    assert "secret" not in caught.value.message


def test_a_password_is_read_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "password"
    file.write_text("p@ss/word?\n")
    with queue(tmp_path, "valkey") as server:
        with server.client() as client:
            client.config_set("requirepass", "p@ss/word?")
        with pytest.raises((AuthenticationError, RedisError)):
            ping(server.url)
        assert ping(f"{server.url}?password_file={file}")
        assert ping(f"redis://:p%40ss%2Fword%3F@127.0.0.1:{server.port}")


def test_a_unix_socket(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with queue(tmp_path, "valkey", "--unixsocket", str(path)):
        assert ping(f"unix://{path}")


def test_tls_with_an_authority_of_ones_own(tmp_path: Path) -> None:
    """The server in the wheel speaks no TLS: it is ended in front of it, as stunnel and proxies do."""
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    command = (
        "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=localhost"
    )
    files = ("-keyout", str(key), "-out", str(certificate), "-addext", "subjectAltName=IP:127.0.0.1")
    subprocess.run([*command.split(), *files], check=True, capture_output=True)
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificate, key)

    async def test(server: Queue) -> None:
        async def forward(theirs: asyncio.StreamReader, back: asyncio.StreamWriter) -> None:
            ours, on = await asyncio.open_connection("127.0.0.1", server.port)

            async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                while data := await reader.read(4096):
                    writer.write(data)
                writer.close()

            await asyncio.gather(copy(theirs, on), copy(ours, back))

        async with await asyncio.start_server(forward, "127.0.0.1", 0, ssl=tls) as listening:
            url = f"rediss://127.0.0.1:{listening.sockets[0].getsockname()[1]}"
            assert await asyncio.to_thread(ping, f"{url}?ssl_ca_certs={certificate}")
            with pytest.raises(RedisError, match="certificate verify failed"):
                await asyncio.to_thread(ping, url)

    with queue(tmp_path, "valkey") as server:
        asyncio.run(test(server))


@contextmanager
def sentinel(folder: Path, master: Queue) -> Iterator[Queue]:
    """A sentinel that watches a server under the name "mine", and is quick to give it up."""
    folder.mkdir()
    file = folder / "sentinel.conf"
    file.write_text(
        f"sentinel monitor mine 127.0.0.1 {master.port} 1\n"
        "sentinel down-after-milliseconds mine 2000\n"
        "sentinel failover-timeout mine 3000\n"
    )
    made = Queue(PROGRAMS["valkey"], folder)
    log = subprocess.DEVNULL
    command = [made.program, str(file), "--sentinel", "--port", str(made.port), "--bind", "127.0.0.1"]
    made.process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        yield made
    finally:
        made.kill()


def test_sentinels_name_the_server_also_after_it_was_lost(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()

    def answers() -> bool:
        try:
            return ping(url)
        except RedisError:
            return False

    async def writes(url: str) -> None:
        client = connect(url, protocol=2, socket_timeout=PATIENCE_S)
        for _ in range(600):
            try:
                await client.set("a", "1")
                break
            except (RedisError, OSError):
                await asyncio.sleep(0.1)
        else:
            raise TimeoutError
        await client.aclose()

    with queue(tmp_path / "one") as one:
        follows = ("--replicaof", "127.0.0.1", str(one.port))
        with queue(tmp_path / "two", "valkey", *follows) as two, sentinel(tmp_path / "three", one) as watch:
            url = f"sentinel://127.0.0.1:{watch.port}/mine"
            assert until(answers)
            with watch.client() as client:
                assert until(lambda: client.sentinel_master("mine")["num-slaves"] == 1)
            with two.client() as client:
                assert until(lambda: client.info("replication")["master_link_status"] == "up")
            asyncio.run(writes(url))
            with one.client() as client:
                assert client.get("a") == b"1"
            one.kill()
            asyncio.run(writes(url))
            with two.client() as client:
                assert client.role()[0] == b"master"
        with pytest.raises(RedisError):
            ping("sentinel://127.0.0.1:1/mine")
