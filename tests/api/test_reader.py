"""Long bodies are read in a process of their own, which nobody notices but those who would have waited."""

import asyncio
import json
import multiprocessing
import os
import resource
import signal
import threading
from collections.abc import Callable
from typing import Any

import httpx
import numpy as np
import pytest
from tests.server import Server, until

from pushforward.api.reader import LONG_BYTES, Reader
from pushforward.api.schemas import SampleRequest

DENSITY = "/v1/models/pair/log_density"
ROWS = np.random.default_rng(0).normal(size=(3000, 2))
SPAWNED = "multiprocessing.spawn"


def reader(server: Server) -> int:
    """The process, which there is after the first long body."""
    with server.client() as client:
        assert client.post(DENSITY, json={"x": ROWS.tolist()}).status_code == 200
    (found,) = server.children("multiprocessing.spawn")
    return found


def body(**fields: Any) -> bytes:
    """JSON that is long, whatever the fields say: white space is skipped."""
    return json.dumps(fields).encode() + b" " * LONG_BYTES


def test_long_bodies_have_the_answers_of_short_ones(client: httpx.Client) -> None:
    long = client.post(DENSITY, json={"x": ROWS.tolist()}).json()
    for first in (0, 1000, 2900):
        short = client.post(DENSITY, json={"x": ROWS[first : first + 100].tolist()}).json()
        for name in ("log_density", "nfe"):
            assert long[name][first : first + 100] == short[name]
    for path, fields in (
        ("pair/transport", {"z": [[0.5, 1.0]], "return_log_density": True}),
        ("pair/log_density", {"rows": [{"dose": 1, "age": 0.5}]}),
        ("given/log_density", {"x": [[0, 1], [1, 0]], "context": [[0.5]]}),
        ("given/log_density", {"x": [[0, 1]], "context": [{"shift": 0.5}]}),
        ("pair/sample", {"n": 3, "seed": 1}),
    ):
        headers = {"content-type": "application/json"}
        answers = [
            client.post(f"/v1/models/{path}", content=content, headers=headers)
            for content in (body(**fields), json.dumps(fields).encode())
        ]
        assert answers[0].status_code == 200
        assert answers[0].json() == answers[1].json()


@pytest.mark.parametrize(
    "content",
    [
        b"[}",
        b'{"x": [[1, 2]], "y": 3}',
        b'{"x": [[1, 2], [3]]}',
        b'{"x": [[1], [3]]}',
        b'{"x": [[1, 2], [3, "four"]]}',
        b'{"x": []}',
        b'{"x": [[]]}',
        b'{"x": [[1, 1e999]]}',
        b"{}",
    ],
)
def test_what_is_wrong_is_told_in_the_same_words(client: httpx.Client, content: bytes) -> None:
    def told(sent: bytes) -> tuple[int, dict[str, Any]]:
        answer = client.post(DENSITY, content=sent, headers={"content-type": "application/json"})
        return answer.status_code, answer.json() | {"request_id": ""}

    status, short = told(content)
    assert status in (400, 422)
    assert told(content.ljust(LONG_BYTES + 1)) == (status, short)


def test_nobody_waits_while_a_long_body_is_read(
    server: Server, in_background: Callable[..., tuple[threading.Thread, list[Any]]]
) -> None:
    """However long that takes: for ever, here."""
    stopped = reader(server)
    os.kill(stopped, signal.SIGSTOP)
    try:
        thread, answers = in_background(server, {"x": ROWS.tolist()})
        with server.client() as client:
            for _ in range(20):
                assert client.post(DENSITY, json={"x": [[0.5, 0.5]]}).status_code == 200
            late = client.post(DENSITY, json={"x": ROWS.tolist()}, headers={"x-timeout-ms": "300"})
            assert late.status_code == 504
        assert not answers
    finally:
        os.kill(stopped, signal.SIGCONT)
    thread.join()
    assert answers[0].status_code == 200


def test_a_reader_that_is_killed_is_replaced(
    server: Server, in_background: Callable[..., tuple[threading.Thread, list[Any]]]
) -> None:
    before = reader(server)
    os.kill(before, signal.SIGSTOP)
    thread, answers = in_background(server, {"x": ROWS.tolist()})
    os.kill(before, signal.SIGKILL)
    thread.join()
    with server.client() as client:
        again = client.post(DENSITY, json={"x": ROWS.tolist()})
    assert [answers[0].status_code, again.status_code] == [200, 200]
    assert answers[0].json() == again.json()
    assert reader(server) != before


def test_while_there_is_no_room_for_a_process_long_bodies_are_read_in_place() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)

    async def test() -> None:
        reader = Reader()
        resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))  # no pipe to one can be opened
        try:
            assert (await reader.read(SampleRequest, body(n=3), 60)).n == 3
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert not multiprocessing.active_children()
        assert (await reader.read(SampleRequest, body(n=4), 60)).n == 4
        assert multiprocessing.active_children()
        await reader.close()
        assert not multiprocessing.active_children()

    asyncio.run(test())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_none_outlives_its_server(start: Any, gone: Callable[[int], bool], number: int) -> None:
    server = start()
    reader(server)
    found = server.children("multiprocessing")
    assert len(found) == 2  # the reader, and what the standard library puts beside it
    assert server.stop(number) == (0 if number == signal.SIGTERM else -number)
    assert all(map(gone, found))


@pytest.fixture
def in_background() -> Callable[..., tuple[threading.Thread, list[Any]]]:
    """Sends a request, and comes back when all of its body was taken in."""

    def send(server: Server, fields: dict[str, Any]) -> tuple[threading.Thread, list[Any]]:
        answers: list[Any] = []

        def ask() -> None:
            with server.client() as client:
                answers.append(client.post(DENSITY, json=fields))

        thread = threading.Thread(target=ask)
        thread.start()
        held = ("pushforward_queue_bytes",)
        assert until(lambda: server.metrics()[held] > LONG_BYTES)
        return thread, answers

    return send
