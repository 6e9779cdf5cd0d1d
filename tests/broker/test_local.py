"""The local broker with real worker processes: answers, deaths, stalls, poison, cancellations, ends."""

import asyncio
import contextlib
import itertools
import os
import random
import signal
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import uvloop
from tests.broker.conftest import ENDLESS
from tests.broker.rigs import busy, until
from tests.poison import rot

from pushforward.broker.local import LocalBroker
from pushforward.engine.request import Status
from pushforward.errors import Unavailable
from pushforward.messages import Setup
from pushforward.metrics import EngineCollector
from pushforward.store.cache import locked
from pushforward.store.opening import opened

Test = Callable[[LocalBroker], Awaitable[None]]


def with_broker(
    setup: Setup, test: Test, workers: int = 1, run: Callable[..., Any] = asyncio.run, **options: Any
) -> None:
    async def whole() -> None:
        broker = LocalBroker([setup] * workers, **options)
        await broker.start()
        try:
            await asyncio.wait_for(test(broker), 120)
        finally:
            await broker.close()
        assert not broker.in_flight

    run(whole())


async def ready(broker: LocalBroker, workers: int = 1) -> None:
    await until(lambda: broker.unavailable() is None and len(broker.workers) == workers)


async def gone(broker: LocalBroker, pid: int) -> None:
    await until(lambda: pid not in broker.workers)


def test_workers_share_the_chunks(setup: Setup, work: Any) -> None:
    async def test(broker: LocalBroker) -> None:
        await ready(broker, 2)
        await until(lambda: all(holder.ready for holder in broker._leases.holders))
        tasks = [asyncio.create_task(broker.submit(work(f"{n}", 30))) for n in range(4)]
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
    told = EngineCollector()

    async def test(broker: LocalBroker) -> None:
        await ready(broker, workers)
        await until(lambda: all(holder.ready for holder in broker._leases.holders))
        expected = await broker.submit(work("before", 30))
        # bulk rows, which make way for others: the worker is in the middle of them whenever it is lost
        bulk = [work(f"bulk{n}", bulk=True, **ENDLESS) for n in range(workers)]
        company = [asyncio.create_task(broker.submit(each)) for each in bulk]
        await busy(told, workers)
        tasks = [asyncio.create_task(broker.submit(work(f"during{n}", 30))) for n in range(4)]
        await asyncio.sleep(0)  # they are handed out
        first = broker.workers[0]
        os.kill(first, number)
        for result in await asyncio.gather(*tasks):
            assert result.log_density.tobytes() == expected.log_density.tobytes()
        await gone(broker, first)
        await ready(broker, workers)
        assert told.redeliveries >= 1 + 4 // workers
        for task in company:
            task.cancel()
        with pytest.raises(ProcessLookupError):
            os.kill(first, 0)

    stall_s = 2.0 if number == signal.SIGSTOP else 600.0
    with_broker(setup, test, workers=workers, stall_s=stall_s, collector=told)


def test_an_idle_worker_that_is_stuck_is_found_before_a_request_finds_it(setup: Setup, work: Any) -> None:
    told = EngineCollector()

    async def test(broker: LocalBroker) -> None:
        await ready(broker)
        first = broker.workers[0]
        os.kill(first, signal.SIGSTOP)
        await gone(broker, first)
        assert (await broker.submit(work("a"))).status.tolist() == [Status.OK] * 3

    with_broker(setup, test, stall_s=1.0, collector=told)
    assert told.restarts == {"stuck": 1}


def test_an_idle_worker_whose_weights_have_changed_is_replaced_before_a_request_meets_them(
    setup: Setup, work: Any
) -> None:
    told = EngineCollector()

    async def test(broker: LocalBroker) -> None:
        await ready(broker)
        expected = await broker.submit(work("before"))
        first = broker.workers[0]
        assert rot(first, Path(setup.store) / "moons" / "1")
        await gone(broker, first)
        result = await broker.submit(work("after"))
        assert result.log_density.tobytes() == expected.log_density.tobytes()

    with_broker(setup, test, stall_s=1.0, collector=told)
    assert told.restarts == {"unsound": 1}


def test_an_idle_worker_that_is_sound_stays(setup: Setup) -> None:
    told = EngineCollector()

    async def test(broker: LocalBroker) -> None:
        await ready(broker)
        steps: set[int] = set()
        while len(steps) < 3:  # some proofs
            steps |= {beat.steps for beat in told._now.values()}
            await asyncio.sleep(0.05)

    with_broker(setup, test, stall_s=1.0, collector=told)
    assert not told.restarts


def test_a_stuck_worker_is_found_though_no_chunk_is_waited_for_as_long_as_that(
    setup: Setup, work: Any
) -> None:
    told = EngineCollector()

    async def test(broker: LocalBroker) -> None:
        await ready(broker)
        first = broker.workers[0]
        os.kill(first, signal.SIGSTOP)
        for number in range(200):
            if first not in broker.workers:
                break
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(broker.submit(work(f"short {number}")), 0.2)
        assert first not in broker.workers

    with_broker(setup, test, stall_s=1.0, collector=told)
    assert told.restarts == {"stuck": 1}


def test_workers_are_not_blamed_for_the_time_that_this_process_was_held_up(setup: Setup, work: Any) -> None:
    told = EngineCollector()

    async def test(broker: LocalBroker) -> None:
        await ready(broker)
        task = asyncio.create_task(broker.submit(work("long", **ENDLESS)))
        await busy(told)
        for _ in range(2):
            await asyncio.sleep(0.5)
            time.sleep(2)  # noqa: ASYNC251 — that is the point
        await asyncio.sleep(0.5)
        assert not task.done()
        task.cancel()

    with_broker(setup, test, stall_s=1.0, collector=told, run=uvloop.run)  # which looks at its timers first
    assert not told.restarts


