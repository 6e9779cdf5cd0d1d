"""Choose the tolerances of a version, and measure the true error of what it will serve.

A tolerance bounds the local error of a step, not the error of the answer: rows miss by up to 70 times the
tolerance on rough fields.  So publishing solves held-out rows in float64 with an 8th-order method at 1e-10,
and takes the loosest tolerance whose served answers stay within the bound.  What was measured goes into the
manifest, as the certificate.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from pushforward.engine.request import Answer, Array, Chunk, Kind, Status
from pushforward.errors import PublishFailed
from pushforward.flows.flow import Flow
from pushforward.loading import run_chunk
from pushforward.noise import standard_normal
from pushforward.programs.runtime import Program
from pushforward.solvers.solve import log_density
from pushforward.store.manifest import Certificate, Solver

__all__ = ["Draft", "Rows", "certify", "gather", "reference_text"]

BOUND = 1e-3  # nats
SHARE = 0.999  # of the rows within the bound
MARGIN = 0.5  # the quantile that is measured must keep this share of the bound
ENOUGH = 1000  # rows; smaller tables are filled up with the model's own samples
MOST = 2000
TOLERANCES = (1e-3, 3e-4, 1e-4, 3e-5, 1e-5, 3e-6, 1e-6, 1e-7)
LOGP_RATIO = 10  # logp_atol / atol: fewest steps at equal error of log p, see docs/decisions.md
FIRST_STEPS = (0.01, 0.02, 0.04, 0.07, 0.1, 0.15, 0.2, 0.3)  # shares of the interval
MAX_STEPS = 1000


@dataclass
class Draft:
    """A version that is being made, as the engine sees a model."""

    folder: Path
    programs: dict[str, str]
    t_base: float
    t_data: float
    stages: int
    dt_data_to_base: float
    dt_base_to_data: float

    def __post_init__(self) -> None:
        self._loaded: dict[str, Program] = {}

    def program(self, name: str) -> Program:
        """See ``engine.Model``."""
        if name not in self._loaded:
            self._loaded[name] = Program((self.folder / self.programs[name]).read_bytes(), name)
        return self._loaded[name]


@dataclass
class Rows:
    """Rows to measure on, with their reference answers: x [n, D], context [n, C], log p [n] and z [n, D]."""

    x: Array
    context: Array | None
    log_density: Array
    z: Array
    held_out: int

    def first(self, n: int) -> tuple[Array, Array | None, Array]:
        """X, context and log p of the first n rows."""
        return self.x[:n], None if self.context is None else self.context[:n], self.log_density[:n]


def reference_text(rows: Rows) -> str:
    """What the certificate's errors are measured against."""
    sampled = len(rows.x) - rows.held_out
    what = f"{rows.held_out} held-out rows" + (
        f" and {sampled} of the model's own samples" if sampled else ""
    )
    return f"{what}; torch, float64, dopri8, rtol = atol = 1e-10"


def gather(draft: Draft, flow: Flow, x: Array, context: Array | None, advance: Callable[[str], None]) -> Rows:
    """Up to 2,000 held-out rows, filled up to 1,000 with samples, and their references."""
    chosen = np.random.default_rng(0).permutation(len(x))[:MOST]
    x, context = x[chosen], None if context is None else context[chosen]
    held_out, missing = len(x), ENOUGH - len(x)
    if missing > 0:
        c = None if context is None else context[np.arange(missing) % held_out]
        answer = _solve(draft, _tight(Kind.DECODE), standard_normal(0, 0, missing, flow.dim), c)
        arrived = answer.status == Status.OK
        x = np.concatenate([x, answer.value[arrived]])
        if context is not None and c is not None:
            context = np.concatenate([context, c[arrived]])
    log_densities, points = [], []
    for start in range(0, len(x), 250):
        part = slice(start, start + 250)
        c_part = None if context is None else torch.from_numpy(context[part])
        value, z = log_density(flow, torch.from_numpy(x[part]), c_part)
        log_densities.append(value.numpy())
        points.append(z.numpy())
        advance(f"reference {min(start + 250, len(x))}/{len(x)}")
    reference = np.concatenate(log_densities)
    if np.isnan(reference).any():
        row = int(np.isnan(reference).argmax())
        raise PublishFailed(
            f"The field cannot be integrated from {'held-out row' if row < held_out else 'sample'} {row}: "
            "even in float64 at 1e-10 it does not arrive. Is the field finite on the whole interval?"
        )
    return Rows(x, context, reference, np.concatenate(points), held_out)


