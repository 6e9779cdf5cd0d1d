"""Who holds which chunk: rules, and whatever order things happen in."""

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from pushforward.broker.base import ATTEMPTS
from pushforward.broker.leases import Holder, Lease, Leases
from pushforward.messages import Work


def chunk(id: str, rows: int = 10, *, bulk: bool = False, model: str = "m") -> Work:
    return Work(
        id, model, 1, "encode", True, "float32", np.zeros((rows, 2)), None, 1e-5, 1e-5, 1e-5, 9, bulk=bulk
    )


def hired(leases: Leases[str], *names: str) -> list[Holder[str]]:
    holders = [Holder(name, ready=True) for name in names]
    leases.holders += holders
    return holders


def handed_out(leases: Leases[str]) -> list[tuple[str, str]]:
    """(chunk, worker) for all that can be handed out now."""
    given = []
    while (lease := leases.next()) is not None:
        assert lease.holder is not None
        given.append((lease.work.id, lease.holder.worker))
    return given


def test_chunks_wait_for_a_worker_that_is_ready() -> None:
    leases = Leases[str](100)
    leases.add(chunk("1"))
    (holder,) = hired(leases, "a")
    holder.ready = False
    assert handed_out(leases) == []
    holder.ready = True
    assert handed_out(leases) == [("1", "a")]


def test_the_worker_with_the_fewest_rows_is_next() -> None:
    leases = Leases[str](100)
    hired(leases, "a", "b")
    for name, rows in [("1", 30), ("2", 10), ("3", 10), ("4", 5), ("5", 5)]:
        leases.add(chunk(name, rows))
    assert handed_out(leases) == [("1", "a"), ("2", "b"), ("3", "b"), ("4", "b"), ("5", "b")]


def test_a_worker_that_has_the_model_is_preferred() -> None:
    leases = Leases[str](100)
    _, b = hired(leases, "a", "b")
    b.models.add(("moons", 1))
    leases.add(chunk("1", 50, model="moons"))
    leases.add(chunk("2", model="moons"))
    leases.add(chunk("3", model="wine"))
    assert handed_out(leases) == [("1", "b"), ("2", "b"), ("3", "a")]


def test_bulk_waits_while_workers_hold_their_fill_and_interactive_chunks_do_not() -> None:
    leases = Leases[str](bulk_window=100)
    hired(leases, "a")
    for number in range(5):
        leases.add(chunk(f"bulk {number}", 40, bulk=True))
    leases.add(chunk("short"))
    assert handed_out(leases) == [("short", "a"), ("bulk 0", "a"), ("bulk 1", "a"), ("bulk 2", "a")]
    done = leases.find("bulk 0")
    assert done is not None
    leases.settle(done)
    assert handed_out(leases) == [("bulk 3", "a")]


def test_a_bulk_chunk_larger_than_the_window_is_taken_by_a_worker_without_bulk() -> None:
    leases = Leases[str](bulk_window=100)
    hired(leases, "a")
    leases.add(chunk("1", 500, bulk=True))
    assert handed_out(leases) == [("1", "a")]


def test_what_a_lost_worker_held_goes_first_to_others() -> None:
    leases = Leases[str](1000)
    a, _ = hired(leases, "a", "b")
    for name in "123":
        leases.add(chunk(name))
    assert handed_out(leases) == [("1", "a"), ("2", "b"), ("3", "a")]
    leases.add(chunk("4"))
    again, spent = leases.lost(a)
    assert ([lease.work.id for lease in again], spent) == (["1", "3"], [])
    assert handed_out(leases) == [("1", "b"), ("3", "b"), ("4", "b")]


def test_the_last_attempt_is_made_alone() -> None:
    leases = Leases[str](1000)
    leases.add(chunk("poison"))
    for name in "abcdefgh"[: ATTEMPTS - 1]:
        (holder,) = hired(leases, name)
        assert handed_out(leases) == [("poison", name)]
        leases.lost(holder)
    (last,) = hired(leases, "last")
    leases.add(chunk("innocent"))
    assert handed_out(leases) == [("poison", "last")]  # the innocent chunk waits for another worker
    hired(leases, "other")
    assert handed_out(leases) == [("innocent", "other")]
    again, spent = leases.lost(last)
    assert (again, [lease.work.id for lease in spent]) == ([], ["poison"])
    assert leases.find("poison") is None


