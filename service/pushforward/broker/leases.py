"""Who holds which chunk, and whose turn it is: plain bookkeeping, without processes or an event loop.

A chunk is *queued*, then *leased* to a worker, then *settled*. When its worker is lost it is queued again,
under the next fence; before its last attempt it is *quarantined*: it waits for a worker that holds nothing
else, and nothing else joins it there. Interactive chunks are leased as soon as there is a worker, since its
engine knows best whose rows are next; bulk chunks wait here while a worker holds its fill of them, so that
most of a long request is not lost with a worker and another worker that comes free can share it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from pushforward.broker.base import ATTEMPTS
from pushforward.messages import Work

__all__ = ["Holder", "Lease", "Leases"]

W = TypeVar("W")


@dataclass(eq=False)
class Holder(Generic[W]):
    """A worker, as far as leases are concerned.

    Attributes:
        worker: whatever the caller wants to find again.
        ready: whether it takes chunks.
        models: the versions it has loaded.
        leases: what it holds, by chunk id.
        rows: how many rows that is, and of them bulk rows.
        reserved: it takes nothing but the quarantined chunk it is emptied for.
    """

    worker: W
    ready: bool = False
    models: set[tuple[str, int]] = field(default_factory=set)
    leases: dict[str, Lease[W]] = field(default_factory=dict)
    rows: int = 0
    bulk_rows: int = 0
    reserved: bool = False


@dataclass(eq=False)
class Lease(Generic[W]):
    """A chunk that has not been settled."""

    work: Work
    attempts: int = 0
    """How often it has been handed out: the fence of the answer that counts."""
    queued: float = 0.0
    """When it came, on the caller's clock."""
    handed_out: float = 0.0
    """When it was handed out last."""
    holder: Holder[W] | None = None


class Leases(Generic[W]):
    """All chunks in flight.

    Args:
        bulk_window: bulk rows that a worker may hold at once.
    """

    def __init__(self, bulk_window: int) -> None:
        self._bulk_window = bulk_window
        self._chunks: dict[str, Lease[W]] = {}
        self._interactive: deque[Lease[W]] = deque()
        self._bulk: deque[Lease[W]] = deque()
        self._quarantine: deque[Lease[W]] = deque()
        self.holders: list[Holder[W]] = []

    def __len__(self) -> int:
        return len(self._chunks)

    def __iter__(self) -> Iterator[Lease[W]]:
        return iter(list(self._chunks.values()))

    def find(self, id: str) -> Lease[W] | None:
        """The chunk with this id, if it is in flight."""
        return self._chunks.get(id)

    def add(self, work: Work) -> Lease[W]:
        """Queue a chunk."""
        lease = self._chunks[work.id] = Lease[W](work)
        self._queue(lease).append(lease)
        return lease

    def settle(self, lease: Lease[W]) -> Holder[W] | None:
        """Forget a chunk that was answered, or that nobody waits for; returns who held it."""
        if self._chunks.pop(lease.work.id, None) is None:
            return None
        holder = lease.holder
        if holder is None:
            self._queue(lease).remove(lease)
        else:
            self._release(holder, lease)
        return holder

    def lost(self, holder: Holder[W]) -> tuple[list[Lease[W]], list[Lease[W]]]:
        """Take back all that a lost worker held.

        Returns:
            The chunks that are queued again, and those that are spent: settled, having been handed out for
            the last time.
        """
        self.holders.remove(holder)
        again, spent = [], []
        for lease in list(holder.leases.values()):
            self._release(holder, lease)
            if lease.attempts >= ATTEMPTS:
                del self._chunks[lease.work.id]
                spent.append(lease)
            else:
                again.append(lease)
        for lease in reversed(again):  # ahead of those that have not waited yet
            self._queue(lease).appendleft(lease)
        return again, spent

    def next(self) -> Lease[W] | None:
        """Lease the next chunk that a worker can take; None when there is none or no worker for it."""
        self._reserve()
        for queue in (self._quarantine, self._interactive, self._bulk):
            if queue:
                holder = self._taker(queue[0])
                if holder is not None:
                    return self._hand_out(queue.popleft(), holder)
        return None

    def _taker(self, lease: Lease[W]) -> Holder[W] | None:
        """The worker that is to have a chunk: of those that may, one with its model, then the fewest rows."""
        if _quarantined(lease):
            return next((h for h in self.holders if h.reserved and h.ready and not h.leases), None)
        window = self._bulk_window if lease.work.bulk else None
        able = (
            h
            for h in self.holders
            if h.ready and not h.reserved and (window is None or not h.bulk_rows or h.bulk_rows < window)
        )
        model = lease.work.model, lease.work.version
        return min(able, key=lambda h: (model not in h.models, h.rows), default=None)

    def _reserve(self) -> None:
        """Keep one worker free for quarantined chunks while there are any."""
        held = [h for h in self.holders if h.reserved]
        if not self._quarantine:
            for holder in held:
                holder.reserved = any(map(_quarantined, holder.leases.values()))
        elif not held:
            ready = [h for h in self.holders if h.ready]
            if ready:
                min(ready, key=lambda h: h.rows).reserved = True

    def _hand_out(self, lease: Lease[W], holder: Holder[W]) -> Lease[W]:
        lease.attempts += 1
        lease.holder = holder
        holder.leases[lease.work.id] = lease
        rows = len(lease.work.rows)
        holder.rows += rows
        holder.bulk_rows += rows * lease.work.bulk
        return lease

    def _release(self, holder: Holder[W], lease: Lease[W]) -> None:
        del holder.leases[lease.work.id]
        lease.holder = None
        rows = len(lease.work.rows)
        holder.rows -= rows
        holder.bulk_rows -= rows * lease.work.bulk

    def _queue(self, lease: Lease[W]) -> deque[Lease[W]]:
        if lease.attempts >= ATTEMPTS - 1:
            return self._quarantine
        return self._bulk if lease.work.bulk else self._interactive


def _quarantined(lease: Lease[W]) -> bool:
    """Whether this is, or would be, its last attempt."""
    return lease.attempts >= ATTEMPTS - (lease.holder is None)