def certify(
    draft: Draft, rows: Rows, method: str, tolerance: float | None, advance: Callable[[str], None]
) -> tuple[Solver, Certificate]:
    """The solver settings to serve with and their certificate.

    Args:
        draft: the programs; its first steps are set to the tuned ones.
        rows: what to measure on.
        method: name of the method the programs contain.
        tolerance: rtol = atol to use, and a tenth of logp_atol; None picks the loosest that meets the bound.
        advance: told what is being tried.

    Raises:
        PublishFailed: when no tolerance meets the bound, in either precision.
    """
    best: tuple[float, Solver, Certificate] | None = None
    precisions = [p for p in ("float32", "float64") if f"step_density_{p}" in draft.programs]
    for precision in precisions:
        for tried in (tolerance,) if tolerance else TOLERANCES:
            advance(f"tolerance {tried:g}, {precision}")
            chunk = replace(_tight(Kind.ENCODE), precision=precision, rtol=tried, atol=tried)
            chunk = replace(chunk, logp_atol=LOGP_RATIO * tried)
            draft.dt_data_to_base = draft.dt_base_to_data = 0.05 * abs(draft.t_data - draft.t_base)
            if _quantile(draft, chunk, rows) > MARGIN * BOUND and tolerance is None:
                continue
            solver, certificate = _measure(draft, chunk, rows, method)
            if tolerance is not None or certificate.p999 <= BOUND:
                return solver, certificate
            if best is None or certificate.p999 < best[0]:
                best = (certificate.p999, solver, certificate)
    missed = f"the best it reached is {best[0]:.1e}" if best else "nothing came near"
    raise PublishFailed(
        f"No tolerance keeps log p of {SHARE:.1%} of the rows within {BOUND:g} nats of its reference; "
        f"{missed}. The field is very rough, or the rows lie far from what it was trained on. "
        "Pass tolerance=… to publish it as it is: the certificate will then say how large its error is."
    )


def _measure(draft: Draft, chunk: Chunk, rows: Rows, method: str) -> tuple[Solver, Certificate]:
    """Tune the first steps of both directions, then measure."""
    few = slice(0, 200)
    context = None if rows.context is None else rows.context[few]
    interval = abs(draft.t_data - draft.t_base)
    decode = replace(chunk, kind=Kind.DECODE, density=False)

    def cost(share: float, forward: bool) -> float:
        draft.dt_base_to_data = draft.dt_data_to_base = share * interval
        answer = (
            _solve(draft, decode, rows.z[few], context)
            if forward
            else _solve(draft, chunk, rows.x[few], context)
        )
        return float(answer.steps.mean())

    to_data = min(FIRST_STEPS, key=lambda share: cost(share, True)) * interval
    to_base = min(FIRST_STEPS, key=lambda share: cost(share, False)) * interval
    draft.dt_base_to_data, draft.dt_data_to_base = to_data, to_base
    answer = _solve(draft, chunk, rows.x, rows.context)
    error = _error(answer, rows)
    solver = Solver(
        method=method,
        rtol=chunk.rtol,
        atol=chunk.atol,
        logp_atol=chunk.logp_atol,
        precision="float64" if chunk.precision == "float64" else "float32",
        dt_data_to_base=to_base,
        dt_base_to_data=to_data,
        max_steps=MAX_STEPS,
    )
    p50, p99, p999, largest = (float(q) for q in np.quantile(error, [0.5, 0.99, SHARE, 1.0], method="higher"))
    certificate = Certificate(
        rows=len(error),
        reference=reference_text(rows),
        p50=p50,
        p99=p99,
        p999=p999,
        max=largest,
        share_within_1e3=float((error <= BOUND).mean()),
        steps_mean=float(answer.steps.mean()),
        steps_max=int(answer.steps.max()),
        created_on=_machine(),
    )
    return solver, certificate


def _quantile(draft: Draft, chunk: Chunk, rows: Rows) -> float:
    return float(
        np.quantile(_error(_solve(draft, chunk, rows.x, rows.context), rows), SHARE, method="higher")
    )


def _error(answer: Answer, rows: Rows) -> NDArray[np.float64]:
    """|log p − reference|; 0 where both are −∞, huge where a row failed."""
    with np.errstate(invalid="ignore"):
        error = np.abs(answer.log_density - rows.log_density)
    error[answer.log_density == rows.log_density] = 0.0
    return np.nan_to_num(error, nan=1e300, posinf=1e300)


def _solve(draft: Draft, chunk: Chunk, rows: Array, context: Array | None) -> Answer:
    return run_chunk(draft, replace(chunk, rows=rows, context=context))


def _tight(kind: Kind) -> Chunk:
    return Chunk(
        id="certify",
        model="draft",
        version=1,
        kind=kind,
        density=kind is Kind.ENCODE,
        rows=np.empty((0, 0)),
        rtol=1e-6,
        atol=1e-6,
        logp_atol=1e-6,
        max_steps=MAX_STEPS,
    )


def _machine() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or "unknown processor"
    return f"{name}, {platform.machine()}"
