"""Tasks that go on whatever happens, and calls to a server that has forgotten the scripts."""

import asyncio
from pathlib import Path

import pytest
import uvloop
from tests.broker.rigs import until
from tests.redis_server import queue

from pushforward.broker.redis import link as links
from pushforward.broker.redis.link import Link, cancelled, endlessly
from pushforward.errors import Unavailable


def test_work_that_fails_is_begun_again_until_it_ends(caplog: pytest.LogCaptureFixture) -> None:
    times = 0

    async def work() -> None:
        nonlocal times
        times += 1
        if times < 3:
            raise KeyError("nobody thought of this")

    asyncio.run(endlessly(work))
    assert times == 3
    assert [record.message for record in caplog.records] == ["queue work failed"] * 2


def test_a_task_that_swallows_a_cancellation_is_cancelled_again() -> None:
    async def stubborn() -> None:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            await asyncio.sleep(60)

    async def test() -> None:
        task = asyncio.create_task(stubborn())
        await asyncio.sleep(0)
        await asyncio.wait_for(cancelled(task), 50)
        assert task.cancelled()

    asyncio.run(test())


def test_scripts_that_the_server_has_forgotten_are_loaded_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(links, "_ANSWER_S", 60.0)  # the server is not lost because the machine is busy

    async def test() -> None:
        link = Link(server.url)
        await link.start()
        await until(lambda: link.unavailable is None)
        with server.client() as client:
            client.script_flush()
        said, orders = await link.call("look")
        assert (said, orders) == ([], [])
        assert link.times_found == 1
        # without its arguments: refused, which is no reason to give the server up
        with pytest.raises(Unavailable, match="failed"):
            await link.call("beat")
        assert link.unavailable is None
        await link.close()
        with pytest.raises(Unavailable, match="it is closed"):
            await link.call("look")

    with queue(tmp_path) as server:
        uvloop.run(test())
