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
    """What a row needs before its first step: its state [z, k₁, tr₁], see ``solvers.state``.

    Args:
        field: f, in the precision of the program.
        divergence: whether ℓ is integrated; otherwise the state has no tr₁.
    """

    def __init__(self, field: VectorField, divergence: bool) -> None:
        super().__init__()
        self.field, self.divergence = field, divergence

    def forward(self, t: Tensor, z: Tensor, context: Tensor | None = None) -> Tensor:
        """T [B, 1] and z [B, D] in float64, context [B, C] → state [B, 2 D + 1], or [B, 2 D]."""
        dtype = next(self.field.parameters()).dtype
        t, z = t.to(dtype), z.to(dtype)
        c = None if context is None else context.to(dtype)
        if self.divergence:
            return torch.cat([z, *self.field.with_divergence(t, z, c)], 1)
        return torch.cat([z, self.field(t, z, c)], 1)


class Step(nn.Module):
    """One attempted step; see the module.

    The stages are sums of matrix products: with ⊗ the Kronecker product, stage inputs accumulate as
    [y₂ | y₃ | … | y₁ | error] ← · + h kⱼ (A_j ⊗ I), where A_j is column j of the tableau, so a stage costs
    one split, one product, and the field.  What depends on time, and the divergences, are computed for all
    stages at once, on rows of which those of one problem follow each other: [B S, ·] is [B, S ·] then.

    Args:
        field: f, in the precision of the program.
        tableau: the method.
        divergence: whether ℓ is integrated.
        interval: |t_data − t_base|, which sets the smallest step.
    """

    times: Tensor
    tile: Tensor
    mean: Tensor
    weights: Tensor
    gain: Tensor
    flip: Tensor
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
        # tensors, because a Python number in the graph is rounded to float32 on the way to ONNX
        double = {
            # [t_next, h] → t_next − (1 − c) h of every stage: c = 1 is t_next itself
            "times": [[1.0] * stages, [min(c - 1.0, 0.0) for c in tableau.c[1:]]],
            # h tr of every stage → what is added to [ℓ, Σ |error of ℓ|, accepted steps], before the |·|
            "weights": [[b, e, 0.0] for b, e in zip((*tableau.b, 0.0), error, strict=True)],
            "gain": [[0.0, 0.0, 1.0]],
            "flip": [[1.0, -1.0, 1.0]],
            "safety": SAFETY,
            "shrink": SHRINK,
            "merge": MERGE,
            "floor": FLOOR * interval,
        }
        for name, value in double.items():
            self.register_buffer(name, torch.tensor(value, dtype=torch.float64))
        self.register_buffer("tile", torch.cat([eye] * stages + [0 * eye], 1))
        self.register_buffer("mean", torch.full((dim, 1), 1 / dim, dtype=dtype))

    def forward(
        self, clock: Tensor, span: Tensor, state: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """See ``solvers.state``: clock, span, state and context [B, C] float64 → the next clock and state."""
        field, dim, stages, dtype = self.field, self.field.dim, self.tableau.stages, state.dtype
        t, sums, cap, dt, attempts, _ = torch.split(clock, [1, 3, 1, 1, 1, 1], 1)
        t_end, tolerances, logp_atol, max_steps = torch.split(span, [1, 2, 1, 1], 1)

        remaining = t_end - t
        final = (remaining / dt) <= self.merge
        h = torch.where(final, remaining, dt)
        t_next = t_end - (remaining - h)  # exactly t_end when final

        narrow = torch.cat([torch.cat([t_next, h], 1) @ self.times, h, tolerances], 1).to(dtype)
        times, h_narrow, rtol, atol = torch.split(narrow, [stages, 1, 1, 1], 1)
        repeated = (
            None if context is None else context.to(dtype).repeat(1, stages).view(-1, field.context_dim)
        )
        conditions = field.condition(times.reshape(-1, 1), repeated)
        parts = field.apart(conditions, stages)

        z, k, *trace = torch.split(state, [dim, dim, 1] if self.divergence else dim, 1)
        inputs = torch.addmm(z @ self.tile, k * h_narrow, self.get_buffer(self._columns[0]))
        z_next = z
        saved: list[Tensor] = []
        for stage in range(stages):
            z_next, inputs = torch.split(inputs, [dim, (stages - stage) * dim], 1)
            k, kept = field.stage(z_next, parts[stage])
            saved += kept
            inputs = torch.addmm(inputs, k * h_narrow, self.get_buffer(self._columns[stage + 1]))

        share = inputs / (atol + rtol * torch.maximum(z.abs(), z_next.abs()))
        ratio = ((share * share) @ self.mean).double().sqrt()
        state_next, gain = [z_next, k], self.gain
        if self.divergence:
            traces = field.divergence(torch.cat(saved, 1).view(-1, sum(field.saved_widths)), conditions)
            traces = traces.view(-1, stages)
            state_next.append(traces.narrow(1, stages - 1, 1))
            gain = torch.addmm(self.gain, torch.cat([*trace, traces], 1).double() * h, self.weights)
            gain = torch.maximum(gain, gain * self.flip)
            _, ell_error, _ = torch.split(gain, 1, 1)
            ratio = torch.maximum(ratio, ell_error / logp_atol)

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

        t, sums = torch.where(accept, t_next, t), torch.where(accept, sums + gain, sums)
        cap = torch.where(accept, GROW, 1.0)
        return (
            torch.cat([t, sums, cap, dt_next, attempts, stop], 1),
            torch.where(accept, torch.cat(state_next, 1), state),
        )


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
