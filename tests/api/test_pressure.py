"""The front door under pressure: too much at once, too late, and clients that hang up."""

import asyncio
import contextlib
import json
import os
import random
import re
from collections.abc import Awaitable
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.api.conftest import ENDLESS, SAMPLE, connections, too_late

QUICK = {"n": 3, "seed": 1}
OUTCOMES = ("answered", "failed", "cancelled", "expired", "refused")


def at_rest(server: Any) -> bool:
    told = server.metrics()
    return not any(
        told[f"pushforward_{name}",] for name in ("requests_in_flight", "queue_rows", "queue_bytes")
    )


def in_the_engine(server: Any) -> dict[str, float]:
    """Rows that the only worker has in slots, and rows that wait for one."""
    names = ("pushforward_rows_running", "pushforward_rows_waiting")
    return {key[0]: value for key, value in server.metrics().items() if key[0] in names}


def solved(told: dict[tuple[str, ...], float], name: str = "pushforward_requests_total") -> dict[str, float]:
    """How many requests for samples, or how many rows, had which outcome."""
    return {
        outcome: sum(value for key, value in told.items() if key[0] == name and outcome in key)
        for outcome in OUTCOMES
    }


class Request:
    """A request for samples whose answer is never waited for, unless it is read."""

    def __init__(self, body: dict[str, Any]) -> None:
        self._body = json.dumps(body).encode()

    async def send(self, url: str, part: float = 1.0) -> None:
        host, port = url.removeprefix("http://").split(":")
        self._reader, self._writer = await asyncio.open_connection(host, int(port))
        head = f"POST {SAMPLE} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        head += f"content-length: {len(self._body)}\r\n\r\n"
        self._writer.write(head.encode() + self._body[: int(part * len(self._body))])
        await self._writer.drain()

    async def hang_up(self) -> None:
        self._writer.transport.abort()
        with contextlib.suppress(ConnectionError):
            await self._writer.wait_closed()


def run(test: Awaitable[None]) -> None:
    asyncio.run(asyncio.wait_for(test, 600))


def test_clients_that_hang_up_take_their_rows_along(start: Any, until: Any) -> None:
    server, clients = start(), 24
    folders = [Path(f"/proc/{pid}/fd") for pid in (server.process.pid, server.worker())]

    def descriptors() -> list[int]:
        return [len(os.listdir(folder)) for folder in folders]

    with server.client() as client:
        assert client.post(SAMPLE, json=QUICK).status_code == 200
    assert until(lambda: at_rest(server))
    assert until(lambda: connections(server) == 0)
    before = descriptors()

    async def storm() -> None:
        requests = [Request(ENDLESS) for _ in range(clients)]
        await asyncio.gather(*(request.send(server.url) for request in requests))
        assert await asyncio.to_thread(
            until, lambda: server.metrics()["pushforward_queue_rows",] == clients * ENDLESS["n"]
        )
        await asyncio.gather(*(request.hang_up() for request in requests))

    run(storm())
    assert until(lambda: at_rest(server))
    with server.client() as client:  # behind 48000 rows it would be answered after hours
        assert client.post(SAMPLE, json=QUICK).status_code == 200
    told = server.metrics()
    assert solved(told) == dict.fromkeys(OUTCOMES, 0) | {"answered": 2, "cancelled": clients}
    rows = solved(told, "pushforward_rows_total")
    assert rows["answered"] + rows["cancelled"] == clients * ENDLESS["n"] + 2 * QUICK["n"]
    assert rows["cancelled"] > 0
    assert until(lambda: descriptors() == before)
    assert until(
        lambda: in_the_engine(server) == {"pushforward_rows_running": 0, "pushforward_rows_waiting": 0}
    )
    server.keep_up()
    lines = [line for line in server.log if line["event"] == "request" and line["status"] == 499]
    assert len(lines) == clients
    assert all(
        line["rows"] == ENDLESS["n"] and line["solved"] < ENDLESS["n"] and "nfe" in line for line in lines
    )
    assert not [line for line in server.log if line.get("level") == "error"]
    assert server.stop() == 0


def test_a_queue_that_is_full_refuses_says_why_and_takes_again(start: Any, until: Any) -> None:
    server = start("--max-queue-rows", str(ENDLESS["n"]))

    async def fill() -> None:
        with server.client() as client:

            def could_never_fit() -> None:
                never = client.post(SAMPLE, json=QUICK | {"n": ENDLESS["n"] + 1})
                assert (never.status_code, never.json()["code"]) == (422, "limit-exceeded")
                assert never.json()["limit"] == ENDLESS["n"]

            could_never_fit()
            full = Request(ENDLESS)
            await full.send(server.url)
            assert await asyncio.to_thread(
                until, lambda: server.metrics()["pushforward_queue_rows",] == ENDLESS["n"]
            )
            for _ in range(5):
                refused = client.post(SAMPLE, json=QUICK)
                assert (refused.status_code, refused.json()["code"]) == (503, "unavailable")
                assert int(refused.headers["retry-after"]) >= 1
                told = {name: refused.json()[name] for name in ("reason", "limit", "asked")}
                assert told == {"reason": "rows", "limit": ENDLESS["n"], "asked": QUICK["n"]}
                assert refused.json()["depth"] == ENDLESS["n"]
                could_never_fit()
            assert client.get("/health/live").status_code == 200
            assert client.get("/health/ready").status_code == 200
            await full.hang_up()
            assert await asyncio.to_thread(until, lambda: at_rest(server))
            assert client.post(SAMPLE, json=QUICK).status_code == 200

    run(fill())
    told = server.metrics()
    assert told["pushforward_rejections_total", "rows"] == 5
    assert told["pushforward_queue_rows_limit",] == ENDLESS["n"]
    assert solved(told) == {"answered": 3, "failed": 6, "cancelled": 1, "expired": 0, "refused": 5}
    server.stop()