def test_a_version_that_takes_long_to_load_is_waited_for(setup: Setup, work: Any, tmp_path: Path) -> None:
    told = EngineCollector()
    url, cache = f"file://{setup.store}", tmp_path / "cache"
    mirror = opened(url, cache, 100)

    async def test(broker: LocalBroker) -> None:
        await ready(broker)
        with locked(mirror.root, "moons@1"):  # as if somebody else were fetching it
            task = asyncio.create_task(broker.submit(work("patient")))
            await asyncio.sleep(3)
            assert not task.done()
        assert (await task).status.tolist() == [Status.OK] * 3

    fetching = msgspec.structs.replace(setup, store=url, cache=str(cache), load="first-use")
    with_broker(fetching, test, stall_s=1.0, collector=told)
    assert not told.restarts


def test_a_worker_that_is_busy_for_long_is_not_taken_for_stuck(setup: Setup, work: Any) -> None:
    async def test(broker: LocalBroker) -> None:
        await ready(broker)
        first = broker.workers
        task = asyncio.create_task(broker.submit(work("long", **ENDLESS)))
        await asyncio.sleep(3)
        assert not task.done()
        assert broker.workers == first
        await until(lambda: broker.unavailable() is None)
        task.cancel()

    with_broker(setup, test, stall_s=1.0)


def test_a_worker_that_cannot_start_is_told_and_no_work_is_lost_on_it(setup: Setup) -> None:
    broken = msgspec.structs.replace(setup, log_level="no such level")

    async def test(broker: LocalBroker) -> None:
        await until(lambda: broker.unavailable() == "The workers died and are being replaced.")

    with_broker(broken, test)


def test_a_deadline_that_passes_in_the_queue_is_kept(setup: Setup, work: Any) -> None:
    never_ready = msgspec.structs.replace(setup, log_level="no such level")

    async def test(broker: LocalBroker) -> None:
        with pytest.raises(TimeoutError):
            await broker.submit(work("a", deadline=time.time()))
        assert not broker.in_flight

    with_broker(never_ready, test)


@pytest.mark.parametrize("bulk", [False, True])
def test_a_storm_of_cancels_leaves_nothing_behind_though_workers_die_in_it(
    setup: Setup, work: Any, bulk: bool
) -> None:
    draw = random.Random(bulk)
    told = EngineCollector()

    async def test(broker: LocalBroker) -> None:
        await ready(broker, 2)
        await until(lambda: all(holder.ready for holder in broker._leases.holders))
        expected = await broker.submit(work("before", 10))
        files = [len(os.listdir(f"/proc/{pid}/fd")) for pid in (os.getpid(), *broker.workers)]

        async def ask(number: int) -> bool:
            try:
                async with asyncio.timeout(draw.choice([None, 0, 0.001, 0.01, 0.1])):
                    result = await broker.submit(work(f"{number}", 10, bulk=bulk))
            except TimeoutError:
                return False
            assert result.log_density.tobytes() == expected.log_density.tobytes()
            return True

        for wave in range(4):
            asking = [asyncio.create_task(ask(100 * wave + number)) for number in range(100)]
            for ending in itertools.islice(asyncio.as_completed(asking), draw.randrange(90)):
                await ending
            victim = draw.choice(broker.workers)
            os.kill(victim, signal.SIGKILL)
            answered = await asyncio.gather(*asking)
            assert 0 < sum(answered) < 100
            assert (broker.in_flight, broker._answers) == (0, {})
            await gone(broker, victim)
            await ready(broker, 2)
        await until(lambda: len(broker._leases.holders) == 2)
        await until(lambda: all(holder.ready for holder in broker._leases.holders))
        leases = broker._leases
        assert not any(holder.rows or holder.bulk_rows or holder.reserved for holder in leases.holders)
        assert not any((leases._interactive, leases._bulk, leases._quarantine))
        await until(
            lambda: len(told._now) == 2 and not any(b.running or b.waiting for b in told._now.values())
        )
        assert files == [len(os.listdir(f"/proc/{pid}/fd")) for pid in (os.getpid(), *broker.workers)]

    with_broker(setup, test, workers=2, stall_s=600.0, collector=told)
    assert told.restarts == {"died": 4}


def test_closing_fails_what_is_in_flight_and_ends_the_workers(setup: Setup, work: Any) -> None:
    async def run() -> None:
        told = EngineCollector()
        broker = LocalBroker([setup] * 2, collector=told)
        await broker.start()
        await ready(broker, 2)
        task = asyncio.create_task(broker.submit(work("cut", **ENDLESS)))
        await busy(told)
        workers = broker.workers
        await broker.close()
        with pytest.raises(Unavailable, match="shutting down"):
            await task
        with pytest.raises(Unavailable, match="shutting down"):
            await broker.submit(work("too late"))
        for worker in workers:
            with pytest.raises(ProcessLookupError):
                os.kill(worker, 0)

    asyncio.run(run())


def test_closing_while_workers_start_ends_them_and_fails_what_waits_for_them(setup: Setup, work: Any) -> None:
    async def run() -> None:
        broker = LocalBroker([setup] * 2)
        await broker.start()
        tasks = [asyncio.create_task(broker.submit(work(f"{number}"))) for number in range(3)]
        await asyncio.sleep(0)  # all have begun
        workers = broker.workers
        assert len(workers) == 2
        assert broker.unavailable() == "The workers are starting."
        await broker.close()
        for task in tasks:
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
