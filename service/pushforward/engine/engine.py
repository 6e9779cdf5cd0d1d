"""The engine: continuous batching of initial value problems.

``Engine.step`` is the loop's body and reads whole: every pool takes one turn (admit → step → release, see
``Pool``), and the chunks whose last row has left are finished into answers.  The caller runs it while
``engine.busy``.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from pushforward.engine.pool import Batch, Pool, Task
from pushforward.engine.request import Answer, Array, Chunk, Kind, Status
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


class Engine:
    """Integrates rows.

    Args:
        models: the model of a (name, version); called at every submission, so it should remember.
        slots: the most rows in flight per pool.
        clock: seconds, for deadlines.
    """

    def __init__(
        self,
        models: Callable[[str, int], Model],
        slots: int = 256,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._models, self._slots, self._clock = models, slots, clock
        self._pools: dict[tuple[str, int, bool, str], Pool] = {}
        self._jobs: dict[int, _Job] = {}
        self._serial = 0
        self._finished: list[Answer] = []  # chunks that were done at submission

    @property
    def busy(self) -> bool:
        """Whether a step would do anything."""
        return bool(self._jobs or self._finished)

    @property
    def running(self) -> int:
        """Rows in flight."""
        return sum(pool.running for pool in self._pools.values())

    @property
    def waiting(self) -> int:
        """Rows that have been submitted and not yet admitted."""
        return sum(pool.scheduler.waiting for pool in self._pools.values())

    def submit(self, chunk: Chunk) -> None:
        """Take a chunk; its answer comes from a later ``step``."""
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
        job = _Job(chunk, model, task, self._pools[key], log_det, base)
        self._serial += 1
        if task.left:
            self._jobs[self._serial] = job
            job.pool.add(self._serial, task)
        else:
            self._finished.append(_finish(job))

    def step(self) -> list[Answer]:
        """Advance every row in flight by one attempted step; returns the chunks that are done."""
        answers, self._finished = self._finished, []
        now = self._clock()
        for key in [
            k for k, job in self._jobs.items() if job.chunk.deadline is not None and job.chunk.deadline <= now
        ]:
            answers.append(self._evict(key, Status.DEADLINE))
        for pool in self._pools.values():
            if pool.tasks:
                answers += [_finish(self._jobs.pop(key)) for key in pool.turn()]
        return answers

    def cancel(self, id: str) -> Answer | None:
        """Take a chunk out at once; returns its answer so far, or None when it is not here (any more)."""
        for key, job in self._jobs.items():
            if job.chunk.id == id:
                return self._evict(key, Status.CANCELLED)
        return None

    def forget(self, model: str, version: int) -> None:
        """Drop the idle pools of a model version that is being unloaded."""
        self._pools = {k: p for k, p in self._pools.items() if k[:2] != (model, version) or p.tasks}

    def _evict(self, key: int, status: Status) -> Answer:
        job = self._jobs.pop(key)
        job.pool.evict(key, status)
        return _finish(job)


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
    clock, span = np.zeros((n, len(Clock))), np.empty((n, len(Span)))
    clock[:, Clock.T], clock[:, Clock.CAP] = t_start, 10.0
    clock[:, Clock.DT] = math.copysign(first, t_end - t_start)
    span[:] = (t_end, chunk.rtol, chunk.atol, chunk.logp_atol, chunk.max_steps)
    context = [] if chunk.context is None else [chunk.context[rows]]
    batch: Batch = [np.stack([rows, rows], 1), clock, span]
    if n:
        start = model.program(f"start_{_kind(chunk)}_{chunk.precision}")
        state, divergence = start(clock[:, Clock.T : Clock.T + 1], z[rows], *context)
        clock[:, Clock.DIVERGENCE] = divergence[:, 0]
        batch += [state, *context]
    status = np.full(total, Status.OUTSIDE_SUPPORT, np.uint8)
    left = np.zeros((total, len(Clock)))
    left[:, Clock.T] = t_start
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
