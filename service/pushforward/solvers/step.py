"""One adaptive Runge–Kutta step for B independent rows, as a pure function of their state.

Every row has its own time, step, end, direction and tolerances.  A step is attempted, accepted or rejected,
and the next step size chosen, row by row; nothing couples two rows.  The function is written so that its
export has few operations (they are the cost at one row) and so that a row's bits do not depend on the batch:
no reductions but matrix products, and a controller of correctly rounded operations only (``sqrt`` chains for
powers).

Controller (integral, as in SciPy's RK45): with r the error ratio, accept when r < 1; the step is multiplied
by 0.9 r^(−exponent), clipped to [0.2, 10], and to at most 1 in the step after a rejection.

    r = max( RMS_d( errorᵈ / (atol + rtol · max(|z₀ᵈ|, |z₁ᵈ|)) ),  |error_ℓ| / logp_atol )

The log-density integral ℓ has a tolerance of its own, in nats, and none relative to its running value, which
has no scale.  A step that would pass t_end is cut to end there exactly, and y₁ is the answer: the field is
never evaluated outside the interval.  A ratio that is not finite counts as a rejection; NaN never reaches the
step size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pushforward.flows.fields import VectorField
from pushforward.solvers.state import Stop
from pushforward.solvers.tableau import Tableau

__all__ = ["Start", "Step"]

SAFETY, SHRINK, GROW = 0.9, 0.2, 10.0
MERGE = 1.0 + 1e-12  # a remainder this close to the step is taken with it
FLOOR = 1e-12  # smallest step, as a share of the interval
HUGE = 1e9  # error ratios at or above this, and NaN, are "not finite"


class Start(nn.Module):
    """What a row needs before its first step: its state [z, k₁] and the divergence at the start.

    Args:
        field: f, in the precision of the program.
        divergence: whether ℓ is integrated; otherwise its divergence is 0.
    """

    def __init__(self, field: VectorField, divergence: bool) -> None:
        super().__init__()
        self.field, self.divergence = field, divergence

    def forward(self, t: Tensor, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """T [B, 1] and z [B, D] in float64, context [B, C] → state [B, 2 D], divergence [B, 1] in float64."""
        dtype = next(self.field.parameters()).dtype
        z = z.to(dtype)
        conditions = self.field.condition(t.to(dtype), None if context is None else context.to(dtype))
        k, saved = self.field.stage(z, conditions)
        divergence = self.field.divergence(saved).double() if self.divergence else torch.zeros_like(t)
        return torch.cat([z, k], 1), divergence


class Step(nn.Module):
    """One attempted step; see the module.

    The stages are sums of matrix products: with ⊗ the Kronecker product, stage inputs accumulate as
    [y₂ | y₃ | … | y₁ | error] ← · + h kⱼ (A_j ⊗ I), where A_j is column j of the tableau, so a stage costs
    one split, one product, and the field.  Divergences of all stages are computed together at the end.

    Args:
        field: f, in the precision of the program.
        tableau: the method.
        divergence: whether ℓ is integrated.
        interval: |t_data − t_base|, which sets the smallest step.
    """

    weights: Tensor
    tile: Tensor
    remainders: Tensor
    mean: Tensor
    safety: Tensor
    shrink: Tensor
    merge: Tensor
    floor: Tensor

    def __init__(self, field: VectorField, tableau: Tableau, divergence: bool, interval: float = 1.0) -> None:
        super().__init__()
        self.field, self.tableau, self.divergence = field, tableau, divergence
        dim, stages = field.dim, tableau.stages
        dtype = next(field.parameters()).dtype
        eye = torch.eye(dim, dtype=dtype)
        self._columns: list[str] = []
        error = tableau.e or (0.0,) * (stages + 1)
        for j in range(stages + 1):
            column = [tableau.rows[i][j] for i in range(j, stages)] + [error[j]]
            self.register_buffer(f"column_{j}", torch.cat([weight * eye for weight in column], 1))
            self._columns.append(f"column_{j}")
        self.register_buffer("tile", torch.cat([eye] * stages + [0 * eye], 1))
        self.register_buffer(
            "remainders", (1.0 - torch.tensor([tableau.c[1:]], dtype=torch.float64)).clamp(min=0.0)
        )
        # tensors, because a Python number in the graph is rounded to float32 on the way to ONNX
        limits = {"safety": SAFETY, "shrink": SHRINK, "merge": MERGE, "floor": FLOOR * interval}
        for name, value in limits.items():
            self.register_buffer(name, torch.tensor(value, dtype=torch.float64))
        self.register_buffer("mean", torch.full((dim, 1), 1 / dim, dtype=dtype))
        last = [0.0] * stages + [1.0]
        weights = torch.tensor([(*tableau.b, 0.0), error, last], dtype=torch.float64).T
        self.register_buffer("weights", weights.contiguous())  # of ℓ, its error, the last stage

    def forward(
        self, clock: Tensor, span: Tensor, state: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """See ``solvers.state``: clock, span, state and context [B, C] float64 → the next clock and state."""
        field, dim, stages = self.field, self.field.dim, self.tableau.stages
        t, ell, error, divergence, accepted, cap, dt, attempts, _ = torch.split(clock, 1, 1)
        t_end, rtol, atol, logp_atol, max_steps = torch.split(span, 1, 1)
        rows = clock.shape[0]
        dtype = state.dtype

        remaining = t_end - t
        final = (remaining / dt) <= self.merge
        h = torch.where(final, remaining, dt)
        t_next = torch.where(final, t_end, t + h)

        times = (
            (t_next - h * self.remainders).to(dtype).T.reshape(-1, 1)
        )  # stage after stage; c = 1 is t_next itself
        repeated = None if context is None else context.to(dtype).repeat(stages, 1)
        conditions = [torch.split(c, [rows] * stages) for c in field.condition(times, repeated)]

        z, k = torch.split(state, dim, 1)
        h_cast = h.to(dtype)
        sums = torch.addmm(z @ self.tile, k * h_cast, self.get_buffer(self._columns[0]))
        z_next = z
        saved: list[tuple[Tensor, ...]] = []
        for stage in range(stages):
            z_next, sums = torch.split(sums, [dim, (stages - stage) * dim], 1)
            k, kept = field.stage(z_next, tuple(c[stage] for c in conditions))
            saved.append(kept)
            sums = torch.addmm(sums, k * h_cast, self.get_buffer(self._columns[stage + 1]))

        scale = atol.to(dtype) + rtol.to(dtype) * torch.maximum(z.abs(), z_next.abs())
        share = sums / scale
        ratio = ((share * share) @ self.mean).double().sqrt()
        if self.divergence:
            traces = field.divergence(tuple(torch.cat(parts) for parts in zip(*saved, strict=True)))
            traces = torch.cat([divergence, traces.view(stages, -1).T.double()], 1)
            ell_rate, error_rate, divergence_next = torch.split(traces @ self.weights, 1, 1)
            ell_error = (error_rate * h).abs()
            ratio = torch.maximum(ratio, ell_error / logp_atol)
            ell_next, error_next = ell + ell_rate * h, error + ell_error
        else:
            ell_next, error_next, divergence_next = ell, error, divergence

        finite = ratio < HUGE
        ratio = torch.where(finite, ratio, HUGE)
        accept = ratio < 1.0
        if self.tableau.adaptive:
            factor = torch.minimum(
                torch.maximum(self.safety / _power(ratio, self.tableau.exponent), self.shrink), cap
            )
        else:
            factor = torch.where(accept, 1.0, self.shrink)
        dt_next, attempts = h * factor, attempts + 1.0
        spent = torch.where(attempts >= max_steps, 1.0 * Stop.MAX_STEPS, 1.0 * Stop.RUNNING)
        stuck = torch.where(finite, 1.0 * Stop.STEP_UNDERFLOW, 1.0 * Stop.NONFINITE)
        stop = torch.where(dt_next.abs() < self.floor, stuck, spent)
        stop = torch.where(accept & final, 1.0 * Stop.FINISHED, stop)

        moved = torch.cat([t_next, ell_next, error_next, divergence_next, accepted + 1.0], 1)
        stayed = torch.cat([t, ell, error, divergence, accepted], 1)
        cap_next = torch.where(accept, GROW, 1.0)
        clock_next = torch.cat([torch.where(accept, moved, stayed), cap_next, dt_next, attempts, stop], 1)
        return clock_next, torch.where(accept, torch.cat([z_next, k], 1), state)


def _power(x: Tensor, exponent: float) -> Tensor:
    """x^exponent for a multiple of 1/16 below 1/2, by square roots: correctly rounded, unlike ``pow``."""
    sixteenths = round(exponent * 16)
    assert 0 < sixteenths < 8 and sixteenths == exponent * 16
    root = x.sqrt()
    result: Tensor | None = None
    for bit in (4, 2, 1):
        root = root.sqrt()
        if sixteenths & bit:
            result = root if result is None else result * root
    assert result is not None
    return result
