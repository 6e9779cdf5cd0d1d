"""Back-pressure: how much of all requests together is held, and who is refused.

Two things are bounded, the rows that wait or run and the bytes of bodies and rows. What a request asks for is
given to it whole or not at all, in one check; what it holds is given back when its block ends, however it
ends.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter
from collections.abc import Callable
from types import TracebackType

from pushforward.broker.base import full
from pushforward.errors import DeadlineExceeded, LimitExceeded, PushforwardError, QuotaExceeded, Unavailable
from pushforward.metrics import Tally

__all__ = ["Admission", "HungUp", "Place"]

_MEMORY_S = 10.0  # the time after which what was measured counts for a third


class HungUp(Exception):
    """The client has gone: nobody waits for the answer."""


class Admission:
    """Takes requests in as long as there is room.

    Args:
        max_rows: most rows that may wait or run.
        max_bytes: most bytes of bodies and rows that may be held.
        clock: seconds that never go back.

    Attributes:
        tally: of rows; an outcome is "answered", "failed", "cancelled", "expired" or "refused".
        refused: requests that were refused, by reason: "rows" or "bytes".
    """

    def __init__(self, max_rows: int, max_bytes: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.max_rows = max_rows
        self.max_bytes = max_bytes
        self.nbytes = 0
        self.tally = Tally()
        self.refused: Counter[str] = Counter()
        self._drains = {"rows": _Drain(clock), "bytes": _Drain(clock)}

    @property
    def rows(self) -> int:
        """Rows that wait or run."""
        return self.tally.in_flight

    def admit(self, rows: int, nbytes: int, beside: Place | None = None) -> Place:
        """Take rows and bytes in, all or nothing, for as long as the block of the place runs.

        Args:
            rows: how many; 0 when that is not known yet. Such a request is let in even while there is no room
                for rows: only its body says whether it could come back later, or never fits.
            nbytes: how many.
            beside: what the same request holds already.

        Raises:
            LimitExceeded: when there would be no room even if nobody else were here.
            Unavailable: when there is no room now; says when there will be.
        """
        if self.rows + rows > self.max_rows or self.nbytes + nbytes > self.max_bytes:
            raise self._refusal(rows, nbytes, beside)
        self._change(rows, nbytes)
        self.tally.enter(rows)
        return Place(self, rows, nbytes)

    def _refusal(self, rows: int, nbytes: int, beside: Place | None) -> PushforwardError:
        own_rows, own_bytes = (0, 0) if beside is None else (beside.rows, beside.nbytes)
        asks = (
            ("rows", rows, own_rows, self.rows, self.max_rows),
            ("bytes", nbytes, own_bytes, self.nbytes, self.max_bytes),
        )
        for what, asked, own, _, limit in asks:
            if own + asked > limit:
                return LimitExceeded(
                    f"This request needs {own + asked} {what}, and the queue holds {limit} of all requests "
                    "together: send fewer rows in one request.",
                    limit=limit,
                )
        reason, asked, _, held, limit = next(ask for ask in asks if ask[3] + ask[1] > ask[4])
        self.tally.enter(rows)
        self.tally.leave("refused", count=rows)
        self.refused[reason] += 1
        rate = self._drains[reason].rate
        return full(reason, asked, held, limit, (held + asked - limit) / rate if rate else 0.0)

    def rates(self) -> tuple[float, float]:
        """Rows and bytes that leave in a second while there are any; 0 when nothing is known."""
        return self._drains["rows"].rate, self._drains["bytes"].rate

    def _change(self, rows: int, nbytes: int) -> None:
        if rows:
            self._drains["rows"].change(self.rows, rows)
        if nbytes:
            self._drains["bytes"].change(self.nbytes, nbytes)
            self.nbytes += nbytes


class Place:
    """What a request holds of the queue; made by ``Admission.admit``."""

    __slots__ = ("_admission", "nbytes", "rows")

    def __init__(self, admission: Admission, rows: int, nbytes: int) -> None:
        self._admission = admission
        self.rows = rows
        self.nbytes = nbytes

    def leave(self, outcome: str, rows: int) -> None:
        """Give back rows that have ended."""
        if rows:
            self._admission._change(-rows, 0)
            self._admission.tally.leave(outcome, count=rows)
            self.rows -= rows

    def shrink(self, nbytes: int) -> None:
        """Keep no more than so many bytes."""
        self._admission._change(0, nbytes - self.nbytes)
        self.nbytes = nbytes

    def __enter__(self) -> Place:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.rows:
            outcome = "failed"
            if isinstance(error, asyncio.CancelledError | HungUp):
                outcome = "cancelled"
            elif isinstance(error, DeadlineExceeded):
                outcome = "expired"
            elif isinstance(error, Unavailable | QuotaExceeded):
                outcome = "refused"
                if isinstance(error, Unavailable) and "reason" in error.detail:
                    self._admission.refused[error.detail["reason"]] += 1
            self.leave(outcome, self.rows)
        self.shrink(0)


class _Drain:
    """How fast something leaves while there is any: exponentially weighted, idle time left out."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._seen = clock()
        self._gone = 0.0
        self._elapsed = 0.0

    def change(self, held: int, change: int) -> None:
        """So many were held until now, and so many come, or go if they are negative."""
        now = self._clock()
        if held:
            elapsed = now - self._seen
            keep = math.exp(-elapsed / _MEMORY_S)
            self._gone *= keep
            self._elapsed = self._elapsed * keep + elapsed
        self._seen = now
        if change < 0:
            self._gone -= change

    @property
    def rate(self) -> float:
        """How many leave in a second; 0 when nothing is known."""
        return self._gone / self._elapsed if self._elapsed else 0.0
