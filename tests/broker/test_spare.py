"""What an API process has in hand of the limits: no call for every request, and never too much in all."""

import asyncio
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from tests.broker.rigs import Held, until
from tests.redis_server import Queue, queue

from pushforward.broker.redis.front import RedisBroker
from pushforward.errors import Unavailable

LIMIT = 2560
SPARE = 10


class Asking:
    """An API process: what it holds, and its end of the queue."""

    def __init__(self, server: Queue) -> None:
        self.held = Held(max_rows=LIMIT, max_bytes=1 << 30)
        self.broker = RedisBroker(server.url, self.held)

    async def admit(self, rows: int) -> None:
        self.held.rows += rows
        try:
            await self.broker.admit(rows, 0)
        except Unavailable:
            self.held.rows -= rows
            raise


@asynccontextmanager
async def asking(server: Queue) -> AsyncIterator[Asking]:
    made = Asking(server)
    await made.broker.start()
    await until(lambda: made.broker.rows >= SPARE)
    try:
        yield made
    finally:
        await made.broker.close()


def test_what_is_in_hand_is_admitted_without_asking(tmp_path: Path) -> None:
    async def test(server: Queue) -> None:
        async with asking(server) as one:
            await until(lambda: one.broker._granted.covers(SPARE, 0))  # nothing is being asked just now
            server.signal(signal.SIGSTOP)
            await one.admit(SPARE)
            with pytest.raises((Unavailable, TimeoutError)):
                await asyncio.wait_for(one.admit(1), 0.5)
            server.signal(signal.SIGCONT)

    with queue(tmp_path) as server:
        asyncio.run(test(server))


def test_what_one_has_in_hand_another_cannot_have(tmp_path: Path) -> None:
    async def test(server: Queue) -> None:
        async with asking(server) as one, asking(server) as two:
            with pytest.raises(Unavailable, match="The queue is full"):
                await two.admit(LIMIT - SPARE + 1)
            await two.admit(LIMIT - SPARE)
            await one.admit(SPARE)
            with pytest.raises(Unavailable, match="The queue is full"):
                await one.admit(1)
            two.held.rows -= 1  # and one that has left is there for anyone
            await until(lambda: two.broker.rows == LIMIT - 1)
            await one.admit(1)
            assert one.broker.rows == LIMIT

    with queue(tmp_path) as server:
        asyncio.run(test(server))
