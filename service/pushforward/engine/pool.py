"""The batch in flight: rows that share a step program.

A pool holds rows of one (model, version, density or not, precision), whatever their request, class,
direction, span and tolerances.  One turn is admit → step → release.  Between two turns rows join and leave,
so the batch is always compact and no row waits for another to finish.

Interactive and bulk rows have a ``Lane`` each.  A step takes all running interactive rows, and of the bulk
rows as many as may ride; the others pause where they are, which changes nothing in their answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pushforward.engine.budget import StepTime
from pushforward.engine.request import Array, Status
from pushforward.engine.scheduler import Scheduler, split
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
        clock: the clocks with which the chunk's rows left, [n, 8].
        z: where the chunk's rows were when they left, [n, D].
        status: how they left, [n].
        bulk: its class.
        admitted: when its first row was admitted, seconds.
    """

    batch: Batch
    left: int
    clock: Array
    z: Array
    status: NDArray[np.uint8]
    bulk: bool = False
    admitted: float | None = None


class Pool:
    """Slots, and the rows in them.

    Args:
        step: the program that advances the rows.
        slots: the most rows in a step.

    Attributes:
        tasks: those with rows that run or wait.
        interactive: the rows of that class.
        bulk: the rows of that class.
        time: of its steps, learned.
        rode: when its bulk rows last rode, in steps of the engine.
    """

    def __init__(self, step: Program, slots: int) -> None:
        self.slots = slots
        self.tasks: dict[int, Task] = {}
        self.interactive, self.bulk = Lane(self.tasks), Lane(self.tasks)
        self.time = StepTime()
        self.rode = 0
        self._step = step

    @property
    def rows(self) -> int:
        """Rows that run or wait."""
        return self.interactive.rows + self.bulk.rows

    @property
    def running(self) -> int:
        """Rows that have a slot; bulk rows that pause because interactive rows took theirs wait again."""
        return min(self.slots, self.interactive.running + self.bulk.running)

    def add(self, key: int, task: Task, request: str) -> None:
        """Queue a task of a request under a key of the caller's."""
        task.batch[OWNER][:, 0] = key
        self.tasks[key] = task
        lane = self.bulk if task.bulk else self.interactive
        lane.rows += task.left
        lane.scheduler.add(key, task.left, request)

    def turn(self, now: float, room: int) -> tuple[int, list[int]]:
        """Admit, step, release.

        Args:
            now: seconds, for ``Task.admitted``.
            room: the most bulk rows that may ride.

        Returns:
            How many rows the step had, and the keys of the tasks whose last row has left.
        """
        interactive, bulk = self.interactive, self.bulk
        first, second = split(self.slots, interactive.rows, interactive.running, bulk.rows, room)
        if first and second:
            batches = interactive.admit(first, now), bulk.admit(second, now)
            clock, state = self._step(*map(np.concatenate, zip(*batches, strict=True)))
            done = interactive.advance(clock[:first], state[:first])
            done += bulk.advance(clock[first:], state[first:])
        elif first or second:
            lane = interactive if first else bulk
            done = lane.advance(*self._step(*lane.admit(first or second, now)))
        else:
            done = []
        return first + second, done

    def evict(self, key: int, status: Status) -> None:
        """Take a task out, with its rows that run and wait; they end with the given status."""
        (self.bulk if self.tasks[key].bulk else self.interactive).evict(key, status)
        self.tasks.pop(key, None)


class Lane:
    """The rows of one class: those that wait, and those in the batch.

    Args:
        tasks: those of the pool.

    Attributes:
        rows: that run or wait.
        running: rows that have been admitted and have not left.
    """

    def __init__(self, tasks: dict[int, Task]) -> None:
        self.rows = 0
        self.running = 0
        self.scheduler: Scheduler[int] = Scheduler()
        self._tasks = tasks
        self._batch: Batch = []
        self._holes: NDArray[np.intp] = np.empty(0, np.intp)  # places whose rows have left

    def admit(self, rows: int, now: float) -> Batch:
        """Fill the batch up to so many rows; returns the first so many, ready for the step program."""
        if rows > self.running or self._holes.size:
            self._fill(rows - self.running, now)
        batch = self._batch[CLOCK:]
        return batch if rows == self.running else [part[:rows] for part in batch]

    def advance(self, clock: NDArray[Any], state: NDArray[Any]) -> list[int]:
        """Take over what a step made of the first rows; returns the keys of the tasks that are done."""
        rows = len(clock)
        if rows == len(self._batch[OWNER]):
            self._batch[CLOCK], self._batch[STATE] = clock, state
        else:
            self._batch[CLOCK][:rows], self._batch[STATE][:rows] = clock, state
        stop = clock[:, Clock.STOP]
        stopped = stop.nonzero()[0]
        return self._release(stopped, stop[stopped].astype(np.uint8)) if stopped.size else []

    def evict(self, key: int, status: Status) -> None:
        """Take out a task's rows."""
        task = self._tasks[key]
        waiting = self.scheduler.remove(key)
        if waiting:
            owner, clock, _, state, *_ = (part[len(task.batch[OWNER]) - waiting :] for part in task.batch)
            self._record(task, owner[:, 1], clock, state, np.uint8(status))
        if self._batch:
            mine = np.flatnonzero(self._batch[OWNER][:, 0] == key)
            mine = np.setdiff1d(mine, self._holes, assume_unique=True)
            self._release(mine, np.full(mine.size, status, np.uint8))

    def _fill(self, free: int, now: float) -> None:
        """Admit at most so many rows, and close the holes."""
        joining = []
        for key, first, end in self.scheduler.take(free):
            task = self._tasks[key]
            joining.append([part[first:end] for part in task.batch])
            if task.admitted is None:
                task.admitted = now
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
            self._batch = [part[keep] for part in self._batch]
        self._holes = holes[:0]
        self.running += count

    def _release(self, places: NDArray[np.intp], status: NDArray[np.uint8]) -> list[int]:
        owner, clock, _, state, *_ = (part[places] for part in self._batch)
        self.running -= len(places)
        if self.running:
            self._holes = np.concatenate([self._holes, places])
        else:
            self._batch, self._holes = [], places[:0]
        done = []
        keys = dict.fromkeys(owner[:, 0].tolist())
        for key in keys:
            task, mine = self._tasks[key], slice(None) if len(keys) == 1 else owner[:, 0] == key
            self._record(task, owner[mine, 1], clock[mine], state[mine], status[mine])
            if not task.left:
                del self._tasks[key]
                done.append(key)
        return done

    def _record(
        self,
        task: Task,
        rows: NDArray[np.int64],
        clock: NDArray[Any],
        state: NDArray[Any],
        status: NDArray[np.uint8] | np.uint8,
    ) -> None:
        task.clock[rows] = clock
        task.z[rows] = state[:, : task.z.shape[1]]
        task.status[rows] = status
        task.left -= len(rows)
        self.rows -= len(rows)


def _stack(parts: Sequence[NDArray[Any]]) -> NDArray[Any]:
    return parts[0].copy() if len(parts) == 1 else np.concatenate(parts)
