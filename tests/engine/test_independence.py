"""A row's answer does not depend on its company: bit by bit, whatever else is solved beside it.

Random mixes of chunks (directions, with and without density, precisions, tolerances, ends, sizes, arrivals)
share an engine with rows that become NaN, blow up, never arrive, are cancelled or overdue, over any number of
slots; bulk rows pause for interactive ones and go on.  Every row that is left in peace must end exactly as it
does when it is solved alone.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.problems import FLOWS, chunk, exported

from pushforward.engine.engine import Engine
from pushforward.engine.request import Answer, Array, Chunk, Kind, Status

ORDINARY, POISON = 24, 6


@dataclass(frozen=True)
class Settings:
    """All that a row's answer may depend on, besides the row and the model."""

    kind: Kind
    density: bool
    precision: str
    tolerance: float
    share: float | None  # of the way at which to end; None is the whole way
    max_steps: int


@dataclass(frozen=True)
class Visit:
    """A chunk, and when it comes and goes, in turns of the engine."""

    settings: Settings
    rows: tuple[int, ...]
    arrival: int
    cancelled: int | None
    deadline: int | None
    bulk: bool


@functools.cache
def bank(name: str, kind: Kind) -> tuple[Array, Array | None]:
    """Rows to choose from: ordinary ones, then poison."""
    model = exported(name)
    rows, context = model.points(kind, ORDINARY + POISON)
    poison = rows[ORDINARY:]
    poison[0, -1] = np.nan
    poison[1] = 1e30
    poison[2, 0] = -np.inf
    poison[3] = -1e12
    if name == "foreign3":  # turns into fields that blow up, become NaN on the way, or never end
        poison[3:] = rows[:3]
        context[ORDINARY + 3 :, 0] = (10, 20, 30)
    return rows, context


def make(name: str, id: str, how: Settings, rows: tuple[int, ...], **settings: Any) -> Chunk:
    x, context = bank(name, how.kind)
    model, chosen = exported(name), list(rows)
    start, end = model.t_base, model.t_data
    if how.kind is Kind.ENCODE:
        start, end = end, start
    return chunk(
        id,
        how.kind,
        x[chosen],
        None if context is None else context[chosen],
        density=how.density,
        precision=how.precision,
        tolerance=how.tolerance,
        max_steps=how.max_steps,
        t_end=None if how.share is None else start + how.share * (end - start),
        **settings,
    )


def told(answer: Answer, row: int) -> tuple[bytes, ...]:
    """Everything that is answered about a row, to the bit."""
    return (
        answer.value[row].tobytes(),
        *(
            part[row].tobytes()
            for part in (
                answer.log_density,
                answer.error_estimate,
                answer.t,
                answer.steps,
                answer.accepted,
                answer.nfe,
                answer.status,
            )
        ),
    )


@functools.cache
def solo(name: str, how: Settings, row: int) -> tuple[tuple[bytes, ...], int]:
    """A row's answer when it is alone, and its steps."""
    engine = Engine(lambda *_: exported(name), slots=1)
    engine.submit(make(name, "solo", how, (row,)))
    while engine.busy:
        for answer in engine.step():
            return told(answer, 0), int(answer.steps[0])
    raise AssertionError("a row was lost")


all_settings = st.builds(
    Settings,
    kind=st.sampled_from(Kind),
    density=st.sampled_from([True, True, False]),
    precision=st.sampled_from(["float32", "float32", "float64"]),
    tolerance=st.sampled_from([1e-2, 1e-4, 1e-5]),
    share=st.sampled_from([None, None, None, 0.37]),
    max_steps=st.sampled_from([1000, 1000, 6]),
)
turns = st.integers(0, 25)
visits = st.builds(
    Visit,
    settings=all_settings,
    rows=st.lists(st.integers(0, ORDINARY + POISON - 1), min_size=1, max_size=40).map(tuple),
    arrival=turns,
    cancelled=st.none() | st.none() | turns,
    deadline=st.none() | st.none() | turns,
    bulk=st.booleans(),
)


