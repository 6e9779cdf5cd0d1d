"""The scheduler, in lists: nothing is lost or doubled, requests take turns, bulk gives way."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from pushforward.engine.scheduler import Scheduler, split


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


def test_the_chunks_of_a_request_share_its_turn() -> None:
    scheduler = Scheduler[str](quantum=4)
    for number in range(3):
        scheduler.add(f"big/{number}", 3, "big")
    scheduler.add("small/0", 5, "small")
    assert scheduler.take(100) == [
        ("big/0", 0, 3),
        ("big/1", 0, 1),
        ("small/0", 0, 4),
        ("big/1", 1, 3),
        ("big/2", 0, 2),
        ("small/0", 4, 5),
        ("big/2", 2, 3),
    ]


def test_a_request_that_is_cut_into_many_chunks_gains_nothing() -> None:
    scheduler = Scheduler[str]()
    for number in range(100):
        scheduler.add(f"cut/{number}", 10, "cut")
    scheduler.add("whole", 1000)
    admitted = Counter()
    for key, start, end in scheduler.take(640):
        admitted[key.split("/")[0]] += end - start
    assert admitted["cut"] == admitted["whole"] == 320


def test_a_chunk_can_be_taken_out_of_its_request() -> None:
    scheduler = Scheduler[str](quantum=2)
    for key in ("a/0", "a/1"):
        scheduler.add(key, 3, "a")
    scheduler.add("b", 3)
    assert scheduler.remove("a/0") == 3
    assert scheduler.take(4) == [("a/1", 0, 2), ("b", 0, 2)]
    assert scheduler.remove("a/1") == 1
    assert scheduler.take(4) == [("b", 2, 3)]
    scheduler.add("a/2", 1, "a")  # a request may come back
    assert scheduler.take(4) == [("a/2", 0, 1)]


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
        self.request: dict[int, str] = {}
        self.count = 0

    @rule(rows=st.integers(0, 12), request=st.none() | st.sampled_from("xyz"))
    def add(self, rows: int, request: str | None) -> None:
        self.scheduler.add(self.count, rows, request)
        self.waiting[self.count] = list(range(rows))
        self.request[self.count] = request or f"own {self.count}"
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
            # the request's chunks come one after the other
            first = next(
                k for k, rows in self.waiting.items() if rows and self.request[k] == self.request[key]
            )
            assert key == first
            rows, self.waiting[key] = self.waiting[key][: end - start], self.waiting[key][end - start :]
            assert rows == list(range(start, end))
        assert total - sum(map(len, self.waiting.values())) == min(free, total)

    @invariant()
    def counted(self) -> None:
        assert self.scheduler.waiting == sum(map(len, self.waiting.values()))


TestModel = Model.TestCase


# ------------------------------------------------------------------------------------------ two classes


@given(
    st.integers(1, 300), st.integers(0, 600), st.integers(0, 300), st.integers(0, 600), st.integers(0, 300)
)
def test_a_step_is_split_between_the_classes(
    slots: int, interactive: int, running: int, bulk: int, room: int
) -> None:
    running = min(running, interactive, slots)
    first, second = split(slots, interactive, running, bulk, room)
    assert running <= first <= interactive  # none that runs is put out
    assert 0 <= second <= min(bulk, room)
    assert first + second <= max(slots, running + 1, 2)
    if min(bulk, room):
        assert second >= 1
    if not bulk:
        assert first == min(interactive, slots)  # nothing is kept for nobody
    elif slots > 1:
        kept = min(bulk, max(1, slots // 8))
        assert first == max(running, min(interactive, slots - kept))
        if running <= slots - kept <= interactive:
            assert second == min(kept, room)
    if room >= bulk and running <= slots - bulk:
        assert first + second == min(slots, interactive + bulk) or slots == 1  # no slot is left empty


class Pool:
    """A pool in lists: rows of (request, row), each of which leaves after so many steps."""

    def __init__(self, slots: int, steps: int) -> None:
        self.slots, self.steps = slots, steps
        self.classes = [Scheduler[str](quantum=4), Scheduler[str](quantum=4)]
        self.rows: list[list[list]] = [[], []]  # [request, row, steps left]
        self.left: list[tuple[str, int]] = []

    def turn(self, room: int) -> tuple[list[str], list[str]]:
        """A step; who took part."""
        interactive, bulk = (q.waiting + len(rows) for q, rows in zip(self.classes, self.rows, strict=True))
        counts = split(self.slots, interactive, len(self.rows[0]), bulk, room)
        took_part: list[list[str]] = []
        for scheduler, rows, count in zip(self.classes, self.rows, counts, strict=True):
            for key, start, end in scheduler.take(count - len(rows)):
                rows += [[key, row, self.steps] for row in range(start, end)]
            for row in rows[:count]:
                row[2] -= 1
            took_part.append([row[0] for row in rows[:count]])
            self.left += [(key, row) for key, row, steps in rows if not steps]
            rows[:] = [row for row in rows if row[2]]
        return took_part[0], took_part[1]


@pytest.mark.parametrize("slots", [2, 7, 16, 64])
def test_an_interactive_row_rides_in_the_next_step_whatever_bulk_is_there(slots: int) -> None:
    pool = Pool(slots, steps=10)
    for number in range(5):
        pool.classes[1].add(f"job {number}", 100_000)
    for _ in range(7):
        assert len(pool.turn(slots)[1]) == slots
    pool.classes[0].add("row", 1)
    for _ in range(10):
        interactive, bulk = pool.turn(slots)
        assert interactive == ["row"]
        assert len(bulk) == slots - 1
    assert ("row", 0) in pool.left
    assert len(pool.turn(slots)[1]) == slots


@pytest.mark.parametrize("slots", [1, 2, 7, 16, 64])
def test_bulk_rows_keep_their_share_under_endless_interactive_load(slots: int) -> None:
    pool = Pool(slots, steps=5)
    pool.classes[0].add("first", 10_000)
    pool.turn(slots)  # has all the slots before any bulk row comes
    pool.classes[1].add("job", 3 * slots)
    turns = 0
    while not all(("job", row) in pool.left for row in range(3 * slots)):
        pool.classes[0].add(f"more {turns}", slots)
        interactive, bulk = pool.turn(slots)
        assert interactive
        turns += 1
        if turns > 5:
            waiting = 3 * slots - sum(key == "job" for key, _ in pool.left)
            assert len(bulk) >= 1
            assert waiting < max(1, slots // 8) or len(bulk) + len(interactive) <= max(slots, 2)
        assert turns <= 5 + 3 * slots * 5 // max(1, slots // 8) + 5
    assert pool.classes[0].waiting  # it was endless


@given(
    st.integers(1, 20),
    st.integers(1, 6),
    st.lists(st.tuples(st.integers(0, 30), st.booleans(), st.integers(0, 40)), min_size=1, max_size=8),
    st.lists(st.integers(0, 20), min_size=1),
)
def test_every_row_of_both_classes_leaves_once(
    slots: int, steps: int, chunks: list[tuple[int, bool, int]], rooms: list[int]
) -> None:
    pool, turn = Pool(slots, steps), 0
    while turn <= 30 or any(q.waiting for q in pool.classes) or any(pool.rows):
        for number, (rows, bulk, arrival) in enumerate(chunks):
            if min(arrival, 30) == turn:
                pool.classes[bulk].add(str(number), rows)
        room = rooms[turn % len(rooms)] if turn < 1000 else 1
        interactive, riding = pool.turn(room)
        assert len(riding) <= room
        assert len(interactive) + len(riding) <= max(slots + 1, 2)
        turn += 1
        assert turn < 10_000  # nobody starves
    assert sorted(pool.left) == sorted(
        (str(number), row) for number, (rows, _, _) in enumerate(chunks) for row in range(rows)
    )
