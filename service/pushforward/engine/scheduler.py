"""Whose rows are next: plain Python, no arrays, so that its tests are lists.

There are two classes, interactive and bulk.  ``split`` says how many rows of each the next step has; a class
has a ``Scheduler``, which says whose rows they are.

Within a class the requests that wait take turns, by rows (deficit round robin, Shreedhar and Varghese 1996,
with every row of cost one): each turn admits at most ``quantum`` rows of one request, so a request of one row
waits for one turn of each of the others, however many rows and chunks they have.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable
from typing import Generic, TypeVar

__all__ = ["Scheduler", "split"]

Key = TypeVar("Key", bound=Hashable)

_BULK_SLOTS = 8  # one slot in so many is kept for bulk rows, and at least one


def split(slots: int, interactive: int, running: int, bulk: int, room: int) -> tuple[int, int]:
    """How many rows the next step has: (interactive, bulk).

    Interactive rows come first, and none that runs is ever put out.  Bulk rows have what is left: those that
    run beyond that pause, so that interactive rows find a slot at once even when bulk rows had them all.

    Args:
        slots: the most rows in a step; with one slot both classes have one.
        interactive: interactive rows that run or wait.
        running: interactive rows that run.
        bulk: bulk rows that run or wait; for them some slots are kept.
        room: bulk rows that may ride in this step.

    >>> split(slots=16, interactive=100, running=0, bulk=100, room=16)
    (14, 2)
    >>> split(slots=16, interactive=1, running=1, bulk=100, room=16)
    (1, 15)
    """
    if not bulk:
        return min(interactive, slots), 0
    kept = min(bulk, max(1, slots // _BULK_SLOTS))
    first = max(running, min(interactive, max(1, slots - kept)))
    return first, min(bulk, room, max(1, slots - first))


class Scheduler(Generic[Key]):
    """A queue of chunks whose rows wait; the chunks of one request share its turn.

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
        self._turns: deque[Hashable] = deque()  # requests
        self._chunks: dict[Hashable, deque[Key]] = {}  # of a request
        self._rows: dict[Key, tuple[int, int, Hashable]] = {}  # next row, end, request

    def add(self, key: Key, rows: int, request: Hashable = None) -> None:
        """Queue the rows 0 … rows − 1 of a chunk of a request; without one it is a request of its own."""
        if not rows:
            return
        if request is None:
            request = key
        if request not in self._chunks:
            self._turns.append(request)
            self._chunks[request] = deque()
        self._chunks[request].append(key)
        self._rows[key] = (0, rows, request)
        self.waiting += rows

    def remove(self, key: Key) -> int:
        """Take back a chunk; returns how many of its rows still waited."""
        if key not in self._rows:
            return 0
        start, end, request = self._rows.pop(key)
        self._chunks[request].remove(key)
        if not self._chunks[request]:
            del self._chunks[request]
            self._turns.remove(request)
        self.waiting -= end - start
        return end - start

    def take(self, free: int) -> list[tuple[Key, int, int]]:
        """The rows that fill ``free`` slots: (chunk, first row, end row) in order of admission."""
        taken: list[tuple[Key, int, int]] = []
        while free > 0 and self._turns:
            request = self._turns.popleft()
            chunks, turn = self._chunks[request], min(self.quantum, free)
            free -= turn
            while turn and chunks:
                key = chunks[0]
                start, end, _ = self._rows[key]
                stop = min(end, start + turn)
                taken.append((key, start, stop))
                turn -= stop - start
                self.waiting -= stop - start
                if stop == end:
                    del self._rows[key]
                    chunks.popleft()
                else:
                    self._rows[key] = (stop, end, request)
            free += turn  # what a short request leaves
            if chunks:
                self._turns.append(request)
            else:
                del self._chunks[request]
        return taken