@pytest.mark.parametrize("name", FLOWS)
@settings(max_examples=15)
@given(
    company=st.lists(visits, min_size=1, max_size=6),
    slots=st.integers(1, 64),
    budget=st.sampled_from([1e-9, 1e-5, 1e-4, 1.0]),
)
def test_every_survivor_ends_as_it_does_alone(
    name: str, company: list[Visit], slots: int, budget: float
) -> None:
    now, looks = 0, itertools.count()
    # between two looks at the clock pass 10 µs, so that a step does: the smaller budgets make bulk rows pause
    engine = Engine(lambda *_: exported(name), slots, lambda: now + 1e-5 * next(looks), budget)
    answers: dict[str, Answer] = {}

    def keep(answer: Answer) -> None:
        assert answer.id not in answers  # doubled
        answers[answer.id] = answer

    while engine.busy or now <= max(visit.arrival for visit in company):
        for number, visit in enumerate(company):
            if visit.arrival == now:
                arriving = make(
                    name, str(number), visit.settings, visit.rows, deadline=visit.deadline, bulk=visit.bulk
                )
                engine.submit(arriving)
            if visit.cancelled == now and (answer := engine.cancel(str(number))):
                keep(answer)
        for answer in engine.step():
            keep(answer)
        assert engine.running <= slots * len({visit.settings for visit in company})
        now += 1

    assert set(answers) == {str(number) for number in range(len(company))}  # none lost
    assert engine.running == engine.waiting == 0
    for number, visit in enumerate(company):
        answer = answers[str(number)]
        assert len(answer.status) == len(visit.rows)
        for place, row in enumerate(visit.rows):
            alone, steps = solo(name, visit.settings, row)
            if answer.status[place] in (Status.CANCELLED, Status.DEADLINE):
                assert visit.cancelled is not None or visit.deadline is not None
                assert answer.steps[place] < steps
                assert np.isnan(answer.value[place]).all()
            else:
                assert told(answer, place) == alone


@pytest.mark.parametrize("kind", Kind)
@pytest.mark.parametrize("name", FLOWS)
def test_a_crowd_of_every_size_and_its_shuffles(name: str, kind: Kind) -> None:
    # sizes around those of vector registers and of the kernels' blocks, from one row to more than the slots
    here = Settings(kind, True, "float32", 1e-4, None, 1000)
    random = np.random.default_rng(0)
    for size in (1, 2, 3, 5, 8, 15, 16, 17, 31, 33, 64, 130):
        rows = tuple(random.integers(0, ORDINARY, size).tolist())
        engine = Engine(lambda *_: exported(name), slots=100)
        engine.submit(make(name, "crowd", here, rows))
        found = [answer for _ in range(10_000) if engine.busy for answer in engine.step()]
        assert [told(found[0], place) for place in range(size)] == [solo(name, here, row)[0] for row in rows]


@pytest.mark.parametrize("name", FLOWS)
def test_the_bank_is_what_it_is_taken_for(name: str) -> None:
    # ordinary rows arrive, with different numbers of steps, and poison does poison
    for kind in Kind:
        for precision in ("float32", "float64"):
            here = Settings(kind, True, precision, 1e-5, None, 1000)
            status = [solo(name, here, row)[0][-1][0] for row in range(ORDINARY + POISON)]
            assert set(status[:ORDINARY]) == {Status.OK}
            assert name == "linear3" or len({solo(name, here, row)[1] for row in range(ORDINARY)}) > 1
            assert status[ORDINARY] in (Status.NONFINITE, Status.OUTSIDE_SUPPORT)
            if name == "foreign3":
                assert status[-3:] == [Status.STEP_UNDERFLOW, Status.NONFINITE, Status.MAX_STEPS]
