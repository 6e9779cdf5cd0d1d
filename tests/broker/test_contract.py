"""What every broker promises: the same tests for the local one and for queues on Valkey and Redis."""

import asyncio
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from tests.broker.conftest import ENDLESS
from tests.broker.rigs import Rig, busy, ready, run, until
from tests.redis_server import PROGRAMS, queue

from pushforward.broker.base import ATTEMPTS
from pushforward.engine.request import Status
from pushforward.errors import InvalidModel, NotFound, PushforwardError, Unavailable
from pushforward.loading import default_chunk, load_model, run_chunk
from pushforward.messages import Setup

FAR = {"rows": np.array([[0.5, 0.5], [1e9, 0.0]]), "precision": "float32"}


@pytest.fixture(scope="module", params=["local", *PROGRAMS])
def program(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    if request.param == "local":
        yield None
    else:
        with queue(tmp_path_factory.mktemp("queue"), request.param) as server:
            yield server


@pytest.fixture
def server(program: Any) -> str | None:
    """Where the queue is, empty; None for the local broker."""
    if program is None:
        return None
    with program.client() as client:
        client.flushall()
    return str(program.url)


def test_a_chunk_is_answered_as_the_engine_answers_it(server: str | None, setup: Setup, work: Any) -> None:
    async def test(rig: Rig) -> None:
        broker = rig.broker
        result = await broker.submit(work("a"))
        model = load_model(Path(setup.store) / "moons" / "1")
        solver = model.manifest.solver.model_copy(update={"rtol": 1e-5, "atol": 1e-5, "logp_atol": 1e-5})
        expected = run_chunk(model, default_chunk(solver, work("a").rows, None))
        assert result.id == "a"
        for name in ("value", "log_density", "error_estimate", "steps", "accepted", "nfe", "status", "t"):
            np.testing.assert_array_equal(getattr(result, name), getattr(expected, name))
        assert result.solve_s > 0

    run(test, setup, server)


def test_what_cannot_be_begun_is_an_error_and_the_rest_goes_on(
    server: str | None, setup: Setup, work: Any
) -> None:
    async def test(rig: Rig) -> None:
        broker = rig.broker
        sound = asyncio.create_task(broker.submit(work("sound", 100)))
        with pytest.raises(NotFound, match="'pear'"):
            await broker.submit(work("unknown", model="pear"))
        with pytest.raises(InvalidModel, match="float128"):
            await broker.submit(work("odd", precision="float128"))
        assert (await sound).status.tolist() == [Status.OK] * 100

    run(test, setup, server)


def test_it_is_unavailable_until_the_models_are_loaded_and_when_it_drains(
    server: str | None, setup: Setup, work: Any
) -> None:
    async def test(rig: Rig) -> None:
        broker = rig.broker
        assert broker.unavailable() is not None
        await broker.submit(work("a"))
        await ready(broker)
        assert {key: news.state for key, news in broker.models().items()} == {("moons", 1): "ready"}
        broker.drain()
        assert broker.unavailable() == "The server is shutting down."
        assert (await broker.submit(work("late"))).status.tolist() == [Status.OK] * 3

    run(test, setup, server)


def test_a_poisonous_chunk_convicts_itself_and_nothing_else(
    server: str | None, poisoned: Setup, work: Any
) -> None:
    async def test(rig: Rig) -> None:
        broker = rig.broker
        await ready(broker)
        expected = await broker.submit(work("before", 20))
        poison = asyncio.create_task(broker.submit(work("poison", **FAR)))
        others = [asyncio.create_task(broker.submit(work(f"{n}", 20))) for n in range(10)]
        for result in await asyncio.gather(*others):
            assert result.log_density.tobytes() == expected.log_density.tobytes()
        with pytest.raises(PushforwardError, match=f"lost {ATTEMPTS} times.*with nothing else") as caught:
            await poison
        assert caught.value.detail["attempts"] == ATTEMPTS
        assert caught.value.detail["rows"] == 2
        assert (await broker.submit(work("after"))).status.tolist() == [Status.OK] * 3

    run(test, poisoned, server, stall_s=1.0)


def test_a_cancelled_call_frees_the_worker(server: str | None, setup: Setup, work: Any) -> None:
    async def test(rig: Rig) -> None:
        broker = rig.broker
        await broker.submit(work("warm"))
        task = asyncio.create_task(broker.submit(work("endless", **ENDLESS)))
        await busy(rig.collector)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        # Were its rows still there, this chunk would wait for their slots.
        result = await broker.submit(work("next", 64))
        assert result.status.tolist() == [Status.OK] * 64

    run(test, setup, server)


def test_a_deadline_that_a_stuck_worker_ignores_is_kept_for_it(
    server: str | None, setup: Setup, work: Any
) -> None:
    async def test(rig: Rig) -> None:
        broker = rig.broker
        await ready(broker)
        (worker,) = rig.local.workers
        os.kill(worker, signal.SIGSTOP)
        with pytest.raises(TimeoutError):
            await broker.submit(work("a", deadline=1.0))
        os.kill(worker, signal.SIGCONT)

    run(test, setup, server, stall_s=600)


def test_versions_are_loaded_on_demand_and_by_order(server: str | None, setup: Setup, work: Any) -> None:
    async def test(rig: Rig) -> None:
        broker = rig.broker

        def state(model: str) -> str | None:
            news = broker.models().get((model, 1))
            return None if news is None else news.state

        await ready(broker)
        wine = work("wine", model="wine", rows=np.zeros((2, 13)))
        assert (await broker.submit(wine)).status.tolist() == [Status.OK] * 2
        await until(lambda: state("wine") == "ready")
        broker.load("pinwheel", 1)
        await until(lambda: state("pinwheel") == "ready")
        broker.unload("pinwheel", 1)
        await until(lambda: state("pinwheel") == "unloaded")

        async def gone() -> None:
            for number in range(100_000):  # chunks that come while it is still there are solved
                await broker.submit(work(f"pinwheel {number}", model="pinwheel"))

        with pytest.raises(PushforwardError, match="unloaded"):
            await gone()
        os.kill(rig.local.workers[0], signal.SIGKILL)  # orders hold for those who come later
        with pytest.raises(PushforwardError, match="unloaded"):
            await broker.submit(work("again", model="pinwheel"))

    run(test, setup, server)


def test_a_new_version_is_noticed_and_a_broken_one_is_told(
    server: str | None, setup: Setup, work: Any, own_store: Path
) -> None:
    async def test(rig: Rig) -> None:
        broker = rig.broker
        await ready(broker)
        for version, sound in ((2, True), (3, False)):
            folder = own_store / "moons" / ".new"
            shutil.copytree(own_store / "moons" / "1", folder)
            manifest = (folder / "manifest.json").read_text().replace('"version": 1', f'"version": {version}')
            (folder / "manifest.json").write_text(manifest)
            if not sound:
                (folder / "golden.safetensors").write_bytes(b"")
            folder.rename(own_store / "moons" / str(version))
            await until(lambda version=version: ("moons", version) in broker.models())
        await until(lambda: broker.models()["moons", 3].state == "failed")
        assert "golden.safetensors" in broker.models()["moons", 3].reason
        assert (await broker.submit(work("a", version=2))).status.tolist() == [Status.OK] * 3

    changed = msgspec.structs.replace(setup, store=str(own_store), versions="all")
    run(test, changed, server)


def test_several_workers_share_the_chunks_of_a_request(server: str | None, setup: Setup, work: Any) -> None:
    async def test(rig: Rig) -> None:
        await ready(rig.broker)
        answers = await asyncio.gather(*(rig.broker.submit(work(f"{n}", 30)) for n in range(8)))
        assert [answer.id for answer in answers] == [str(n) for n in range(8)]
        assert len({answer.log_density.tobytes() for answer in answers}) == 1

    run(test, setup, server, workers=2)


def test_bulk_chunks_and_interactive_ones_are_all_answered(
    server: str | None, setup: Setup, work: Any
) -> None:
    async def test(rig: Rig) -> None:
        await ready(rig.broker)
        works = [work(f"{n}", 10 + n, bulk=n % 2 == 0, request=str(n % 3)) for n in range(24)]
        answers = await asyncio.gather(*map(rig.broker.submit, works))
        assert [len(answer.status) for answer in answers] == [10 + n for n in range(24)]
        assert all((answer.status == Status.OK).all() for answer in answers)

    run(test, setup, server)


def test_closing_fails_what_is_in_flight(server: str | None, setup: Setup, work: Any) -> None:
    async def test(rig: Rig) -> None:
        await ready(rig.broker)
        task = asyncio.create_task(rig.broker.submit(work("cut", **ENDLESS)))
        await busy(rig.collector)
        await rig.broker.close()
        with pytest.raises(Unavailable, match="shutting down"):
            await task

    run(test, setup, server)
