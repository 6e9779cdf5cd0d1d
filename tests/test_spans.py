"""Spans of chunks that end in ways a server seldom shows."""

import numpy as np
import pytest
from tests.collector import Span, collector

from pushforward.engine.request import Status
from pushforward.errors import InvalidModel
from pushforward.messages import Result, Work
from pushforward.spans import solve
from pushforward.tracing import Tracing

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def solved(outcome: Result | Exception | None, patch: pytest.MonkeyPatch) -> Span:
    """The span of a chunk of three rows that came at 1 s and was over at 3 s, as a collector has it."""
    rows = np.zeros((3, 2))
    work = Work("a/0", "m", 1, "encode", True, "float32", rows, None, 1, 1, 1, 9, fence=2)
    work.trace["traceparent"] = PARENT
    with collector() as kept:
        patch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", kept.url)
        tracing = Tracing()
        solve(tracing, work, 1_000_000_000, outcome, 3_000_000_000)
        tracing.close()
    (span,) = kept.spans
    assert (span.trace, span.parent) == tuple(PARENT.split("-")[1:3])
    assert (span.begin, span.end) == (1_000_000_000, 3_000_000_000)
    assert span.attributes["pushforward.attempt"] == 2
    return span


def result(steps: int, *status: Status) -> Result:
    floats, ints = np.zeros(len(status)), np.full(len(status), steps, np.int32)
    return Result(
        "a/0",
        np.zeros((len(status), 2)),
        floats,
        floats,
        ints,
        ints,
        6 * ints,
        np.array(status, np.uint8),
        floats,
        solve_s=0.5,
    )


def test_the_first_step_is_where_solving_began(monkeypatch: pytest.MonkeyPatch) -> None:
    span = solved(result(4, Status.OK, Status.NONFINITE, Status.OK), monkeypatch)
    assert span.events == {"first step": 2_500_000_000, "last step": 3_000_000_000}
    assert not span.failed  # one of its rows did
    counts = [span.attributes[f"pushforward.{name}"] for name in ("rows", "solved", "steps", "nfe")]
    assert counts == [3, 2, 12, 72]


def test_rows_that_need_no_step_have_none(monkeypatch: pytest.MonkeyPatch) -> None:
    span = solved(result(0, *3 * [Status.OUTSIDE_SUPPORT]), monkeypatch)
    assert (span.events, span.failed) == ({}, False)


@pytest.mark.parametrize(
    ("outcome", "reason"),
    [
        (None, "cancelled"),
        (result(1, *3 * [Status.CANCELLED]), "cancelled"),
        (result(1, Status.OK, Status.OK, Status.DEADLINE), "the deadline passed"),
        (InvalidModel("m/1 is broken.", file="m/1"), "m/1 is broken."),
        (RuntimeError("no such place"), "RuntimeError: no such place"),
    ],
)
def test_a_chunk_that_was_not_solved_says_why(
    outcome: Result | Exception | None, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    span = solved(outcome, monkeypatch)
    assert (span.failed, span.reason) == (True, reason)
