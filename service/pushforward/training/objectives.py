"""What training minimises: conditional flow matching, or the negative log-likelihood through the adjoint.

Shapes: B rows of a batch, D features, C context features.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torchdiffeq import odeint, odeint_adjoint

from pushforward.flows.fields import VectorField
from pushforward.flows.flow import base_log_density

__all__ = ["flow_matching", "log_density", "maximum_likelihood", "optimal_pairs"]


def flow_matching(
    field: VectorField,
    x0: Tensor,
    x1: Tensor,
    t: Tensor,
    context: Tensor | None = None,
    noise: float = 0.05,
) -> Tensor:
    """Conditional flow matching on straight paths (Lipman et al. 2023, arXiv:2210.02747, section 4.1).

    x_t = (1 − (1 − σ) t) x₀ + t x₁,  loss = mean |f(t, x_t, c) − (x₁ − (1 − σ) x₀)|² / D.

    The flow that minimises it carries N(0, I) to the density of x₁ + N(0, σ²), whatever joint distribution
    the pairs (x₀, x₁) have, as long as x₀ alone is N(0, I), given the context.

    Args:
        field: f.
        x0: [B, D] noise.
        x1: [B, D] data.
        t: [B, 1] times in [0, 1].
        context: [B, C] or None.
        noise: σ.
    """
    x_t = (1 - (1 - noise) * t) * x0 + t * x1
    target = x1 - (1 - noise) * x0
    loss: Tensor = (field(t, x_t, context) - target).square().mean()
    return loss


def optimal_pairs(
    x0: Tensor, x1: Tensor, context: Tensor | None = None, group: int = 256, context_weight: float = 1e3
) -> Tensor:
    """Which x₀ goes to which x₁ so that paths are short: minibatch optimal transport.

    Solves min Σ |x₀ − x₁|² + w |c − c'|² over permutations within groups of rows, exactly (Tong et al. 2024,
    arXiv:2302.00482, section 3.3).  With context, the noise keeps the context it was drawn for, and a large w
    forbids exchanges between different contexts; otherwise x₀ would depend on c and the conditional be wrong
    (Kerrigan et al. 2024, arXiv:2404.04240).

    Returns:
        index [B]: x₀[index] is to be paired with x₁.
    """
    parts = []
    for start in range(0, len(x0), group):
        rows = slice(start, start + group)
        cost = torch.cdist(x1[rows], x0[rows]).square()
        if context is not None:
            cost = cost + context_weight * torch.cdist(context[rows], context[rows]).square()
        parts.append(start + linear_sum_assignment(cost.numpy())[1])
    return torch.from_numpy(np.concatenate(parts))


class _Augmented(nn.Module):
    """d(z, ℓ)/dt = (f, tr ∂f/∂z), in torchdiffeq's calling convention."""

    def __init__(self, field: VectorField, context: Tensor | None) -> None:
        super().__init__()
        self.field, self.context = field, context

    def forward(self, t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return self.field.with_divergence(t, state[0], self.context)


def log_density(
    field: VectorField,
    z: Tensor,
    context: Tensor | None = None,
    *,
    t_base: float = 0.0,
    t_data: float = 1.0,
    steps: int = 32,
    adjoint: bool = False,
) -> Tensor:
    """log p(z) [B, 1] in the coordinates of the field, by the classical Runge–Kutta method in equal steps.

    log p(z) = log N(z(t_base)) + ∫_{t_data}^{t_base} tr(∂f/∂z) dt  (Chen et al. 2018, theorem 1).

    Args:
        field: f.
        z: [B, D] at t_data.
        context: [B, C] or None.
        t_base: time of the base.
        t_data: time of the data.
        steps: how many; 4 evaluations each.
        adjoint: differentiate by the adjoint equation, whose memory does not grow with ``steps``,
            instead of through the solver (Chen et al. 2018, section 2).
    """
    times = torch.tensor([t_data, t_base], dtype=z.dtype)
    options = {"step_size": abs(t_base - t_data) / steps}
    start = (z, z.new_zeros(len(z), 1))
    solve: Any = odeint_adjoint if adjoint else odeint
    ends, integrals = solve(_Augmented(field, context), start, times, method="rk4", options=options)
    log_p: Tensor = base_log_density(ends[-1]) + integrals[-1]
    return log_p


def maximum_likelihood(
    field: VectorField, x1: Tensor, context: Tensor | None = None, steps: int = 16, adjoint: bool = True
) -> Tensor:
    """−(1 / B D) Σ log p(x₁ | c): the negative log-likelihood per feature, differentiated by the adjoint."""
    return -log_density(field, x1, context, steps=steps, adjoint=adjoint).mean() / x1.shape[1]
