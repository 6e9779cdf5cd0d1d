"""The contract between those who want rows solved and those who solve them.

Chunks are pure functions: whoever answers one, however often it is handed out, the answer has the same
bits. So a broker may hand a chunk out again when its worker is lost, as long as the caller sees exactly
one answer.

A chunk is *leased* to a worker for as long as the worker makes progress; when it dies or stalls, the chunk
is handed out again, under the next *fence*, and whatever the old owner says of it is discarded. Attempts are
bounded: the last one is made alone on a worker, in *quarantine*, so that a chunk that takes workers down
takes nothing else with it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Protocol

from pushforward.errors import Unavailable
from pushforward.messages import Load, ModelState, Result, Unload, Work

__all__ = ["ATTEMPTS", "Broker", "full", "merge_models"]

ATTEMPTS = 3
"""How often a chunk is handed out, the last time in quarantine."""


class Broker(Protocol):
    """Takes chunks, gives answers."""

    async def start(self) -> None:
        """Connect to the workers; called once, in the event loop that the broker will live in."""

    async def admit(self, rows: int, nbytes: int) -> None:
        """Have rows and bytes that this process has taken in counted with what all processes hold together.

        Raises:
            Unavailable: when that would be more than there may be, or the queue cannot be reached.
        """
        ...

    async def submit(self, work: Work) -> Result:
        """Have a chunk solved. Cancelling the call cancels its rows: they leave their slots.

        Args:
            work: its id must not be among those in flight.

        Returns:
            The answer with the id of ``work``. Rows that failed are in it, with their status.

        Raises:
            TimeoutError: when the chunk's deadline passed and its worker has not said so for some time.
            PushforwardError: when the chunk cannot be begun (``NotFound``, ``InvalidModel`` …), or its
                workers were lost as often as it may be handed out.
        """
        ...

    def unavailable(self) -> str | None:
        """Why work sent now would not be taken at once; None when it would."""
        ...

    def models(self) -> Mapping[tuple[str, int], ModelState]:
        """What the workers have said of versions: ready when one of them has it, else the last news."""
        ...

    def load(self, model: str, version: int) -> None:
        """Have a version loaded on every worker and kept, whatever the policy; ``models`` tells when."""
        ...

    def unload(self, model: str, version: int) -> None:
        """Have the rows of a version finished and the version forgotten, until ``load``."""
        ...

    def drain(self) -> None:
        """Say from now on, by ``unavailable``, that the end is near; work is solved as before."""
        ...

    async def close(self) -> None:
        """Let go of the workers; chunks still in flight fail with ``Unavailable``."""


def full(reason: str, asked: int, held: int, limit: int, seconds: float) -> Unavailable:
    """The refusal of a request for which there is no room.

    Args:
        reason: what is short: "rows" or "bytes".
        asked: how much the request needs.
        held: how much all requests hold.
        limit: how much they may.
        seconds: after which there will be room, as far as that is known; 0 when it is not.
    """
    wait_s = max(1, math.ceil(round(seconds, 3)))
    return Unavailable(
        f"The queue is full: it holds {held} of {limit} {reason}, and this request needs {asked} more. "
        f"Try again in {wait_s} s.",
        retry_after=wait_s,
        detail={"reason": reason, "asked": asked, "depth": held, "limit": limit},
    )


def merge_models(
    before: Mapping[tuple[str, int], ModelState],
    said: Iterable[Mapping[tuple[str, int], ModelState]],
    orders: Iterable[Load | Unload],
) -> dict[tuple[str, int], ModelState]:
    """Versions as those who ask see them: ready if one worker has it, else what was said last.

    Args:
        before: as they were; what lost workers said stands until another speaks.
        said: by each worker.
        orders: given by hand.
    """
    merged = dict(before)
    workers = list(said)
    for models in workers:
        merged |= models
    for models in workers:
        merged |= {key: news for key, news in models.items() if news.state == "ready"}
    for order in orders:
        if isinstance(order, Unload):  # no new requests from now on, while workers finish what they have
            key = order.model, order.version
            reason = f"{key[0]}/{key[1]} was unloaded: load it to have it served again."
            merged[key] = ModelState(*key, "unloaded", reason)
    return merged
