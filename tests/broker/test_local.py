"""The local broker with real worker processes: answers, deaths, cancellations, ends."""

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pushforward.broker.local import LocalBroker
from pushforward.engine.request import Status
from pushforward.errors import InvalidModel, NotFound, PushforwardError, Unavailable
from pushforward.loading import default_chunk, load_model, run_chunk
from pushforward.messages import Setup

LONG = {"rows": 500, "rtol": 1e-11, "atol": 1e-11, "logp_atol": 1e-11}
Test = Callable[[LocalBroker], Awaitable[None]]


def with_broker(setup: Setup, test: Test) -> None:
    async def run() -> None:
        broker = LocalBroker(setup)
        await broker.start()
        try:
            await asyncio.wait_for(test(broker), 120)
        finally:
            await broker.close()

    asyncio.run(run())


async def until(condition: Callable[[], bool]) -> None:
    for _ in range(6000):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise TimeoutError


def pid(broker: LocalBroker) -> int:
    assert broker.worker is not None
    return broker.worker


def test_a_chunk_is_answered_as_the_engine_answers_it(setup: Setup, work: Any, store: Path) -> None:
    async def test(broker: LocalBroker) -> None:
        result = await broker.submit(work("a", precision="float32"))
        model = load_model(store / "pair" / "1")
        solver = model.manifest.solver.model_copy(update={"rtol": 1e-5, "atol": 1e-5, "logp_atol": 1e-5})
        expected = run_chunk(model, default_chunk(solver, work("a").rows, None))
        assert result.id == "a"
        for name in ("value", "log_density", "error_estimate", "steps", "accepted", "nfe", "status", "t"):
            np.testing.assert_array_equal(getattr(result, name), getattr(expected, name))

    with_broker(setup, test)


def test_what_cannot_be_begun_is_an_error_and_the_rest_goes_on(setup: Setup, work: Any) -> None:
    async def test(broker: LocalBroker) -> None:
        sound = asyncio.create_task(broker.submit(work("sound", 300)))
        with pytest.raises(NotFound, match="'pear'"):
            await broker.submit(work("unknown", model="pear"))
        with pytest.raises(InvalidModel, match="float128"):
            await broker.submit(work("odd", precision="float128"))
        assert (await sound).status.tolist() == [Status.OK] * 300

    with_broker(setup, test)


def test_it_is_unavailable_until_the_models_are_loaded(setup: Setup, work: Any) -> None:
    async def test(broker: LocalBroker) -> None:
        assert broker.unavailable() == "The worker is starting."
        await broker.submit(work("a"))
        assert broker.unavailable() is None

    with_broker(setup, test)


def test_a_worker_that_dies_is_replaced_and_its_chunks_run_again(setup: Setup, work: Any) -> None:
    async def test(broker: LocalBroker) -> None:
        expected = await broker.submit(work("before", **LONG))
        tasks = [asyncio.create_task(broker.submit(work(f"during{n}", **LONG))) for n in range(3)]
        await asyncio.sleep(0.05)
        first = pid(broker)
        os.kill(first, signal.SIGSEGV)
        for result in await asyncio.gather(*tasks):
            assert result.log_density.tobytes() == expected.log_density.tobytes()
        assert pid(broker) != first

    with_broker(setup, test)


def test_a_chunk_is_handed_out_twice_at_most(setup: Setup, work: Any) -> None:
    async def test(broker: LocalBroker) -> None:
        task = asyncio.create_task(broker.submit(work("poison", **LONG)))
        for _ in range(2):
            await broker.ready.wait()
            await asyncio.sleep(0.05)
            os.kill(pid(broker), signal.SIGKILL)
            await until(lambda: not broker.ready.is_set())
        with pytest.raises(PushforwardError, match="died 2 times") as caught:
            await task
        assert caught.value.detail == {"attempts": 2, "exit": -9}
        assert (await broker.submit(work("after"))).status.tolist() == [Status.OK] * 3

    with_broker(setup, test)


def test_a_worker_that_cannot_start_is_an_error_not_a_wait(work: Any, tmp_path: Path) -> None:
    setup = Setup(str(tmp_path), [], slots=0, log_level="no such level", log_format="text")

    async def test(broker: LocalBroker) -> None:
        with pytest.raises(PushforwardError, match="died 2 times"):
            await broker.submit(work("a"))

    with_broker(setup, test)


def test_a_cancelled_call_frees_the_worker(setup: Setup, work: Any) -> None:
    async def test(broker: LocalBroker) -> None:
        await broker.submit(work("warm"))
        endless = work("endless", 60_000, rtol=1e-13, atol=1e-13, logp_atol=1e-13)
        task = asyncio.create_task(broker.submit(endless))
        await asyncio.sleep(0.2)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        # Were its rows still there, this chunk would share the slots with them for minutes.
        result = await broker.submit(work("next", 64))
        assert result.status.tolist() == [Status.OK] * 64
        assert not broker.in_flight

    with_broker(setup, test)


def test_closing_fails_what_is_in_flight_and_ends_the_worker(setup: Setup, work: Any) -> None:
    async def run() -> None:
        broker = LocalBroker(setup)
        await broker.start()
        await broker.submit(work("warm"))
        task = asyncio.create_task(broker.submit(work("cut", **LONG)))
        await asyncio.sleep(0.05)
        worker = pid(broker)
        await broker.close()
        with pytest.raises(Unavailable, match="shutting down"):
            await task
        with pytest.raises(ProcessLookupError):
            os.kill(worker, 0)

    asyncio.run(run())


def test_a_worker_may_be_started_before_there_is_an_event_loop(setup: Setup, work: Any) -> None:
    broker = LocalBroker(setup)
    broker.spawn()
    first = pid(broker)

    async def run() -> None:
        await broker.start()
        await broker.submit(work("a"))
        assert pid(broker) == first
        await broker.close()

    asyncio.run(run())
