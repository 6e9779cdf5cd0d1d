"""The contract between those who want rows solved and those who solve them.

Chunks are pure functions: whoever answers one, however often it is handed out, the answer has the same
bits. So a broker may hand a chunk out again when its worker is lost, as long as the caller sees exactly
one answer.
"""

from __future__ import annotations

from typing import Protocol

from pushforward.messages import Result, Work

__all__ = ["Broker"]


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
            worker was lost
                as often as it may be handed out.
        """
        ...

    def unavailable(self) -> str | None:
        """Why work sent now would not be taken at once; None when it would."""
        ...

    async def close(self) -> None:
        """Let go of the workers; chunks still in flight fail with ``Unavailable``."""
