"""A continuous normalizing flow: a transform, a vector field on an interval, and a standard normal base."""

from __future__ import annotations

import math

from torch import Tensor, nn

from pushforward.flows.fields import VectorField
from pushforward.flows.transforms import Transform

__all__ = ["Flow", "base_log_density"]


def base_log_density(z: Tensor) -> Tensor:
    """log N(z; 0, I) = −½ |z|² − ½ D log 2π, in nats; [n, D] → [n, 1]."""
    return -0.5 * ((z * z) @ z.new_ones(z.shape[1], 1)) - 0.5 * z.shape[1] * math.log(2 * math.pi)


class Flow(nn.Module):
    """p(x | c): x = decode(z(t_data)), dz/dt = f(t, z, c), z(t_base) ~ N(0, I).

    log p(x) = log N(z(t_base)) + ∫_{t_data}^{t_base} tr(∂f/∂z) dt + log|det ∂ encode(x)/∂x|
    (Chen et al. 2018, arXiv:1806.07366, theorem 1).

    Args:
        field: f.
        transform: raw data ↔ the coordinates of the field.
        t_base: the time of the base distribution.
        t_data: the time of the data.
    """

    def __init__(
        self, field: VectorField, transform: Transform, t_base: float = 0.0, t_data: float = 1.0
    ) -> None:
        super().__init__()
        if transform.dim != field.dim:
            raise ValueError(f"the transform has {transform.dim} features, the field {field.dim}")
        if not (math.isfinite(t_base) and math.isfinite(t_data) and t_base != t_data):
            raise ValueError(f"the interval must have two different finite ends, not {t_base} and {t_data}")
        self.field, self.transform = field, transform
        self.t_base, self.t_data = float(t_base), float(t_data)
        self.dim, self.context_dim = field.dim, field.context_dim
