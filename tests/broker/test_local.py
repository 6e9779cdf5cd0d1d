"""The local broker with real worker processes: answers, deaths, stalls, poison, cancellations, ends."""

import asyncio
import contextlib
import hashlib
import json
import os
import random
import signal
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import uvloop
from safetensors.numpy import load_file, save
from tests.broker.conftest import setup_for
from tests.poison import rot

from pushforward.broker.local import LocalBroker
from pushforward.engine.request import Status
from pushforward.errors import Unavailable
from pushforward.messages import Setup
from pushforward.metrics import EngineCollector

LONG = {"rows": 60, "rtol": 1e-9, "atol": 1e-9, "logp_atol": 1e-9}
ENDLESS = {"rows": 8_000, "rtol": 1e-13, "atol": 1e-13, "logp_atol": 1e-13, "max_steps": 1_000_000}
FAR = {"rows": np.array([[0.5, 0.5], [1e9, 0.0]]), "precision": "float32"}
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
    told = EngineCollector()

    async def test(broker: LocalBroker) -> None:
        await ready(broker)
        first = broker.workers[0]
        os.kill(first, signal.SIGSTOP)
        await gone(broker, first)
        assert (await broker.submit(work("a"))).status.tolist() == [Status.OK] * 3

    with_broker(setup, test, stall_s=0.5, collector=told)
    assert told.restarts == {"stuck": 1}


def test_an_idle_worker_whose_weights_have_changed_is_replaced_before_a_request_meets_them(
    setup: Setup, work: Any
) -> None:
    told = EngineCollector()

    async def test(broker: LocalBroker) -> None:
        await ready(broker)
        expected = await broker.submit(work("before", precision="float32"))
        first = broker.workers[0]
        assert rot(first, Path(setup.store) / "moons" / "1")
        await gone(broker, first)
        result = await broker.submit(work("after", precision="float32"))
        assert result.log_density.tobytes() == expected.log_density.tobytes()

    with_broker(setup, test, stall_s=0.5, collector=told)
    assert told.restarts == {"unsound": 1}


def test_an_idle_worker_that_is_sound_stays(setup: Setup) -> None:
    told = EngineCollector()

    async def test(broker: LocalBroker) -> None:
        await ready(broker)
        steps: set[int] = set()
        while len(steps) < 4:  # some proofs
            steps |= {beat.steps for beat in told._now.values()}
            await asyncio.sleep(0.05)

    with_broker(setup, test, stall_s=0.2, collector=told)
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
        for _ in range(2):
            await asyncio.sleep(0.5)
            time.sleep(4)  # noqa: ASYNC251 — that is the point
        await asyncio.sleep(0.5)
        assert not task.done()
        task.cancel()

    with_broker(setup, test, stall_s=2.0, collector=told, run=uvloop.run)  # which looks at its timers first
    assert not told.restarts


def test_a_version_that_takes_long_to_load_is_waited_for(own_store: Path, work: Any) -> None:
    folder = own_store / "moons" / "1"
    golden = load_file(folder / "golden.safetensors")
    content = save({name: np.tile(rows, (100,) + (1,) * (rows.ndim - 1)) for name, rows in golden.items()})
    (folder / "golden.safetensors").write_bytes(content)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["golden.safetensors"] = {
        "sha256": hashlib.sha256(content).hexdigest(),
        "bytes": len(content),
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    told = EngineCollector()

    async def test(broker: LocalBroker) -> None:
        await ready(broker)
        assert (await broker.submit(work("patient"))).status.tolist() == [Status.OK] * 3
        assert broker.models()["moons", 1].seconds > 1.0

    with_broker(setup_for(own_store, load="first-use"), test, stall_s=0.5, collector=told)
    assert not told.restarts


def test_a_worker_that_is_busy_for_long_is_not_taken_for_stuck(setup: Setup, work: Any) -> None:
    async def test(broker: LocalBroker) -> None:
        await ready(broker)
        first = broker.workers
        task = asyncio.create_task(broker.submit(work("long", **ENDLESS)))
        await asyncio.sleep(3)
        assert not task.done()
        assert broker.workers == first
        assert broker.unavailable() is None
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
        expected = await broker.submit(work("before", 20))
        files = [len(os.listdir(f"/proc/{pid}/fd")) for pid in (os.getpid(), *broker.workers)]

        async def ask(number: int) -> bool:
            try:
                async with asyncio.timeout(draw.choice([None, 0, 0.001, 0.01, 0.1])):
                    result = await broker.submit(work(f"{number}", 20, bulk=bulk))
            except TimeoutError:
                return False
            assert result.log_density.tobytes() == expected.log_density.tobytes()
            return True

        for wave in range(4):
            asking = [asyncio.create_task(ask(100 * wave + number)) for number in range(100)]
            await asyncio.sleep(draw.uniform(0, 0.05))
            os.kill(draw.choice(broker.workers), signal.SIGKILL)
            answered = await asyncio.gather(*asking)
            assert 0 < sum(answered) < 100
            assert (broker.in_flight, broker._answers) == (0, {})
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

    with_broker(setup, test, workers=2, stall_s=1.0, collector=told)
    assert told.restarts == {"died": 4}


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
        await until(lambda: len(broker.workers) == 2)
        workers = broker.workers
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
