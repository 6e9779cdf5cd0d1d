"""The batch in flight: rows that share a step program.

A pool holds rows of one (model, version, density or not, precision), whatever their request, direction, span
and tolerances.  One turn is admit → step → release.  Between two turns rows join and leave, so the batch is
always compact and no row waits for another to finish.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pushforward.engine.request import Array, Status
from pushforward.engine.scheduler import Scheduler
from pushforward.programs.runtime import Program
from pushforward.solvers.state import Clock

__all__ = ["Batch", "Pool", "Task"]

Batch = list[NDArray[Any]]
"""Owner (task key, row) [B, 2], clock, span, state and, for some, context: see ``solvers.state``."""

OWNER, CLOCK, SPAN, STATE = range(4)


@dataclass
class Task:
    """The rows of a chunk on their way through a pool.

    Attributes:
        batch: the rows that have to be integrated, ready to join; column 1 of the owners is the row in the
            chunk.
        left: how many of them have not left yet.
        clock: the clocks with which the chunk's rows left, [n, 9].
        z: where the chunk's rows were when they left, [n, D].
        status: how they left, [n].
    """

    batch: Batch
    left: int
    clock: Array
    z: Array
    status: NDArray[np.uint8]


class Pool:
    """Slots, and the rows in them.

    Args:
        step: the program that advances the rows.
        slots: the most rows in flight.
    """

    def __init__(self, step: Program, slots: int) -> None:
        self.slots = slots
        self.tasks: dict[int, Task] = {}
        self.scheduler: Scheduler[int] = Scheduler()
        self._step = step
        self._batch: Batch = []
        self._holes: NDArray[np.intp] = np.empty(0, np.intp)  # slots whose rows have left

    @property
    def running(self) -> int:
        """Rows in flight."""
        return len(self._batch[OWNER]) - len(self._holes) if self._batch else 0

    def add(self, key: int, task: Task) -> None:
        """Queue a task under a key of the caller's."""
        task.batch[OWNER][:, 0] = key
        self.tasks[key] = task
        self.scheduler.add(key, task.left)

    def turn(self) -> list[int]:
        """Admit, step, release; returns the keys of the tasks whose last row has left."""
        self._admit()
        if not self._batch:
            return []
        owner, clock, span, state, *context = self._batch
        clock, state = self._step(clock, span, state, *context)
        self._batch = [owner, clock, span, state, *context]
        stop = clock[:, Clock.STOP]
        stopped = stop.nonzero()[0]
        return self._release(stopped, stop[stopped].astype(np.uint8)) if stopped.size else []

    def evict(self, key: int, status: Status) -> Task:
        """Take a task out, with its rows that run and wait; they end with the given status."""
        task = self.tasks[key]
        waiting = self.scheduler.remove(key)
        if waiting:
            owner, clock, _, state, *_ = (part[len(task.batch[OWNER]) - waiting :] for part in task.batch)
            _record(task, owner[:, 1], clock, state, np.uint8(status))
        if self._batch:
            mine = np.flatnonzero(self._batch[OWNER][:, 0] == key)
            mine = np.setdiff1d(mine, self._holes, assume_unique=True)
            self._release(mine, np.full(mine.size, status, np.uint8))
        self.tasks.pop(key, None)
        return task

    def _admit(self) -> None:
        joining = [
            [part[first:end] for part in self.tasks[key].batch]
            for key, first, end in self.scheduler.take(self.slots - self.running)
        ]
        fresh = [_stack(parts) for parts in zip(*joining, strict=True)]
        count, holes = len(fresh[OWNER]) if fresh else 0, self._holes
        for part, new in zip(
            self._batch, fresh, strict=False
        ):  # the first to join take the places of those who left
            part[holes[:count]] = new[: len(holes)]
        if len(holes) < count:
            rest = [new[len(holes) :] for new in fresh]
            self._batch = (
                [_stack(parts) for parts in zip(self._batch, rest, strict=True)] if self._batch else rest
            )
        elif len(holes) > count:
            keep = np.ones(len(self._batch[OWNER]), bool)
            keep[holes[count:]] = False
            self._batch = [part[keep] for part in self._batch] if keep.any() else []
        self._holes = holes[:0]

    def _release(self, slots: NDArray[np.intp], status: NDArray[np.uint8]) -> list[int]:
        owner, clock, _, state, *_ = (part[slots] for part in self._batch)
        self._holes = np.concatenate([self._holes, slots])
        done = []
        for key in dict.fromkeys(owner[:, 0].tolist()):
            task, mine = self.tasks[key], owner[:, 0] == key
            _record(task, owner[mine, 1], clock[mine], state[mine], status[mine])
            if not task.left:
                del self.tasks[key]
                done.append(key)
        return done


def _record(
    task: Task, rows: NDArray[np.int64], clock: Array, state: Array, status: NDArray[np.uint8] | np.uint8
) -> None:
    task.clock[rows] = clock
    task.z[rows] = state[:, : task.z.shape[1]]
    task.status[rows] = status
    task.left -= len(rows)


def _stack(parts: Sequence[NDArray[Any]]) -> NDArray[Any]:
    return parts[0].copy() if len(parts) == 1 else np.concatenate(parts)
