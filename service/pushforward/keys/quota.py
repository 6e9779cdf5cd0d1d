"""How much a key may ask for: rows per second, by a bucket of tokens, and rows in flight.

Tokens come in at ``rows_per_second`` until the bucket holds ``burst``; a request takes as many as it has
rows, or is refused. What was taken is not given back, however the request ends. Rows in flight are counted
until the request is answered.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Protocol

from pushforward.errors import LimitExceeded, QuotaExceeded
from pushforward.keys.key import Key

__all__ = ["LocalQuotas", "Quotas", "refusal"]

_SOON_S = 1.0  # nobody knows when the rows in flight will have been answered


class Quotas(Protocol):
    """Counts what keys ask for."""

    async def take(self, key: Key, rows: int, request: str, timeout_s: float) -> None:
        """Count rows, all or nothing.

        Args:
            key: whose they are.
            rows: how many.
            request: names them, to give them back.
            timeout_s: after which they are in flight no more, even if nobody gave them back.

        Raises:
            LimitExceeded: when the key could never ask for so many at once.
            QuotaExceeded: when it cannot now; says which limit, and when to try again.
        """
        ...

    def give_back(self, key: Key, rows: int, request: str) -> None:
        """The rows are not in flight any more."""
        ...


class LocalQuotas:
    """Counts within this process.

    Args:
        clock: seconds that never go back.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._tokens: dict[str, tuple[float, float]] = {}
        self._in_flight: dict[str, int] = {}

    async def take(self, key: Key, rows: int, request: str, timeout_s: float) -> None:
        """See ``Quotas``."""
        self.count(key, rows)

    def count(self, key: Key, rows: int) -> None:
        """What ``take`` does."""
        check_possible(key, rows)
        held = self._in_flight.get(key.id, 0)
        if key.rows_in_flight is not None and held + rows > key.rows_in_flight:
            raise refusal(key, "rows_in_flight", rows, key.rows_in_flight - held, _SOON_S)
        if key.rows_per_second is not None:
            now = self._clock()
            tokens, at = self._tokens.get(key.id, (key.burst, now))
            tokens = min(key.burst, tokens + (now - at) * key.rows_per_second)
            if tokens < rows:
                wait = (rows - tokens) / key.rows_per_second
                raise refusal(key, "rows_per_second", rows, int(tokens), wait)
            self._tokens[key.id] = tokens - rows, now
        if key.rows_in_flight is not None:
            self._in_flight[key.id] = held + rows

    def give_back(self, key: Key, rows: int, request: str) -> None:
        """See ``Quotas``."""
        if key.rows_in_flight is not None:
            left = self._in_flight.pop(key.id, 0) - rows
            if left > 0:
                self._in_flight[key.id] = left


def check_possible(key: Key, rows: int) -> None:
    """Refuse more rows than a key could ever ask for at once."""
    for name, most in (("rows_in_flight", key.rows_in_flight), ("burst_rows", key.burst)):
        if name == "burst_rows" and key.rows_per_second is None:
            continue
        if most is not None and rows > most:
            raise LimitExceeded(
                f"This request needs {rows} rows, and its key may ask for {most:g} at once ({name}): "
                "send fewer rows in one request.",
                limit=most,
            )


def refusal(key: Key, reason: str, asked: int, available: int, wait_s: float) -> QuotaExceeded:
    """The error that says which limit was met."""
    limit = key.rows_in_flight if reason == "rows_in_flight" else key.rows_per_second
    seconds = max(1, math.ceil(round(wait_s, 3)))
    return QuotaExceeded(
        f"This request needs {asked} rows, and its key may ask for {max(0, available)} now "
        f"({reason} is {limit:g}). Try again in {seconds} s.",
        retry_after=seconds,
        detail={"reason": reason, "asked": asked, "allowed": max(0, available), "limit": limit},
    )
