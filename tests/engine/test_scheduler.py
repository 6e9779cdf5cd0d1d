"""The scheduler, in lists: nothing is lost or doubled, every request comes in order, and all take turns."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from pushforward.engine.scheduler import Scheduler


def drain(scheduler: Scheduler[str], free: int) -> list[list[tuple[str, int, int]]]:
    turns = []
    while turn := scheduler.take(free):
        turns.append(turn)
    return turns


def test_one_request_fills_the_slots_in_order() -> None:
    scheduler = Scheduler[str](quantum=4)
    scheduler.add("a", 10)
    assert scheduler.waiting == 10
    assert scheduler.take(3) == [("a", 0, 3)]
    assert scheduler.take(100) == [("a", 3, 7), ("a", 7, 10)]
    assert scheduler.take(100) == []
    assert scheduler.waiting == 0


def test_requests_take_turns() -> None:
    scheduler = Scheduler[str](quantum=2)
    for key, rows in (("a", 5), ("b", 3), ("c", 1)):
        scheduler.add(key, rows)
    assert scheduler.take(100) == [
        ("a", 0, 2),
        ("b", 0, 2),
        ("c", 0, 1),
        ("a", 2, 4),
        ("b", 2, 3),
        ("a", 4, 5),
    ]


def test_a_turn_that_slots_cut_short_goes_to_the_back() -> None:
    scheduler = Scheduler[str](quantum=4)
    scheduler.add("a", 8)
    scheduler.add("b", 8)
    assert scheduler.take(1) == [("a", 0, 1)]
    assert scheduler.take(1) == [("b", 0, 1)]
    assert scheduler.take(1) == [("a", 1, 2)]


@pytest.mark.parametrize("slots", [1, 7, 16, 64, 256])
def test_a_row_never_waits_behind_a_million(slots: int) -> None:
    scheduler = Scheduler[str]()
    scheduler.add("job", 1_000_000)
    scheduler.take(slots)  # the job has the machine for itself
    scheduler.add("row", 1)
    admitted: list[str] = []
    while "row" not in admitted:
        admitted += [key for key, start, end in scheduler.take(min(slots, 8)) for _ in range(start, end)]
    assert admitted.index("row") <= scheduler.quantum


def test_among_many_requests_a_row_waits_for_one_turn_of_each() -> None:
    scheduler = Scheduler[str](quantum=16)
    for i in range(10):
        scheduler.add(f"job {i}", 100_000)
    scheduler.add("row", 1)
    admitted = [key for key, start, end in scheduler.take(1000) for _ in range(start, end)]
    assert admitted.index("row") == 160
    # and the jobs share what is left evenly
    counts = Counter(admitted)
    assert max(counts[f"job {i}"] for i in range(10)) - min(counts[f"job {i}"] for i in range(10)) <= 16


def test_a_request_can_be_taken_back() -> None:
    scheduler = Scheduler[str](quantum=2)
    for key, rows in (("a", 5), ("b", 3), ("c", 4)):
        scheduler.add(key, rows)
    assert scheduler.take(3) == [("a", 0, 2), ("b", 0, 1)]
    assert scheduler.remove("b") == 2
    assert scheduler.waiting == 7
    assert [key for turn in drain(scheduler, 2) for key, _, _ in turn] == ["c", "a", "c", "a"]
    assert scheduler.remove("b") == 0
    assert scheduler.remove("never there") == 0
    assert scheduler.waiting == 0


def test_a_request_without_rows_takes_no_turn() -> None:
    scheduler = Scheduler[str]()
    scheduler.add("empty", 0)
    assert scheduler.waiting == 0
    assert scheduler.take(5) == []
    assert scheduler.remove("empty") == 0


def test_without_free_slots_nobody_moves() -> None:
    scheduler = Scheduler[str]()
    scheduler.add("a", 3)
    assert scheduler.take(0) == []
    assert scheduler.waiting == 3


@given(
    st.lists(st.integers(0, 60), min_size=1, max_size=8),
    st.integers(1, 20),
    st.lists(st.integers(1, 40), min_size=1),
)
def test_rows_are_admitted_once_in_order_and_fairly(sizes: list[int], quantum: int, frees: list[int]) -> None:
    scheduler = Scheduler[int](quantum)
    for key, rows in enumerate(sizes):
        scheduler.add(key, rows)
    nexts = [0] * len(sizes)
    for turn in range(sum(sizes) + 1):
        free = frees[turn % len(frees)]
        taken = scheduler.take(free)
        assert sum(end - start for _, start, end in taken) == min(free, sum(sizes) - sum(nexts))
        for key, start, end in taken:
            assert start == nexts[key] < end <= sizes[key]
            assert end - start <= quantum
            nexts[key] = end
        assert scheduler.waiting == sum(sizes) - sum(nexts)
    assert nexts == sizes


class Model(RuleBasedStateMachine):
    """Add, take back and admit in any order, beside a plain dictionary of what still waits."""

    def __init__(self) -> None:
        super().__init__()
        self.scheduler = Scheduler[int](quantum=3)
        self.waiting: dict[int, list[int]] = {}
        self.count = 0

    @rule(rows=st.integers(0, 12))
    def add(self, rows: int) -> None:
        self.scheduler.add(self.count, rows)
        self.waiting[self.count] = list(range(rows))
        self.count += 1

    @precondition(lambda self: self.count)
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        key = data.draw(st.integers(0, self.count - 1))
        assert self.scheduler.remove(key) == len(self.waiting[key])
        self.waiting[key] = []

    @rule(free=st.integers(0, 20))
    def take(self, free: int) -> None:
        total = sum(map(len, self.waiting.values()))
        taken = self.scheduler.take(free)
        for key, start, end in taken:
            rows, self.waiting[key] = self.waiting[key][: end - start], self.waiting[key][end - start :]
            assert rows == list(range(start, end))
        assert total - sum(map(len, self.waiting.values())) == min(free, total)

    @invariant()
    def counted(self) -> None:
        assert self.scheduler.waiting == sum(map(len, self.waiting.values()))


TestModel = Model.TestCase
