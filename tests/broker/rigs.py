"""Both brokers behind one door, each with real worker processes, for the tests that both must pass."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from pushforward.broker.base import Broker
from pushforward.broker.local import LocalBroker
from pushforward.broker.redis.back import Puller
from pushforward.broker.redis.front import RedisBroker
from pushforward.messages import Setup
from pushforward.metrics import EngineCollector

LEASE_S = 60.0  # so long that none runs out because the machine is busy


@dataclass
class Held:
    """What a process that asks holds."""

    rows: int = 0
    nbytes: int = 0
    max_rows: int = 100
    max_bytes: int = 1000

    def rates(self) -> tuple[float, float]:
        return 10.0, 100.0


@dataclass
class Rig:
    broker: Any
    local: LocalBroker
    collector: EngineCollector
    puller: Puller | None = None


Test = Callable[[Rig], Awaitable[None]]


def run(test: Test, setup: Setup, url: str | None, workers: int = 1, **options: Any) -> None:
    """Run a test with a broker: the local one, or the one whose queue is at a URL."""

    async def within() -> None:
        async with rig(setup, url, workers, **options) as made:
            await asyncio.wait_for(test(made), 120)

    asyncio.run(within())


@asynccontextmanager
async def rig(
    setup: Setup, url: str | None, workers: int = 1, lease_s: float = LEASE_S, **options: Any
) -> AsyncIterator[Rig]:
    collector = EngineCollector()
    local = LocalBroker([setup] * workers, collector=collector, **options)
    await local.start()
    if url is None:
        made = Rig(local, local, collector)
    else:
        broker = RedisBroker(url, Held())
        puller = Puller(url, local, 2 * setup.slots * workers, lease_s, collector)
        await broker.start()
        await puller.start()
        made = Rig(broker, local, collector, puller)
    try:
        yield made
    finally:
        if made.puller is not None:
            await made.broker.close()
            await made.puller.drain(0)
        await local.close()
    assert not made.broker.in_flight
    assert not made.local.in_flight


async def until(condition: Callable[[], bool]) -> None:
    for _ in range(6000):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise TimeoutError


async def ready(broker: Broker) -> None:
    await until(lambda: broker.unavailable() is None)


async def busy(collector: EngineCollector, workers: int = 1) -> None:
    """Wait until so many workers have said that rows are in their slots."""
    await until(lambda: sum(bool(beat.running) for beat in collector._now.values()) == workers)
