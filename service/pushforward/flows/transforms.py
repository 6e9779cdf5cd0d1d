"""Invertible layers in front of the flow, with their log|det|, always in float64.

``encode`` maps raw data x to the flow's coordinates z and returns log|det ∂z/∂x|; ``decode`` is its inverse
and returns the same log-determinant, of x → z at the x it found.  By the change of variables log p(x) = log
p(z) + log|det ∂z/∂x|.  Outside a transform's support the log-determinant is −∞: an answer, not a failure.

Shapes: x and z [n, D], log-determinants [n, 1].  Sums over features are matrix products and logarithms act on
    widths
padded to multiples of sixteen, for the sake of the bits (see ``fields``).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from pushforward.flows.fields import WIDTH_MULTIPLE

__all__ = ["Compose", "Log", "Logit", "Standardize", "Transform", "Whiten"]


class Transform(nn.Module, ABC):
    """An invertible map x → z of R^D."""

    dim: int

    @abstractmethod
    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Z [n, D] and log|det ∂z/∂x| [n, 1]."""

    @abstractmethod
    def decode(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """X [n, D] and log|det ∂z/∂x| [n, 1] at that x."""


def _rows_of(value: Tensor, like: Tensor) -> Tensor:
    return value.expand(like.shape[0], 1)


def _padded(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Apply an element-wise function on a width that is a multiple of sixteen; padding is 1/2."""
    dim = x.shape[1]
    return function(nn.functional.pad(x, (0, -dim % WIDTH_MULTIPLE), value=0.5))[:, :dim]


class Standardize(Transform):
    """z = (x − mean) / scale, feature by feature."""

    mean: Tensor
    scale: Tensor

    def __init__(self, mean: Tensor, scale: Tensor) -> None:
        super().__init__()
        if not bool((scale > 0).all()):
            raise ValueError("every scale must be positive")
        self.dim = mean.numel()
        self.register_buffer("mean", mean.double().reshape(1, -1))
        self.register_buffer("scale", scale.double().reshape(1, -1))

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """See the class."""
        return (x - self.mean) / self.scale, _rows_of(-self.scale.log().sum(), x)

    def decode(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """See the class."""
        return z * self.scale + self.mean, _rows_of(-self.scale.log().sum(), z)


class Whiten(Transform):
    """z = L⁻¹ (x − mean), with covariance L Lᵀ: full-covariance whitening."""

    mean: Tensor
    cholesky: Tensor
    inverse: Tensor

    def __init__(self, mean: Tensor, cholesky: Tensor) -> None:
        super().__init__()
        self.dim = mean.numel()
        self.register_buffer("mean", mean.double().reshape(1, -1))
        self.register_buffer("cholesky", cholesky.double())
        eye = torch.eye(self.dim, dtype=torch.float64)
        self.register_buffer(
            "inverse", torch.linalg.solve_triangular(cholesky.double(), eye, upper=False), persistent=False
        )

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """See the class."""
        return (x - self.mean) @ self.inverse.T, _rows_of(-self.cholesky.diagonal().log().sum(), x)

    def decode(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """See the class."""
        return z @ self.cholesky.T + self.mean, _rows_of(-self.cholesky.diagonal().log().sum(), z)


class Log(Transform):
    """z = log(x − lower) for the chosen features, which live above ``lower``; the others pass."""

    chosen: Tensor
    lower: Tensor

    def __init__(self, dim: int, features: Sequence[int], lower: float = 0.0) -> None:
        super().__init__()
        self.dim = dim
        self.register_buffer("lower", torch.tensor([[lower]], dtype=torch.float64))
        self.register_buffer("chosen", _one_hot(dim, features))

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """See the class."""
        inside = x > self.lower
        safe = torch.where(self.chosen & inside, x - self.lower, 1.0)
        z = _padded(torch.log, safe)
        return torch.where(self.chosen, z, x), _sum(-z) + _outside(self.chosen & ~inside)

    def decode(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """See the class."""
        chosen = torch.where(self.chosen, z, 0.0)
        return torch.where(self.chosen, _padded(torch.exp, chosen) + self.lower, z), _sum(-chosen)


class Logit(Transform):
    """z = log(u / (1 − u)), u = (x − lower) / (upper − lower), for the chosen features; the others pass."""

    chosen: Tensor
    lower: Tensor
    width: Tensor
    log_width: Tensor

    def __init__(self, dim: int, features: Sequence[int], lower: float = 0.0, upper: float = 1.0) -> None:
        super().__init__()
        if not lower < upper:
            raise ValueError(f"lower must be below upper, not {lower} and {upper}")
        self.dim = dim
        self.register_buffer("lower", torch.tensor([[lower]], dtype=torch.float64))
        self.register_buffer("width", torch.tensor([[upper - lower]], dtype=torch.float64))
        chosen = _one_hot(dim, features)
        self.register_buffer("chosen", chosen)
        self.register_buffer("log_width", chosen.double().sum() * self.width.log(), persistent=False)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """See the class."""
        u = (x - self.lower) / self.width
        inside = (u > 0) & (u < 1)
        safe = torch.where(self.chosen & inside, u, 0.5)
        log_u, log_v = _padded(torch.log, safe), _padded(torch.log, 1 - safe)
        slope = torch.where(self.chosen, -(log_u + log_v), 0.0)
        outside = _outside(self.chosen & ~inside)
        return torch.where(self.chosen, log_u - log_v, x), _sum(slope) - self.log_width + outside

    def decode(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """See the class."""
        chosen = torch.where(self.chosen, z, 0.0)
        u = _padded(torch.sigmoid, chosen)
        # −log u − log(1 − u) = |z| + 2 log(1 + e^−|z|), which no z can make infinite
        far = chosen.abs()
        slope = torch.where(self.chosen, far + 2 * _padded(torch.log, 1 + _padded(torch.exp, -far)), 0.0)
        return torch.where(self.chosen, u * self.width + self.lower, z), _sum(slope) - self.log_width


class Compose(Transform):
    """Several transforms, encoded from first to last."""

    def __init__(self, transforms: Sequence[Transform]) -> None:
        super().__init__()
        if not transforms or len({t.dim for t in transforms}) != 1:
            raise ValueError("compose needs at least one transform, all of one dim")
        self.transforms = nn.ModuleList(transforms)
        self.dim = transforms[0].dim

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """See the class."""
        total: Tensor | float = 0.0
        for transform in cast(list[Transform], list(self.transforms)):
            x, log_det = transform.encode(x)
            total = total + log_det
        assert isinstance(total, Tensor)
        return x, total

    def decode(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """See the class."""
        total: Tensor | float = 0.0
        for transform in reversed(cast(list[Transform], list(self.transforms))):
            z, log_det = transform.decode(z)
            total = total + log_det
        assert isinstance(total, Tensor)
        return z, total


def _one_hot(dim: int, features: Sequence[int]) -> Tensor:
    if not features or not all(0 <= feature < dim for feature in features):
        raise ValueError(f"features must name columns in 0 … {dim - 1}, not {list(features)}")
    chosen = torch.zeros(1, dim, dtype=torch.bool)
    chosen[:, list(features)] = True
    return chosen


def _sum(x: Tensor) -> Tensor:
    return x @ x.new_ones(x.shape[1], 1)


def _outside(mask: Tensor) -> Tensor:
    """−∞ for rows in which any feature is outside, else 0."""
    count = _sum(mask.double())
    return torch.where(count > 0, -torch.inf, 0.0).to(count)
