from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.server import PATIENCE_S, Server, Start, gone, servers, until

# Its method is of order 3: the less the tolerance the more steps, ten thousand a row at these.
SAMPLE = "/v1/models/positive/sample"
# Answered after some seconds: time to do something meanwhile even on a machine ten times as fast.
SLOW: dict[str, Any] = {
    "n": 10,
    "seed": 1,
    "rtol": 3e-13,
    "atol": 3e-13,
    "precision": "float64",
    "max_steps": 1_000_000,
}
# No machine answers these while a test runs: it takes a minute for 256 of them.
ENDLESS = SLOW | {"n": 2000, "rtol": 1e-13, "atol": 1e-13, "logp_atol": 1e-13, "return_log_density": True}


def too_late(ask: Callable[[int], httpx.Response], done: str) -> tuple[httpx.Response, int]:
    """Ask with a deadline of a second, of two, of four …: by the first, a busy machine may have done nothing.

    Args:
        ask: with a deadline, in milliseconds.
        done: the field that is above zero when something was done.

    Returns:
        the answer then, and how often it was asked for.
    """
    for attempt in range(7):
        answer = ask(1000 << attempt)
        assert answer.status_code == 504, answer.text
        if answer.json()[done] > 0:
            return answer, attempt + 1
    raise AssertionError(f"nothing was done in a minute: {answer.text}")


def rows_running(server: Server) -> float:
    """Rows that its only worker has in slots, as far as it has said."""
    return server.metrics().get(("pushforward_rows_running", "0"), 0)


def connections(server: Server) -> int:
    """How many it has to clients, with those that these have closed and it has not."""
    port, process = int(server.url.rpartition(":")[2]), Path(f"/proc/{server.process.pid}")
    owned = set()
    for descriptor in (process / "fd").iterdir():
        with suppress(FileNotFoundError):  # it has just been closed
            owned.add(descriptor.readlink().name.removeprefix("socket:[").removesuffix("]"))
    lines = [line.split() for line in (process / "net/tcp").read_text().splitlines()[1:]]
    return sum(
        line[1].endswith(f":{port:04X}") and line[3] != "0A" and line[9] in owned  # 0A: it listens
        for line in lines
    )


@pytest.fixture(scope="session")
def start(request: pytest.FixtureRequest) -> Iterator[Start]:
    """Starts servers, by default of ``store``, and sees to it that none is left over.

    They have one worker, however many cores there are, and are patient with a machine that is busy.
    """
    with servers(lambda: request.getfixturevalue("store")) as start:
        yield partial(start, workers=1, timeout_ms=600_000, drain_s=PATIENCE_S, stall_s=PATIENCE_S)


@pytest.fixture(scope="session")
def server(start: Start) -> Server:
    """One server for all tests that leave it as it was."""
    return start()


@pytest.fixture(scope="session")
def client(server: Server) -> Iterator[httpx.Client]:
    with server.client() as client:
        yield client


@pytest.fixture(name="until")
def until_fixture() -> Callable[[Callable[[], bool]], bool]:
    return until


@pytest.fixture(name="gone")
def gone_fixture() -> Callable[[int], bool]:
    return gone
