"""Ending a handler from outside, for next to nothing as long as it is quick."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from types import TracebackType

__all__ = ["Interruptible"]


class Interruptible:
    """A block of a task that is cancelled when something happens, and then raises an error that says what.

    Args:
        after_s: until then nothing is looked at: most blocks have ended, and have paid for a timer alone.
        happens: waits for it, then returns the error.
    """

    __slots__ = ("_after_s", "_error", "_happens", "_task", "_timer", "_watcher")

    def __init__(self, after_s: float, happens: Callable[[], Awaitable[Exception]]) -> None:
        self._after_s = after_s
        self._happens = happens
        self._error: Exception | None = None
        self._watcher: asyncio.Task[None] | None = None

    def __enter__(self) -> None:
        self._task = asyncio.current_task()
        self._timer = asyncio.get_running_loop().call_later(self._after_s, self._begin)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._timer.cancel()
        if self._watcher is not None:
            self._watcher.cancel()
        if self._error is not None:  # whatever came of the block
            assert self._task is not None
            self._task.uncancel()
            raise self._error from None

    def _begin(self) -> None:
        self._watcher = asyncio.get_running_loop().create_task(self._watch())

    async def _watch(self) -> None:
        self._error = await self._happens()
        assert self._task is not None
        self._task.cancel()
