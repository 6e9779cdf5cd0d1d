"""The budget, in floats: what is learned of steps, and how many bulk rows that allows."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pushforward.engine.budget import Budget, StepTime

starts = st.floats(0, 1e-3)
slopes = st.floats(1e-6, 1e-3)


def learned(start: float, slope: float) -> StepTime:
    """What is known after some steps of every size."""
    time = StepTime()
    for rows in itertools.islice(itertools.cycle((1, 256, 7, 64, 130)), 100):
        time.observe(rows, start + slope * rows)
    return time


def test_before_the_first_step_a_row_is_believed_to_take_a_tenth_of_a_millisecond() -> None:
    assert StepTime()(10) == pytest.approx(1e-3)


@given(starts, slopes, st.integers(0, 500))
def test_a_line_is_learned(start: float, slope: float, rows: int) -> None:
    assert learned(start, slope)(rows) == pytest.approx(start + slope * rows, rel=0.05, abs=2e-5)


@pytest.mark.parametrize("rows", [1, 16, 256])
def test_steps_of_one_size_predict_themselves_and_smaller_ones(rows: int) -> None:
    time = StepTime()
    for _ in range(1000):
        time.observe(rows, 0.002)
    assert time(rows) == pytest.approx(0.002, rel=0.05)
    assert time(rows // 2) <= 0.002
    assert time(2 * rows) >= 0.002


def test_a_machine_that_becomes_slow_is_noticed() -> None:
    time = learned(1e-4, 1e-5)
    for _ in range(40):
        for rows in (1, 100):
            time.observe(rows, 1e-3 + 1e-4 * rows)
    assert time(100) == pytest.approx(1.1e-2, rel=0.05)


@given(st.lists(st.tuples(st.integers(1, 4096), st.floats(0, 10)), max_size=50))
def test_no_prediction_is_negative(steps: list[tuple[int, float]]) -> None:
    time = StepTime()
    for rows, seconds in steps:
        time.observe(rows, seconds)
    start, slope = time.line()
    assert start >= 0
    assert slope >= 0
    assert all(time(rows) <= time(rows + 1) for rows in (0, 1, 100))


@given(starts, slopes, st.floats(0, 0.1), st.floats(1e-4, 0.1), st.booleans())
def test_the_turn_stays_within_the_budget_or_bulk_has_its_share(
    start: float, slope: float, interactive: float, seconds: float, beside: bool
) -> None:
    time, budget = learned(start, slope), Budget(seconds)
    start, slope = time.line()
    for _ in range(20):
        rows = budget.rows(interactive, time, beside=beside)
        cost = rows * slope + (0 if beside or not rows else start)
        if rows > 1:
            assert interactive + cost <= max(seconds, interactive * 8 / 7) * (1 + 1e-9)
            # and no room is wasted
            assert interactive + cost + slope >= max(seconds, interactive * 8 / 7) * (1 - 1e-9)


@given(st.floats(1e-3, 1e-1), st.floats(1e-6, 1e-1))
def test_bulk_has_an_eighth_of_the_time_when_there_is_no_budget_left(
    interactive: float, slope: float
) -> None:
    time, budget = learned(0.0, slope), Budget(1e-9)
    row, bulk, turns = time.line()[1], 0.0, 0
    while bulk < 20 * max(row, interactive):
        bulk += budget.rows(interactive, time, beside=True) * row
        turns += 1
    share = bulk / (bulk + turns * interactive)
    assert share <= 1 / 8 + 1e-9
    # a row that is dear is saved up for; of cheap ones, a last one that does not fit is not
    assert share >= (0.115 if row > interactive / 7 else 1 / 16)


def test_rows_that_are_dearer_than_the_budget_ride_now_and_then() -> None:
    budget = Budget(0.004)
    dear = learned(0.0, 0.02)
    rode = [budget.rows(0.001, dear, beside=False) for _ in range(70)]
    assert set(rode) == {0, 1}
    assert sum(rode) == 10  # 3 ms a turn


def test_noise_does_not_upset_it() -> None:
    time, budget, noise = StepTime(), Budget(0.004), random.Random(0)
    rows, turns = 0, []
    for _ in range(300):
        rows = budget.rows(time(1), time, beside=True)
        assert rows >= 1
        seconds = 1e-4 + 2.5e-5 * (1 + rows)
        turns.append(seconds)
        time.observe(1 + rows, seconds * noise.uniform(0.9, 1.2))
    assert max(turns[20:]) <= 0.0045
    assert min(turns[20:]) >= 0.003