def test_slow_uploads_cannot_hold_more_than_the_queue_does(start: Any, until: Any) -> None:
    body = QUICK | {"x": "y" * 3000}
    size = len(json.dumps(body))
    # Nobody is closed for being slow while this test runs.
    server = start("--max-queue-bytes", str(4 * size), "--header-timeout-s", "600")

    async def uploads() -> None:
        slow = [Request(body) for _ in range(4)]
        for request in slow:
            await request.send(server.url, part=0.5)
        assert await asyncio.to_thread(
            until, lambda: server.metrics()["pushforward_queue_bytes",] == 4 * size
        )
        with server.client() as client:
            refused = client.post(SAMPLE, json=QUICK)
            assert (refused.status_code, refused.json()["reason"]) == (503, "bytes")
            await slow[0].hang_up()
            assert await asyncio.to_thread(
                until, lambda: server.metrics()["pushforward_queue_bytes",] == 3 * size
            )
            assert client.post(SAMPLE, json=QUICK).status_code == 200
            for request in slow[1:]:
                await request.hang_up()

    run(uploads())
    assert until(lambda: at_rest(server))
    server.stop()


def test_requests_and_rows_add_up_at_every_moment_of_a_storm(start: Any, until: Any) -> None:
    server, draw, requests = start("--max-queue-rows", "3000"), random.Random(0), 120
    at_once = asyncio.Semaphore(12)
    statuses: list[int | None] = []
    bodies: list[dict[str, Any]] = [
        QUICK,
        QUICK | {"n": 400},
        ENDLESS | {"n": 50, "timeout_ms": 100},
        ENDLESS | {"n": 1500, "timeout_ms": 200},
        QUICK | {"n": 0},
        QUICK | {"n": 3001},
        ENDLESS,
    ]

    async def ask(client: httpx.AsyncClient) -> None:
        body = draw.choice(bodies)
        patience = 0.15 if body is ENDLESS else 600
        async with at_once:
            await answered(client, body, patience)

    async def answered(client: httpx.AsyncClient, body: dict[str, Any], patience: float) -> None:
        try:
            statuses.append((await client.post(SAMPLE, json=body, timeout=patience)).status_code)
        except httpx.TimeoutException:
            statuses.append(None)

    def adds_up() -> None:
        told = server.metrics()
        in_flight, ended = told["pushforward_requests_in_flight",], sum(solved(told).values())
        assert 0 <= in_flight <= requests
        assert 0 <= told["pushforward_queue_rows",] <= 3000
        assert in_flight + ended <= requests

    async def storm() -> None:
        async with httpx.AsyncClient(base_url=server.url) as client:
            asking = [asyncio.create_task(ask(client)) for _ in range(requests)]
            while not all(task.done() for task in asking):
                await asyncio.to_thread(adds_up)
            await asyncio.gather(*asking)

    run(storm())
    assert until(lambda: at_rest(server))
    told, left = solved(server.metrics()), statuses.count(None)
    assert requests - left <= sum(told.values()) <= requests  # a client may have left before it was heard
    assert told["answered"] == statuses.count(200)
    assert told["failed"] == statuses.count(422)
    for outcome, status in (("expired", 504), ("refused", 503)):
        assert statuses.count(status) <= told[outcome] <= statuses.count(status) + left
    assert told["cancelled"] <= left
    with server.client() as client:
        assert client.post(SAMPLE, json=QUICK).status_code == 200
    server.stop()


def test_a_deadline_may_stand_in_the_headers_and_says_how_far_the_rows_came(start: Any) -> None:
    server = start()
    with server.client() as client:

        def ask(timeout_ms: int) -> httpx.Response:
            # the first steps of 256 rows take some hundredths of a second, all of them a minute
            return client.post(SAMPLE, json=ENDLESS | {"n": 256}, headers={"x-timeout-ms": str(timeout_ms)})

        late, times = too_late(ask, "travelled_least")
        told = late.json()
        assert told["code"] == "deadline-exceeded"
        assert f"The deadline of {500 << times} ms passed" in told["detail"]
        assert (told["rows"], told["solved"] < 256) == (256, True)
        assert told["travelled_least"] <= told["travelled_mean"] < 1
        assert told["nfe"] > 0
        field_first = client.post(SAMPLE, json=QUICK | {"timeout_ms": 60_000}, headers={"x-timeout-ms": "1"})
        assert field_first.status_code == 200
    assert server.metrics()["pushforward_deadline_misses_total",] == times
    server.stop()


def test_an_answer_and_its_log_line_say_where_the_time_went(start: Any, until: Any) -> None:
    server = start()
    with server.client() as client:
        answer = client.post(SAMPLE, json=QUICK)
        timing = answer.headers["server-timing"]
        stages = dict(re.findall(r"(\w+);dur=(\d+\.\d{3})(?:, |$)", timing))
        assert list(stages) == ["admission", "queue", "solve", "total"]
        assert 0 <= float(stages["admission"]) <= float(stages["total"])
        assert "server-timing" not in client.get("/v1/models/positive/versions/9").headers
    line = server.wait_for("request")
    assert line["queue_ms"] == float(stages["queue"])
    assert line["solve_ms"] == float(stages["solve"])
    assert line["wall_ms"] == pytest.approx(float(stages["total"]), abs=0.002)
    assert (line["rows"], line["solved"]) == (3, 3)
    told = server.metrics()
    for stage in stages:
        assert told["pushforward_request_seconds_count", "sample", stage] == 1
    server.stop()
