"""The data plane over a real worker, apart from HTTP."""

import asyncio
import itertools
import shutil
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pushforward.bootstrap import offline
from pushforward.dataplane import Dataplane, Limits, Options, Ticket
from pushforward.engine.request import Kind, Status
from pushforward.errors import DeadlineExceeded, InvalidInput, InvalidModel, LimitExceeded
from pushforward.messages import Result, Work
from pushforward.scoring.calibration import Calibration
from pushforward.settings import Settings
from pushforward.store.catalog import Catalog

DEFAULT = Options()


def with_plane(
    store: Path, test: Callable[[Dataplane], Awaitable[Any]], model: str = "pair", **settings: Any
) -> Any:
    async def run() -> Any:
        async with offline(Settings(store=store, **settings), Catalog(store)) as plane:
            return await asyncio.wait_for(test(plane), 120)

    return asyncio.run(run())


def slow(timeout_ms: int) -> Options:
    """With a deadline that no machine keeps for many rows."""
    tight = {"rtol": 1e-13, "atol": 1e-13, "logp_atol": 1e-13, "precision": "float64", "max_steps": 100_000}
    return Options(**tight, timeout_ms=timeout_ms)


def same(one: Result, other: Result) -> bool:
    names = ("value", "log_density", "error_estimate", "steps", "accepted", "nfe", "status", "t")
    return all(getattr(one, name).tobytes() == getattr(other, name).tobytes() for name in names)


@pytest.mark.parametrize("chunk_rows", [1, 7, 100])
def test_answers_do_not_depend_on_how_requests_are_cut(store: Path, chunk_rows: int) -> None:
    x = np.random.default_rng(0).normal(size=(50, 2))

    async def test(plane: Dataplane) -> list[Result]:
        model = plane.model("pair")
        return [
            await plane.density(model, x, None, DEFAULT),
            await plane.sample(model, 50, 3, None, DEFAULT, density=True),
            *await plane.path(model, Kind.ENCODE, x, [0.0, 0.5], None, DEFAULT),
        ]

    whole = with_plane(store, test, chunk_rows=50)
    cut = with_plane(store, test, chunk_rows=chunk_rows)
    assert all(map(same, whole, cut))


def test_contexts_are_cut_with_their_rows(store: Path) -> None:
    draw = np.random.default_rng(0)
    x, c = draw.normal(size=(20, 2)), draw.normal(size=(20, 1))

    async def test(plane: Dataplane) -> list[Result]:
        model = plane.model("given")
        together = await plane.density(model, x, c, DEFAULT)
        alone = [await plane.density(model, x[[i]], c[[i]], DEFAULT) for i in range(20)]
        assert together.log_density.tolist() == [result.log_density[0] for result in alone]
        return [together, await plane.density(model, x, c[:1], DEFAULT)]

    own, shared = with_plane(store, test, "given", chunk_rows=3)
    assert own.log_density[0] == shared.log_density[0]
    assert own.log_density[1] != shared.log_density[1]


def test_samples_may_be_asked_for_from_any_number_on(store: Path) -> None:
    async def test(plane: Dataplane) -> None:
        model = plane.model("pair")
        whole = await plane.sample(model, 30, 5, None, DEFAULT)
        part = await plane.sample(model, 10, 5, None, DEFAULT, first=20)
        assert part.value.tobytes() == whole.value[20:].tobytes()

    with_plane(store, test)


def test_a_calibration_that_was_edited_gives_no_p_values(store: Path, tmp_path: Path) -> None:
    shutil.copytree(store / "pair" / "1", tmp_path / "pair" / "1")
    kept = Calibration.load(tmp_path / "pair" / "1" / "calibration.safetensors")

    async def test(plane: Dataplane) -> None:
        model = plane.model("pair")
        await plane.density(model, np.zeros((1, 2)), None, DEFAULT)  # the version is loaded: now it is edited
        forged = Calibration(kept.log_density - 100, kept.quantiles, kept.quantile_levels)
        forged.save(tmp_path / "pair" / "1" / "calibration.safetensors")
        with pytest.raises(InvalidModel, match=r"pair/1/calibration.safetensors has been changed"):
            await plane.score(model, np.zeros((1, 2)), None, DEFAULT)

    with_plane(tmp_path, test)


def test_a_deadline_ends_a_request_and_its_rows_leave(store: Path) -> None:
    x = np.random.default_rng(0).normal(size=(20_000, 2))

    async def test(plane: Dataplane) -> None:
        model = plane.model("pair")
        with pytest.raises(DeadlineExceeded) as caught:
            await plane.density(model, x, None, slow(200))
        assert caught.value.detail["rows"] == 20_000
        assert 0 <= caught.value.detail["solved"] < 20_000
        result = await plane.density(model, x[:3], None, DEFAULT)
        assert result.status.tolist() == [Status.OK] * 3

    with_plane(store, test)