def test_a_worker_is_emptied_for_a_chunk_in_quarantine_and_then_as_others() -> None:
    leases = Leases[str](1000)
    (keeper,) = hired(leases, "keeper")
    busy = leases.add(chunk("busy", 1000))
    assert handed_out(leases) == [("busy", "keeper")]
    suspect = leases.add(chunk("suspect"))
    for _ in range(ATTEMPTS - 1):
        (holder,) = hired(leases, "gone")
        assert handed_out(leases) == [("suspect", "gone")]
        leases.lost(holder)
    leases.add(chunk("later"))
    assert handed_out(leases) == []
    assert keeper.reserved
    leases.settle(busy)
    assert handed_out(leases) == [("suspect", "keeper")]
    leases.settle(suspect)
    assert handed_out(leases) == [("later", "keeper")]


@pytest.mark.parametrize("handed", [False, True])
def test_a_chunk_that_nobody_waits_for_is_gone(handed: bool) -> None:
    leases = Leases[str](1000)
    lease = leases.add(chunk("1"))
    (holder,) = hired(leases, "a") if handed else (None,)
    handed_out(leases)
    assert leases.settle(lease) is holder
    assert leases.settle(lease) is None
    assert len(leases) == 0
    assert handed_out(leases) == []


class AnyOrder(RuleBasedStateMachine):
    """Whatever is added, settled and lost: each chunk is in one place, and the sums are right."""

    def __init__(self) -> None:
        super().__init__()
        self.leases = Leases[int](bulk_window=60)
        self.added = self.settled = self.spent = 0

    @rule(rows=st.integers(1, 80), bulk=st.booleans())
    def add(self, rows: int, bulk: bool) -> None:
        self.leases.add(chunk(str(self.added), rows, bulk=bulk))
        self.added += 1

    @rule()
    def hire(self) -> None:
        if len(self.leases.holders) < 3:
            self.leases.holders.append(Holder(0, ready=True))

    @rule()
    def hand_out(self) -> None:
        while self.leases.next() is not None:
            pass
        free = [h for h in self.leases.holders if not h.reserved]
        waiting = [lease for lease in self.leases if lease.holder is None]
        if free:  # nothing interactive waits, unless for quarantine
            assert all(lease.work.bulk or lease.attempts == ATTEMPTS - 1 for lease in waiting)

    @precondition(lambda self: len(self.leases))
    @rule(data=st.data())
    def settle(self, data: st.DataObject) -> None:
        self.leases.settle(data.draw(st.sampled_from(list(self.leases))))
        self.settled += 1

    @precondition(lambda self: self.leases.holders)
    @rule(data=st.data())
    def lose(self, data: st.DataObject) -> None:
        holder = data.draw(st.sampled_from(self.leases.holders))
        held = list(holder.leases.values())
        again, spent = self.leases.lost(holder)
        assert again + spent == held or set(map(id, again + spent)) == set(map(id, held))
        self.spent += len(spent)

    @invariant()
    def every_chunk_is_in_one_place(self) -> None:
        leases: list[Lease[int]] = list(self.leases)
        assert self.added == self.settled + self.spent + len(leases)
        for holder in self.leases.holders:
            held = list(holder.leases.values())
            assert held == [lease for lease in held if lease.holder is holder and lease in leases]
            assert holder.rows == sum(len(lease.work.rows) for lease in held)
            assert holder.bulk_rows == sum(len(lease.work.rows) for lease in held if lease.work.bulk)
            assert len(held) == 1 or all(lease.attempts < ATTEMPTS for lease in held)
        assert sum(len(holder.leases) for holder in self.leases.holders) == sum(
            lease.holder is not None for lease in leases
        )
        assert sum(holder.reserved for holder in self.leases.holders) <= 1


AnyOrder.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
test_any_order = AnyOrder.TestCase
