"""The local broker with real worker processes: answers, deaths, stalls, poison, cancellations, ends."""

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
import numpy as np
import pytest

from pushforward.broker.local import LocalBroker
from pushforward.engine.request import Status
from pushforward.errors import Unavailable
from pushforward.messages import Setup

LONG = {"rows": 60, "rtol": 1e-9, "atol": 1e-9, "logp_atol": 1e-9}
ENDLESS = {"rows": 8_000, "rtol": 1e-13, "atol": 1e-13, "logp_atol": 1e-13, "max_steps": 1_000_000}
FAR = {"rows": np.array([[0.5, 0.5], [1e9, 0.0]]), "precision": "float32"}
Test = Callable[[LocalBroker], Awaitable[None]]


def with_broker(setup: Setup, test: Test, workers: int = 1, **options: Any) -> None:
    async def run() -> None:
        broker = LocalBroker([setup] * workers, **options)
        await broker.start()
        try:
            await asyncio.wait_for(test(broker), 120)
        finally:
            await broker.close()
        assert not broker.in_flight

    asyncio.run(run())


async def until(condition: Callable[[], bool]) -> None:
    for _ in range(6000):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise TimeoutError


async def ready(broker: LocalBroker, workers: int = 1) -> None:
    await until(lambda: broker.unavailable() is None and len(broker.workers) == workers)


async def gone(broker: LocalBroker, pid: int) -> None:
    await until(lambda: pid not in broker.workers)


def test_workers_share_the_chunks(setup: Setup, work: Any) -> None:
    async def test(broker: LocalBroker) -> None:
        await ready(broker, 2)
        await until(lambda: all(holder.ready for holder in broker._leases.holders))
        tasks = [asyncio.create_task(broker.submit(work(f"{n}", **LONG))) for n in range(4)]
        await asyncio.sleep(0)
        assert [len(holder.leases) for holder in broker._leases.holders] == [2, 2]
        answers = await asyncio.gather(*tasks)
        assert len({answer.log_density.tobytes() for answer in answers}) == 1

    with_broker(setup, test, workers=2)


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("workers", [1, 2])
def test_a_worker_that_is_lost_is_replaced_and_its_chunks_run_again(
    setup: Setup, work: Any, number: signal.Signals, workers: int
) -> None:
    async def test(broker: LocalBroker) -> None:
        await ready(broker, workers)
        expected = await broker.submit(work("before", **LONG))
        tasks = [asyncio.create_task(broker.submit(work(f"during{n}", **LONG))) for n in range(4)]
        await asyncio.sleep(0.05)
        first = broker.workers[0]
        os.kill(first, number)
        for result in await asyncio.gather(*tasks):
            assert result.log_density.tobytes() == expected.log_density.tobytes()
        await gone(broker, first)
        await ready(broker, workers)
        with pytest.raises(ProcessLookupError):
            os.kill(first, 0)

    with_broker(setup, test, workers=workers, stall_s=0.5)


def test_an_idle_worker_that_is_stuck_is_found_before_a_request_finds_it(setup: Setup, work: Any) -> None:
    async def test(broker: LocalBroker) -> None:
        await ready(broker)
        first = broker.workers[0]
        os.kill(first, signal.SIGSTOP)
        await gone(broker, first)
        assert (await broker.submit(work("a"))).status.tolist() == [Status.OK] * 3

    with_broker(setup, test, stall_s=0.5)


def test_a_worker_that_is_busy_for_long_is_not_taken_for_stuck(setup: Setup, work: Any) -> None:
    async def test(broker: LocalBroker) -> None:
        await ready(broker)
        first = broker.workers
        task = asyncio.create_task(broker.submit(work("long", **ENDLESS)))
        await asyncio.sleep(2)
        assert not task.done()
        assert broker.workers == first
        assert broker.unavailable() is None
        task.cancel()

    with_broker(setup, test, stall_s=0.5)


def test_a_worker_that_cannot_start_is_told_and_no_work_is_lost_on_it(setup: Setup) -> None:
    broken = msgspec.structs.replace(setup, log_level="no such level")

    async def test(broker: LocalBroker) -> None:
        await until(lambda: broker.unavailable() == "The workers died and are being replaced.")

    with_broker(broken, test)


def test_closing_fails_what_is_in_flight_and_ends_the_workers(setup: Setup, work: Any) -> None:
    async def run() -> None:
        broker = LocalBroker([setup] * 2)
        await broker.start()
        await ready(broker, 2)
        task = asyncio.create_task(broker.submit(work("cut", **LONG)))
        await asyncio.sleep(0.05)
        workers = broker.workers
        await broker.close()
        with pytest.raises(Unavailable, match="shutting down"):
            await task
        for worker in workers:
            with pytest.raises(ProcessLookupError):
                os.kill(worker, 0)

    asyncio.run(run())


def test_workers_may_be_started_before_there_is_an_event_loop(setup: Setup, work: Any) -> None:
    broker = LocalBroker([setup])
    broker.spawn()
    first = broker.workers

    async def run() -> None:
        await broker.start()
        await broker.submit(work("a"))
        assert broker.workers == first
        await broker.close()

    asyncio.run(run())
