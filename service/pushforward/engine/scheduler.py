"""Whose rows are next: plain Python, no arrays, so that its tests are lists.

The requests that wait take turns, by rows (deficit round robin, Shreedhar and Varghese 1996, with every row
of cost one): each turn admits at most ``quantum`` rows of one request, so a request of one row waits for one
turn of each of the others, however many rows they have.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable
from typing import Generic, TypeVar

__all__ = ["Scheduler"]

Key = TypeVar("Key", bound=Hashable)


class Scheduler(Generic[Key]):
    """A queue of requests with rows that wait.

    Args:
        quantum: rows of one request per turn.

    >>> scheduler = Scheduler[str](quantum=2)
    >>> scheduler.add("long", 1000)
    >>> scheduler.add("short", 1)
    >>> scheduler.take(4)
    [('long', 0, 2), ('short', 0, 1), ('long', 2, 3)]
    """

    def __init__(self, quantum: int = 16) -> None:
        self.quantum = quantum
        self.waiting = 0  # rows
        self._turns: deque[Key] = deque()
        self._rows: dict[Key, tuple[int, int]] = {}  # next row, end

    def add(self, key: Key, rows: int) -> None:
        """Queue the rows 0 … rows − 1 of a request."""
        if rows:
            self._turns.append(key)
            self._rows[key] = (0, rows)
            self.waiting += rows

    def remove(self, key: Key) -> int:
        """Take back a request; returns how many of its rows still waited."""
        if key not in self._rows:
            return 0
        start, end = self._rows.pop(key)
        self._turns.remove(key)
        self.waiting -= end - start
        return end - start

    def take(self, free: int) -> list[tuple[Key, int, int]]:
        """The rows that fill ``free`` slots: (request, first row, end row) in order of admission."""
        taken: list[tuple[Key, int, int]] = []
        while free and self._turns:
            key = self._turns.popleft()
            start, end = self._rows[key]
            stop = min(end, start + self.quantum, start + free)
            taken.append((key, start, stop))
            free -= stop - start
            self.waiting -= stop - start
            if stop == end:
                del self._rows[key]
            else:
                self._rows[key] = (stop, end)
                self._turns.append(key)
        return taken
