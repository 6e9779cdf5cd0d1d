"""API keys over HTTP: who gets in, who does not, and how soon."""

import asyncio
import itertools
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.redis_server import queue
from tests.server import PATIENCE_S, Server, Start, until

from pushforward.api.answers import Problem
from pushforward.keys import Key, new_key, open_keys

MOONS = "/v1/models/moons"
ROW = {"x": [[0.0, 1.0]]}


def key(place: str, *scopes: Any, **limits: Any) -> tuple[Key, str]:
    made, token = new_key("tester", scopes or ["infer"], **limits)
    change(place, "add", made)
    return made, token


def change(place: str, how: str, what: Any) -> None:
    async def run() -> None:
        keys = open_keys(place)
        await getattr(keys, how)(what)
        await keys.close()

    asyncio.run(run())


def bearer(token: str) -> dict[str, str]:
    return {"authorization": f"Bearer {token}"}


def problem(answer: httpx.Response) -> Problem:
    assert answer.headers["content-type"] == "application/problem+json"
    return Problem.model_validate_json(answer.content)


@pytest.fixture(scope="session")
def moons(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with one small model."""
    folder = tmp_path_factory.mktemp("moons")
    shutil.copytree(checkout / "model_store" / "moons", folder / "moons")
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("keys") / "keys.json")


@pytest.fixture(scope="module")
def tokens(place: str) -> dict[str, str]:
    """A key for each scope."""
    return {scope: key(place, scope)[1] for scope in ("infer", "jobs", "metrics", "admin")}


@pytest.fixture(scope="module")
def locked(start: Start, moons: Path, place: str, tokens: dict[str, str]) -> Server:
    """A server that asks for keys."""
    return start(at=moons, keys=place)


@pytest.fixture
def door(locked: Server) -> Iterator[httpx.Client]:
    with locked.client() as client:
        yield client


@pytest.mark.parametrize(
    ("method", "path", "scope"),
    [
        ("GET", "/health/live", None),
        ("GET", "/health/ready", None),
        ("GET", "/docs", None),
        ("GET", "/openapi.json", None),
        ("GET", "/v1/models", "infer"),
        ("GET", MOONS, "infer"),
        ("POST", f"{MOONS}/log_density", "infer"),
        ("POST", f"{MOONS}/versions/1/anomaly", "infer"),
        ("GET", "/metrics", "metrics"),
        ("POST", f"{MOONS}/versions/1/load", "admin"),
    ],
)
def test_every_operation_asks_for_its_scope(
    door: httpx.Client, tokens: dict[str, str], method: str, path: str, scope: str | None
) -> None:
    def ask(headers: dict[str, str]) -> httpx.Response:
        return door.request(method, path, headers=headers, json=ROW if method == "POST" else None)

    nobody = ask({})
    if scope is None:
        assert nobody.status_code == 200
        return
    told = problem(nobody)
    assert (told.status, told.code) == (401, "unauthorized")
    assert "Authorization: Bearer" in told.detail
    assert nobody.headers["www-authenticate"] == 'Bearer realm="pushforward"'
    for name, token in tokens.items():
        for headers in (bearer(token), {"x-api-key": token}, {"authorization": f"bearer {token}"}):
            answer = ask(headers)
            if name == scope:
                assert answer.status_code in (200, 202)
            else:
                assert problem(answer).status == 403
                assert f"has not the scope '{scope}'" in problem(answer).detail
                assert f'error="insufficient_scope", scope="{scope}"' in answer.headers["www-authenticate"]


def test_two_keys_are_none_and_other_schemes_are_passed_over(
    door: httpx.Client, tokens: dict[str, str]
) -> None:
    both = bearer(tokens["infer"]) | {"x-api-key": tokens["admin"]}
    assert problem(door.get("/v1/models", headers=both)).detail.endswith("send one.")
    proxied = {"authorization": "Basic dTpw", "x-api-key": tokens["infer"]}
    assert door.get("/v1/models", headers=proxied).status_code == 200


def test_none_of_ten_thousand_random_and_near_miss_keys_gets_in_or_costs_memory(
    locked: Server, tokens: dict[str, str]
) -> None:
    def attempts() -> Iterator[bytes]:
        draw, valid = random.Random(0), list(tokens.values())
        for number in itertools.count():
            token = bytearray(draw.choice(valid).encode())
            if number % 4 == 0:  # all at random
                yield b"pf_%012x_%048x" % (draw.getrandbits(48), draw.getrandbits(192))
            elif number % 4 == 1:  # one digit is another
                at = draw.randrange(16, len(token))
                token[at] = draw.choice([digit for digit in b"0123456789abcdef" if digit != token[at]])
                yield bytes(token)
            elif number % 4 == 2:  # cut off, or with more behind it
                yield bytes(token[: draw.randrange(len(token))] or b"x")
            else:
                yield bytes(draw.choices(range(33, 127), k=draw.randrange(1, 300)))

    keys = list(itertools.islice(attempts(), 10_000))
    # Pipelined on a few connections, by hand: a client library takes ten times as long as the server.
    address = locked.url.removeprefix("http://").split(":")

    async def knock(share: list[bytes]) -> list[bytes]:
        reader, writer = await asyncio.open_connection(*address)
        statuses = []
        for first in range(0, len(share), 20):
            batch = share[first : first + 20]
            for token in batch:
                head = b"GET /v1/models HTTP/1.1\r\nhost: x\r\nauthorization: Bearer %b\r\n\r\n" % token
                writer.write(head)
            for _ in batch:
                head = await reader.readuntil(b"\r\n\r\n")
                statuses.append(head.split(b" ", 2)[1])
                length = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
                await reader.readexactly(length)
        writer.close()
        return statuses

    async def knock_together(keys: list[bytes]) -> list[list[bytes]]:
        return await asyncio.gather(*(knock(keys[part::8]) for part in range(8)))

    asyncio.run(knock_together(keys[:1000]))  # for the allocator
    before = locked.memory()
    answers = asyncio.run(knock_together(keys))
    assert set(itertools.chain(*answers)) == {b"401"}
    assert sum(map(len, answers)) == 10_000
    assert locked.memory() - before < 5e6
    locked.keep_up()
    told = str(locked.log)
    assert not any(token.rpartition("_")[2] in told for token in tokens.values())
    assert not any(token.decode() in told for token in keys if token.startswith(b"pf_") and len(token) == 64)


def test_a_key_that_a_client_puts_in_the_wrong_place_is_not_logged(
    locked: Server, door: httpx.Client, tokens: dict[str, str]
) -> None:
    token = tokens["infer"]
    door.get(f"/v1/models/{token}", headers=bearer(token))
    door.post(f"{MOONS}/log_density", json={"x": [[token, 0]]}, headers=bearer(token))
    door.get("/v1/models", headers=bearer(token) | {"x-request-id": token})
    locked.keep_up()
    told = str(locked.log)
    assert token not in told
    assert token[:16] + "…" in told


def test_orders_leave_a_line_that_says_who_gave_them(
    locked: Server, door: httpx.Client, tokens: dict[str, str]
) -> None:
    path = f"{MOONS}/versions/1/load"
    door.post(path, headers=bearer(tokens["admin"]) | {"x-request-id": "good"})
    door.post(path, headers=bearer(tokens["infer"]) | {"x-request-id": "lacking"})
    door.post(path, headers={"x-request-id": "nobody"})
    locked.keep_up()
    lines = {line["request"]: line for line in locked.log if line["event"] == "audit"}
    said = [
        [
            lines[one][name]
            for name in ("action", "model", "version", "peer", "key", "name", "outcome", "status")
        ]
        for one in ("good", "lacking", "nobody")
    ]
    assert said == [
        ["load", "moons", "1", "127.0.0.1", tokens["admin"][3:15], "tester", "done", 202],
        ["load", "moons", "1", "127.0.0.1", None, None, "refused", 403],
        ["load", "moons", "1", "127.0.0.1", None, None, "refused", 401],
    ]


def test_a_quota_is_a_429_that_says_which_how_much_and_when(door: httpx.Client, place: str) -> None:
    # So slow that not even two rows come in while the test runs.
    slow, fast = key(place, rows_per_second=0.01, burst_rows=3), key(place, rows_in_flight=2)

    def ask(token: str, rows: int) -> httpx.Response:
        return door.post(f"{MOONS}/log_density", json={"x": ROW["x"] * rows}, headers=bearer(token))

    assert until(lambda: ask(fast[1], 1).status_code == 200)  # the server has seen them
    assert ask(slow[1], 3).status_code == 200
    answer = ask(slow[1], 2)
    told = answer.json()
    assert (answer.status_code, told["code"], told["reason"]) == (429, "quota-exceeded", "rows_per_second")
    assert (told["asked"], told["limit"]) == (2, 0.01)
    assert 0 <= told["allowed"] < 2
    assert 1 <= int(answer.headers["retry-after"]) <= 200
    assert ask(slow[1], 4).json()["code"] == "limit-exceeded"  # which waiting would not mend
    assert ask(fast[1], 3).status_code == 422
    for _ in range(5):
        assert ask(fast[1], 2).status_code == 200


@pytest.mark.parametrize("kind", ["file", "redis"])
def test_a_key_is_taken_and_refused_everywhere_within_a_second(
    start: Start, moons: Path, tmp_path: Path, kind: str
) -> None:
    def test(place: str) -> None:
        def command(*arguments: str) -> str:
            done = subprocess.run(
                [sys.executable, "-m", "pushforward.cli", "keys", *arguments, "--keys", place],
                capture_output=True,
                text=True,
                check=True,
                timeout=PATIENCE_S,
            )
            assert "audit" in done.stderr
            return done.stdout.strip()

        first = command("create", "--name", "first")
        servers = [start(at=moons, keys=place, load="first-use", ready=False) for _ in range(2)]

        def statuses(token: str) -> list[int]:
            asked = [f"{one.url}/v1/models" for one in servers]
            return [httpx.get(url, headers=bearer(token), timeout=PATIENCE_S).status_code for url in asked]

        assert statuses(first) == [200, 200]
        # A second on a machine that is not busy: servers look every 0.4 s.
        second, token = key(place)
        assert until(lambda: statuses(token) == [200, 200])
        change(place, "remove", second.id)
        assert until(lambda: statuses(token) == [401, 401])
        assert statuses(first) == [200, 200]
        command("revoke", first)  # a whole key is understood as well
        assert until(lambda: statuses(first) == [401, 401])
        for one in servers:
            assert one.stop() == 0
            assert first not in str(one.log)

    if kind == "file":
        test(str(tmp_path / "keys.json"))
    else:
        with queue(tmp_path) as server:
            test(server.url)


def test_the_control_plane_moves_to_a_port_of_its_own(
    start: Start, moons: Path, place: str, tokens: dict[str, str]
) -> None:
    server = start("--admin-port", "0", at=moons, keys=place)
    admin = next(line["admin"] for line in server.log if line["event"] == "listening")
    order, solve = f"{MOONS}/versions/1/load", f"{MOONS}/log_density"
    with httpx.Client(timeout=PATIENCE_S) as client:

        def statuses(url: str, method: str, path: str) -> tuple[int, int]:
            """Without a key, and with the right one."""
            headers: tuple[dict[str, str], ...] = ({}, bearer(tokens["admin" if path == order else "infer"]))
            body = ROW if method == "POST" else None
            without, with_key = (
                client.request(method, url + path, json=body, headers=one) for one in headers
            )
            return without.status_code, with_key.status_code

        both = {
            path: (statuses(server.url, method, path), statuses(admin, method, path))
            for method, path in (
                ("GET", "/health/live"),
                ("GET", "/health/ready"),
                ("GET", "/metrics"),
                ("GET", "/v1/models"),
                ("POST", order),
                ("POST", solve),
            )
        }
        described = [set(client.get(f"{url}/openapi.json").json()["paths"]) for url in (server.url, admin)]
        told = client.get(f"{admin}/metrics").text
        with client.stream("GET", f"{admin}/health/live"):
            assert server.stop() == 0  # both ports drain together
    assert both == {
        "/health/live": ((200, 200), (200, 200)),
        "/health/ready": ((200, 200), (200, 200)),
        "/metrics": ((404, 404), (200, 200)),  # the port is the key
        "/v1/models": ((401, 200), (404, 404)),
        order: ((404, 404), (401, 202)),
        solve: ((401, 200), (404, 404)),
    }
    assert "/v1/models/{model}/versions/{version}/load" in described[1] - described[0]
    assert "pushforward_requests_total" in told
