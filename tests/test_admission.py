"""What is held is bounded, and given back whatever happens."""

import asyncio
from contextlib import ExitStack

import hypothesis.strategies as st
import pytest
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from pushforward.dataplane.admission import Admission, HungUp, Place
from pushforward.errors import DeadlineExceeded, InvalidInput, LimitExceeded, Unavailable

ENDS = [None, asyncio.CancelledError(), HungUp(), DeadlineExceeded("Late."), InvalidInput("Wrong.")]


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class Storm(RuleBasedStateMachine):
    """Requests that come, grow, finish rows, and end in every way, in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.requests: list[tuple[ExitStack, list[Place]]] = []

    @initialize(max_rows=st.integers(1, 50), max_bytes=st.integers(1, 500))
    def begin(self, max_rows: int, max_bytes: int) -> None:
        self.admission = Admission(max_rows, max_bytes, self.clock)

    @rule(body=st.integers(0, 300))
    def arrive(self, body: int) -> None:
        stack, admission = ExitStack(), self.admission
        fits = admission.nbytes + body <= admission.max_bytes
        try:
            self.requests.append((stack, [stack.enter_context(admission.admit(0, body))]))
            assert fits
        except (Unavailable, LimitExceeded):
            assert not fits

    @precondition(lambda self: self.requests)
    @rule(data=st.data(), rows=st.integers(1, 60), nbytes=st.integers(0, 300))
    def take_rows(self, data: st.DataObject, rows: int, nbytes: int) -> None:
        stack, places = data.draw(st.sampled_from(self.requests))
        admission, before = self.admission, (self.admission.rows, self.admission.nbytes)
        fits = before[0] + rows <= admission.max_rows and before[1] + nbytes <= admission.max_bytes
        try:
            places.append(stack.enter_context(admission.admit(rows, nbytes, places[0])))
            assert fits
        except (Unavailable, LimitExceeded) as error:
            refusal = error
            assert not fits
            assert (admission.rows, admission.nbytes) == before
            if isinstance(refusal, Unavailable):  # it says "later": it could be true
                assert rows <= admission.max_rows
                assert places[0].nbytes + nbytes <= admission.max_bytes
                assert refusal.detail["retry_after"] >= 1

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def finish_rows(self, data: st.DataObject) -> None:
        place = data.draw(st.sampled_from(data.draw(st.sampled_from(self.requests))[1]))
        place.leave(data.draw(st.sampled_from(["answered", "failed"])), data.draw(st.integers(0, place.rows)))

    @precondition(lambda self: self.requests)
    @rule(data=st.data(), end=st.sampled_from(ENDS))
    def end(self, data: st.DataObject, end: BaseException | None) -> None:
        request = data.draw(st.sampled_from(self.requests))
        self.requests.remove(request)
        request[0].__exit__(type(end) if end else None, end, None)

    @rule(seconds=st.floats(0, 100))
    def wait(self, seconds: float) -> None:
        self.clock.now += seconds

    @invariant()
    def nothing_is_lost_and_no_limit_is_passed(self) -> None:
        if not hasattr(self, "admission"):
            return
        admission, tally = self.admission, self.admission.tally
        held = [place for _, places in self.requests for place in places]
        assert admission.rows == sum(place.rows for place in held) <= admission.max_rows
        assert admission.nbytes == sum(place.nbytes for place in held) <= admission.max_bytes
        assert tally.submitted == tally.in_flight + sum(tally.outcomes.values())
        assert min(tally.outcomes.values(), default=0) >= 0

    def teardown(self) -> None:
        for stack, _ in self.requests:
            stack.__exit__(None, None, None)
        if hasattr(self, "admission"):
            assert (self.admission.rows, self.admission.nbytes) == (0, 0)


TestStorm = Storm.TestCase


def test_a_refusal_says_why_and_when_there_will_be_room() -> None:
    clock = Clock()
    admission = Admission(100, 1000, clock)
    with admission.admit(100, 10) as place:
        clock.now = 4.0
        place.leave("answered", 20)  # 5 rows a second
        with pytest.raises(Unavailable, match="holds 80 of 100 rows, and this request needs 70 more") as full:
            admission.admit(70, 0)
        assert full.value.detail == {
            "reason": "rows",
            "asked": 70,
            "depth": 80,
            "limit": 100,
            "retry_after": 10,  # 50 rows too many
        }
        with pytest.raises(Unavailable) as full:
            admission.admit(1, 995)
        assert (full.value.detail["reason"], full.value.retry_after) == ("bytes", 1)
    assert admission.refused == {"rows": 1, "bytes": 1}


def test_when_there_will_be_room_is_judged_by_the_time_that_rows_were_there() -> None:
    clock = Clock()
    admission = Admission(10, 1000, clock)
    for _ in range(50):
        with admission.admit(10, 0) as place:
            clock.now += 2.0
            place.leave("answered", 10)
        clock.now += 1000.0  # nobody asks
    with admission.admit(10, 0), pytest.raises(Unavailable) as full:
        admission.admit(10, 0)
    assert full.value.retry_after == 2


def test_a_request_that_could_never_fit_is_told_so_and_not_to_come_back() -> None:
    admission = Admission(10, 100)
    with admission.admit(0, 60) as body, admission.admit(5, 0):
        with pytest.raises(LimitExceeded, match="needs 11 rows, and the queue holds 10") as never:
            admission.admit(11, 0, body)
        assert never.value.limit == 10
        with pytest.raises(LimitExceeded, match="needs 110 bytes, and the queue holds 100"):
            admission.admit(1, 50, body)
    assert not admission.refused


def test_a_request_of_unknown_size_is_let_in_to_say_it_even_when_there_is_no_room_for_a_row() -> None:
    admission = Admission(10, 100)
    with admission.admit(10, 0), admission.admit(0, 1) as body:
        with pytest.raises(LimitExceeded):
            admission.admit(11, 0, body)
        with pytest.raises(Unavailable):
            admission.admit(1, 0, body)
    assert admission.refused == {"rows": 1}


@pytest.mark.parametrize(
    ("end", "outcome"),
    [
        (asyncio.CancelledError(), "cancelled"),
        (HungUp(), "cancelled"),
        (DeadlineExceeded("Late."), "expired"),
        (ValueError(), "failed"),
    ],
)
def test_rows_that_are_not_answered_end_as_their_request_does(end: BaseException, outcome: str) -> None:
    admission = Admission(10, 100)

    def ends() -> None:
        with admission.admit(3, 1) as place:
            place.leave("answered", 1)
            raise end

    with pytest.raises(type(end)):
        ends()
    assert admission.tally.outcomes == {("answered",): 1, (outcome,): 2}
