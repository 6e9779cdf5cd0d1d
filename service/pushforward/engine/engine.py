"""The engine: continuous batching of initial value problems.

``Engine.step`` is the loop's body and reads whole: every pool takes one turn (admit → step → release, see
``Pool``), and the chunks whose last row has left are finished into answers.  The caller runs it while
``engine.busy``.  An exception out of it leaves the engine in an unknown state: it must not be used any more.

Interactive rows take part in every step.  Bulk rows ride in one pool a step, the pools taking turns, so that
an interactive row that arrives waits for one bulk step at most; and while interactive rows run or wait
anywhere in the engine, only as many ride as the step budget has room for (see ``budget``).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from pushforward.engine.budget import Budget
from pushforward.engine.counting import count_rows, count_step
from pushforward.engine.pool import Batch, Pool, Task
from pushforward.engine.request import Answer, Array, Chunk, Kind, Status
from pushforward.messages import Counts
from pushforward.programs.runtime import Program
from pushforward.solvers.state import Clock, Span

__all__ = ["Engine", "Model"]


class Model(Protocol):
    """What the engine needs to know of a model version."""

    t_base: float
    t_data: float
    stages: int
    """Evaluations of the field per attempted step."""
    dt_data_to_base: float
    dt_base_to_data: float

    def program(self, name: str) -> Program:
        """A program of the version, such as ``step_density_float32``."""
        ...


@dataclass
class _Job:
    chunk: Chunk
    model: Model
    task: Task
    pool: Pool
    log_det: Array  # log|det ∂z/∂x|, known at the start when encoding, [n]
    base: Array  # log N(z; 0, I) of the starting point when decoding, [n]
    submitted: float


class Engine:
    """Integrates rows.

    Args:
        models: the model of a (name, version); called at every submission, so it should remember.
        slots: the most rows in a step of a pool (two classes of rows have at least one each).
        clock: seconds, for deadlines, budget and timings.
        step_budget_s: the longest that all pools together may step with bulk rows among them, seconds, while
            interactive rows run or wait.

    Attributes:
        steps: steps of a batch since the start.
    """

    def __init__(
        self,
        models: Callable[[str, int], Model],
        slots: int = 256,
        clock: Callable[[], float] = time.monotonic,
        step_budget_s: float = 0.0015,
    ) -> None:
        self._models, self._slots, self._clock = models, slots, clock
        self._budget = Budget(step_budget_s)
        self._pools: dict[tuple[str, int, bool, str], Pool] = {}
        self._jobs: dict[int, _Job] = {}
        self._keys: dict[str, int] = {}  # of the jobs, by their chunk's id
        self._serial = 0
        self._next_deadline = math.inf  # no job has an earlier one
        self._finished: list[Answer] = []  # chunks that were done at submission
        self._counts = Counts()
        self.steps = 0

    @property
    def busy(self) -> bool:
        """Whether a step would do anything."""
        return bool(self._jobs or self._finished)

    @property
    def running(self) -> int:
        """Rows in slots."""
        return sum(pool.running for pool in self._pools.values())

    @property
    def waiting(self) -> int:
        """Rows that have been submitted and have no slot."""
        return sum(pool.rows - pool.running for pool in self._pools.values())

    def rows_of(self, model: str, version: int) -> int:
        """Rows of a model version that run or wait."""
        return sum(pool.rows for key, pool in self._pools.items() if key[:2] == (model, version))

    def take_counts(self) -> Counts:
        """What was done since the last call."""
        counts, self._counts = self._counts, Counts()
        return counts

    def submit(self, chunk: Chunk) -> None:
        """Take a chunk; its answer comes from a later ``step``."""
        submitted = self._clock()
        model = self._models(chunk.model, chunk.version)
        z, log_det, inside = chunk.rows, np.zeros(len(chunk.rows)), np.ones(len(chunk.rows), bool)
        if chunk.kind is Kind.ENCODE:
            z, log_det = _flat(model.program("encode")(chunk.rows))
            inside = np.isfinite(log_det)
        key = (chunk.model, chunk.version, chunk.density, chunk.precision)
        if key not in self._pools:
            step = model.program(f"step_{_kind(chunk)}_{chunk.precision}")
            self._pools[key] = Pool(step, self._slots)
        task = _prepare(chunk, model, z, inside)
        base = _base_log_density(z) if chunk.kind is Kind.DECODE else np.zeros(len(z))
        job = _Job(chunk, model, task, self._pools[key], log_det, base, submitted)
        self._serial += 1
        self._jobs[self._serial] = job
        self._keys[chunk.id] = self._serial
        if not task.left:
            self._finished.append(self._finish(self._serial, submitted))
            return
        task.bulk = chunk.bulk
        job.pool.add(self._serial, task, chunk.request or chunk.id)
        if chunk.deadline is not None:
            self._next_deadline = min(self._next_deadline, chunk.deadline)

    def step(self) -> list[Answer]:
        """Advance the rows in flight by one attempted step; returns the chunks that are done."""
        answers, self._finished = self._finished, []
        now = self._clock()
        if now >= self._next_deadline:
            answers += self._evict_overdue(now)
        pools = [pool for pool in self._pools.values() if pool.tasks]
        riding, room = self._bulk_turn(pools)
        done: list[tuple[int, float]] = []
        for pool in pools:
            rows, keys = pool.turn(now, room if pool is riding else 0)
            if rows:
                started, now = now, self._clock()
                pool.time.observe(rows, now - started)
                count_step(self._counts, rows, now - started)
                self.steps += 1
            if keys:
                done += [(key, now) for key in keys]
        return answers + [self._finish(key, left) for key, left in done]

    def cancel(self, id: str) -> Answer | None:
        """Take a chunk out at once; returns its answer so far, or None when it is not here (any more)."""
        key = self._keys.get(id)
        if key is not None:
            return self._evict(key, Status.CANCELLED, self._clock())
        done = next((answer for answer in self._finished if answer.id == id), None)
        self._finished = [answer for answer in self._finished if answer is not done]
        return done

    def forget(self, model: str, version: int) -> None:
        """Drop the idle pools of a model version that is being unloaded; see ``rows_of`` for the others."""
        self._pools = {k: p for k, p in self._pools.items() if k[:2] != (model, version) or p.rows}

    def _bulk_turn(self, pools: list[Pool]) -> tuple[Pool | None, int]:
        """The pool whose bulk rows ride in this step, and how many of them."""
        with_bulk = [pool for pool in pools if pool.bulk.rows]
        if not with_bulk:
            return None, 0
        riding, room = min(with_bulk, key=lambda pool: pool.rode), self._slots
        interactive = [pool for pool in pools if pool.interactive.rows]
        if interactive:
            cost = sum(pool.time(min(pool.interactive.rows, self._slots)) for pool in interactive)
            room = self._budget.rows(cost, riding.time, beside=riding in interactive)
        if room:
            riding.rode = self.steps + 1
        return riding, room

    def _evict_overdue(self, now: float) -> list[Answer]:
        deadlines = {
            key: job.chunk.deadline for key, job in self._jobs.items() if job.chunk.deadline is not None
        }
        answers = [
            self._evict(key, Status.DEADLINE, now) for key, deadline in deadlines.items() if deadline <= now
        ]
        self._next_deadline = min((d for d in deadlines.values() if d > now), default=math.inf)
        return answers

    def _evict(self, key: int, status: Status, now: float) -> Answer:
        self._jobs[key].pool.evict(key, status)
        return self._finish(key, now)

    def _finish(self, key: int, now: float) -> Answer:
        """The answer of a job whose last row left ``now``."""
        job = self._jobs.pop(key)
        if self._keys.get(job.chunk.id) == key:
            del self._keys[job.chunk.id]
        answer = _finish(job)
        admitted = now if job.task.admitted is None else job.task.admitted
        answer.queue_s, answer.solve_s = admitted - job.submitted, now - admitted
        count_rows(self._counts, answer)
        return answer


def _kind(chunk: Chunk) -> str:
    return "density" if chunk.density else "sample"


def _prepare(chunk: Chunk, model: Model, z: Array, inside: NDArray[np.bool_]) -> Task:
    """The rows of a chunk with their first stage evaluated, ready to join a batch."""
    encode = chunk.kind is Kind.ENCODE
    t_start, t_end = (model.t_data, model.t_base) if encode else (model.t_base, model.t_data)
    first = model.dt_data_to_base if encode else model.dt_base_to_data
    if chunk.t_end is not None:
        t_end = chunk.t_end
    rows = np.flatnonzero(inside)
    n, (total, dim) = len(rows), z.shape
    left = np.zeros((total, len(Clock)))
    left[:, Clock.T] = t_start
    clock, span = left[rows], np.empty((n, len(Span)))
    clock[:, Clock.CAP], clock[:, Clock.DT] = 10.0, math.copysign(first, t_end - t_start)
    span[:] = (t_end, chunk.rtol, chunk.atol, chunk.logp_atol, chunk.max_steps)
    context = [] if chunk.context is None else [chunk.context[rows]]
    batch: Batch = [rows[:, None].repeat(2, 1), clock, span]
    if n:
        start = model.program(f"start_{_kind(chunk)}_{chunk.precision}")
        batch += [*start(clock[:, Clock.T : Clock.T + 1], z[rows], *context), *context]
    status = np.full(total, Status.OUTSIDE_SUPPORT, np.uint8)
    return Task(batch, n, left, np.full((total, dim), np.nan), status)


def _finish(job: _Job) -> Answer:
    """Close the change of variables, where the integration went all the way."""
    chunk, task, clock = job.chunk, job.task, job.task.clock
    value, status = task.z, task.status
    with np.errstate(invalid="ignore"):  # rows that failed
        if chunk.t_end is not None:
            log_density = np.full(len(value), np.nan)
        elif chunk.kind is Kind.ENCODE:
            log_density = _base_log_density(value) + clock[:, Clock.ELL] + job.log_det
        else:
            value, log_det = _flat(job.model.program("decode")(value))
            log_density = job.base - clock[:, Clock.ELL] + log_det
    finite = np.isfinite(value).all(1)
    if chunk.density and chunk.t_end is None:
        finite &= np.isfinite(log_density)  # an overflow: −∞ is kept for rows outside the support
    broken = ~finite & (status == Status.OK)
    status[broken] = Status.NONFINITE
    failed = status != Status.OK
    value[failed] = np.nan
    log_density[failed if chunk.density else slice(None)] = np.nan
    if chunk.density and chunk.t_end is None:
        log_density[status == Status.OUTSIDE_SUPPORT] = -np.inf
    steps = clock[:, Clock.ATTEMPTS].astype(np.int32)
    return Answer(
        id=chunk.id,
        value=value,
        log_density=log_density,
        error_estimate=clock[:, Clock.ERROR].copy(),
        t=clock[:, Clock.T].copy(),
        steps=steps,
        accepted=clock[:, Clock.ACCEPTED].astype(np.int32),
        nfe=np.where(status == Status.OUTSIDE_SUPPORT, 0, 1 + steps * job.model.stages).astype(np.int32),
        status=status,
    )


def _base_log_density(z: Array) -> Array:
    """log N(z; 0, I) = −½ |z|² − ½ D log 2π; ``einsum`` sums a row without regard to the others."""
    dim = z.shape[1]
    result: Array = -0.5 * np.einsum("ij,ij->i", z, z) - 0.5 * dim * math.log(2 * math.pi)
    return result


def _flat(outputs: list[NDArray[np.floating]]) -> tuple[Array, Array]:
    value, log_det = outputs
    return value.astype(np.float64, copy=False), log_det[:, 0].astype(np.float64, copy=False)
