"""How much bulk work a step may carry while interactive rows are about: plain Python floats.

Every pool learns how long its steps take (``StepTime``).  ``Budget`` turns what the interactive rows leave of
the step budget into a number of bulk rows.
"""

from __future__ import annotations

import math

__all__ = ["Budget", "StepTime"]

_MEMORY = 0.95  # weight of an observation after each later one: some twenty steps count
# What is believed of a step before any was seen, as weak observations that never fade: no rows take no time,
# one takes a tenth of a millisecond.  They also give the line its slope while all steps have the same rows.
_BELIEF = ((0.0, 0.0), (1.0, 1e-4))
_BELIEF_WEIGHT = 0.1
_MANY = 1_000_000_000  # rows: as many as there are
_BULK_TIME = 1 / 8  # of the engine's time, which bulk rows have even when interactive rows use up the budget


class StepTime:
    """Seconds of a step against its rows: a line, by exponentially forgotten least squares.

    >>> time = StepTime()
    >>> for rows in range(1, 200):
    ...     time.observe(rows, 1e-4 + 2e-5 * rows)
    >>> round(time(100), 4)
    0.0021
    """

    def __init__(self) -> None:
        self._sums = (0.0, 0.0, 0.0, 0.0, 0.0)  # of 1, rows, seconds, rows², rows × seconds

    def observe(self, rows: int, seconds: float) -> None:
        """Remember a step."""
        one, x, y, xx, xy = self._sums
        self._sums = (
            _MEMORY * one + 1,
            _MEMORY * x + rows,
            _MEMORY * y + seconds,
            _MEMORY * xx + rows * rows,
            _MEMORY * xy + rows * seconds,
        )

    def line(self) -> tuple[float, float]:
        """(seconds of a step without rows, seconds per row); neither is negative."""
        one, x, y, xx, xy = self._sums
        for rows, seconds in _BELIEF:
            one += _BELIEF_WEIGHT
            x += _BELIEF_WEIGHT * rows
            y += _BELIEF_WEIGHT * seconds
            xx += _BELIEF_WEIGHT * rows * rows
            xy += _BELIEF_WEIGHT * rows * seconds
        slope = (one * xy - x * y) / (one * xx - x * x)
        if slope < 0:
            return y / one, 0.0
        start = (y - slope * x) / one
        return (start, slope) if start > 0 else (0.0, xy / xx)

    def __call__(self, rows: int) -> float:
        """Seconds that a step of so many rows will take."""
        start, slope = self.line()
        return start + slope * rows


class Budget:
    """What bulk rows may cost, engine turn by engine turn, while interactive rows are about.

    Bulk rows have what the interactive rows leave of the budget, and an eighth of the time in any case.
    Where that does not pay for one row, it is saved up over turns until it does.

    Args:
        seconds: the longest turn.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._saved = 0.0

    def rows(self, interactive: float, time: StepTime, *, beside: bool) -> int:
        """The most bulk rows for this turn.

        Args:
            interactive: predicted seconds of this turn's interactive rows.
            time: of the pool that has the bulk rows.
            beside: whether that pool steps anyway, for interactive rows.
        """
        allowance = max(self.seconds - interactive, interactive * _BULK_TIME / (1 - _BULK_TIME))
        start, slope = time.line()
        fixed = 0.0 if beside else start
        self._saved += allowance
        if self._saved < fixed + slope:
            return 0
        if fixed + slope > allowance:
            self._saved -= fixed + slope
            return 1
        self._saved = 0.0
        return math.floor(min((allowance - fixed) / slope, _MANY)) if slope else _MANY
