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

from collections.abc import Mapping
from typing import Protocol

from pushforward.messages import ModelState, Result, Work

__all__ = ["ATTEMPTS", "Broker"]

ATTEMPTS = 3
"""How often a chunk is handed out, the last time in quarantine."""


class Broker(Protocol):
    """Takes chunks, gives answers."""

    async def start(self) -> None:
        """Connect to the workers; called once, in the event loop that the broker will live in."""

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