def test_limits_and_arguments_are_checked_before_any_work(store: Path) -> None:
    x = np.zeros((2, 2))

    async def test(plane: Dataplane) -> None:
        model = plane.model("pair")
        for call, error, says in (
            (plane.density(model, x[:0], None, DEFAULT), InvalidInput, "no rows"),
            (plane.density(model, x, x[:, :1], DEFAULT), InvalidInput, "takes no context"),
            (plane.sample(model, 0, 1, None, DEFAULT), InvalidInput, "n is 0"),
            (plane.sample(model, 1, -1, None, DEFAULT), InvalidInput, "seed"),
            (plane.path(model, Kind.DECODE, x, [2.0], None, DEFAULT), InvalidInput, r"times\[0\] is 2.0"),
            (plane.score(model, x, None, DEFAULT, alpha=2.0), InvalidInput, "alpha must be between 0 and 1"),
            (plane.density(model, x, None, Options(timeout_ms=2**62 + 1)), LimitExceeded, "timeout_ms"),
        ):
            with pytest.raises(error, match=says):
                await call

    with_plane(store, test)


def test_a_failing_row_has_no_p_value_and_no_flag(store: Path) -> None:
    async def test(plane: Dataplane) -> None:
        model = plane.model("pair")
        x = np.array([[1.2, 0.0], [1e300, 0.0], [50.0, 0.0]])
        for options in ({"alpha": 0.01}, {"fdr": 0.1}):
            scores = await plane.score(model, x, None, DEFAULT, explain=True, **options)
            assert np.isnan(scores.p_value).tolist() == [False, True, False]
            assert scores.is_anomaly.tolist() == [False, False, True]
            assert scores.attributions is not None
            assert np.isnan(scores.attributions[1]).all()

    with_plane(store, test)


def test_many_rows_are_bulk_unless_they_say_otherwise_and_chunks_bear_the_name_of_their_request(
    checkout: Path,
) -> None:
    sent: list[Work] = []

    async def test() -> None:
        settings = Settings(store=checkout / "model_store")
        catalog = Catalog(settings.store)
        async with offline(settings, catalog) as plane:

            class Listening:
                """The broker, listened to."""

                async def submit(self, work: Work) -> Result:
                    sent.append(work)
                    return await plane.broker.submit(work)

                def __getattr__(self, name: str) -> Any:
                    return getattr(plane.broker, name)

            limits = Limits(1000, 1000, None, 1000, chunk_rows=4, interactive_rows=6)
            listened = Dataplane(catalog, Listening(), limits, plane.admission)  # type: ignore[arg-type]
            model, z = listened.model("moons"), np.zeros((3, 2))
            for count, priority in ((6, None), (7, None), (6, "bulk"), (7, "interactive")):
                await listened.sample(model, count, 1, None, Options(priority=priority))
            await listened.path(model, Kind.DECODE, z, [0.5, 1.0], None, DEFAULT)
            await listened.path(model, Kind.DECODE, z, [0.2, 0.5, 1.0], None, DEFAULT)

    asyncio.run(asyncio.wait_for(test(), 120))
    requests = [list(group) for _, group in itertools.groupby(sent, key=lambda work: work.request)]
    assert [len(works) for works in requests] == [2, 2, 2, 2, 2, 3]
    assert [{work.bulk for work in works} for works in requests] == [
        {False},
        {True},
        {True},
        {False},
        {False},
        {True},
    ]
    for works in requests:
        assert [work.id for work in works] == [f"{works[0].request}/{number}" for number in range(len(works))]
    assert len({works[0].request for works in requests}) == len(requests)


def test_a_deadline_counts_from_the_arrival_and_the_place_is_given_back(checkout: Path) -> None:
    async def test(plane: Dataplane) -> None:
        model = plane.model("moons")
        late = Ticket(timeout_ms=1000)
        late.arrived -= 2.0  # the body took that long
        with pytest.raises(DeadlineExceeded, match="deadline of 1000 ms passed when 0 of 5 rows") as caught:
            await plane.sample(model, 5, 1, None, DEFAULT, late)
        assert caught.value.detail["travelled_mean"] == 0
        in_time = Ticket(timeout_ms=1000)
        in_time.arrived -= 2.0
        await plane.sample(model, 5, 1, None, Options(timeout_ms=60_000), in_time)
        assert (in_time.rows, len(in_time.results)) == (5, 1)
        assert in_time.admitted_s >= 2.0
        x, solved, timeout_ms, travelled = np.random.default_rng(0).normal(size=(20_000, 2)), 0, 250, 0.0
        while not travelled:  # on a busy machine, nothing may have been done by the first deadlines
            with pytest.raises(DeadlineExceeded) as caught:
                await plane.density(model, x, None, slow(timeout_ms))
            solved += caught.value.detail["solved"]
            travelled, timeout_ms = caught.value.detail["travelled_mean"], 2 * timeout_ms
        assert 0 < travelled < 1
        assert (plane.admission.rows, plane.admission.nbytes) == (0, 0)
        assert plane.admission.tally.outcomes["answered",] == 5 + solved
        with pytest.raises(InvalidInput, match="takes no context"):
            await plane.density(model, x, x[:, :1], DEFAULT)
        assert (plane.admission.rows, plane.admission.nbytes) == (0, 0)

    with_plane(checkout / "model_store", test, "moons")
