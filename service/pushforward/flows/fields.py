"""Vector fields f(t, z, c) and their divergence tr(∂f/∂z).

A field answers one question in two ways.  ``forward(t, z, c)`` is the plain evaluation, used in training.
The staged protocol is what a Runge–Kutta step uses: a step knows the times of all its stages beforehand, so
everything that depends on time and context only is computed once for all of them (``condition``); ``stage``
evaluates the field and keeps what the divergence needs; ``divergence`` turns what all stages kept into all
their divergences at once.  At one row this makes a step several times cheaper, because its cost is the number
of operations, not their size.  For the same reason what depends on time, and what is kept, travel side by
side in few wide matrices (``condition_widths``, ``saved_widths`` say what their columns are): one operation
makes them, one splits them.

Shapes: n rows, D features, C context features.  t is [n, 1], z is [n, D], c is [n, C] or None.  The rows may
    be
several stages of the same batch, one below the other.

Rules that make a row's bits independent of its batch (DESIGN of the step, ``docs/decisions.md``): sums over
features are matrix products, and element-wise functions act on widths that are multiples of sixteen.
"""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Literal, cast

import torch
from torch import Tensor, nn

__all__ = ["MLP", "Hutchinson", "Linear", "Sum", "VectorField", "Wrapped", "planar"]

WIDTH_MULTIPLE = 16  # one AVX-512 register of float32: element-wise kernels never meet a remainder

Exactness = Literal["closed_form", "forward_mode", "reverse_mode", "hutchinson"]
Conditions = Sequence[Tensor]
Saved = tuple[Tensor, ...]


class VectorField(nn.Module, ABC):
    """dz/dt = f(t, z, c) on R^D, with the divergence tr(∂f/∂z) per row.

    Attributes:
        dim: D.
        context_dim: C; 0 for an unconditional field.
        exactness: how the divergence is computed: ``closed_form``, ``forward_mode``,
            ``reverse_mode`` or ``hutchinson``.
        condition_widths: of each matrix that ``condition`` makes, the columns that belong together.
        saved_widths: columns of each matrix that a stage saves.
    """

    dim: int
    context_dim: int
    exactness: Exactness
    condition_widths: tuple[tuple[int, ...], ...]
    saved_widths: tuple[int, ...]

    @abstractmethod
    def condition(self, t: Tensor, c: Tensor | None) -> Conditions:
        """All that depends on time [n, 1] and context [n, C] only, in matrices [n, ·]."""

    @abstractmethod
    def stage(self, z: Tensor, conditions: Conditions) -> tuple[Tensor, Saved]:
        """The field at z [n, D] under conditions that are taken apart, and what ``divergence`` needs."""

    @abstractmethod
    def divergence(self, saved: Tensor, conditions: Conditions) -> Tensor:
        """tr(∂f/∂z) [n, 1] of evaluations under these conditions; what they saved is side by side."""

    def apart(self, conditions: Conditions, stages: int = 1) -> list[tuple[Tensor, ...]]:
        """The parts of conditions for every stage, when the rows of a problem's stages follow each other."""
        parts: list[tuple[Tensor, ...]] = [()] * stages
        for matrix, widths in zip(conditions, self.condition_widths, strict=True):
            columns = torch.split(matrix.view(-1, stages * sum(widths)), [*widths] * stages, 1)
            for stage in range(stages):
                parts[stage] += columns[stage * len(widths) : (stage + 1) * len(widths)]
        return parts

    def forward(self, t: Tensor | float, z: Tensor, c: Tensor | None = None) -> Tensor:
        """f(t, z, c) [n, D]; t is a number or one per row."""
        conditions = self.condition(_column(t, z), c)
        return self.stage(z, self.apart(conditions)[0])[0]

    def with_divergence(self, t: Tensor | float, z: Tensor, c: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """f(t, z, c) [n, D] and tr(∂f/∂z) [n, 1]."""
        conditions = self.condition(_column(t, z), c)
        value, saved = self.stage(z, self.apart(conditions)[0])
        return value, self.divergence(torch.cat(saved, 1), conditions)


def _column(t: Tensor | float, z: Tensor) -> Tensor:
    t = torch.as_tensor(t, dtype=z.dtype, device=z.device)
    return t.expand(z.shape[0], 1) if t.ndim == 0 else t.reshape(-1, 1)


def _pull(function: Callable[[Tensor], Tensor], z: Tensor, cotangents: Tensor) -> Tensor:
    """Row by row, cotangentᵀ ∂function/∂z; ``torch.func.vjp`` says the same but cannot be exported."""
    with torch.enable_grad():
        z = z.detach().requires_grad_(True)
        (rows,) = torch.autograd.grad(function(z), z, cotangents)
    return rows


class FourierTime(nn.Module):
    """sin and cos of k π t / 2 for k = 1 … 8: sixteen features of a time in about [0, 1]."""

    features = WIDTH_MULTIPLE
    frequency: Tensor
    phase: Tensor

    def __init__(self) -> None:
        super().__init__()
        k = torch.arange(1, self.features // 2 + 1) * (math.pi / 2)
        self.register_buffer("frequency", torch.cat([k, k])[None], persistent=False)
        phase = torch.arange(2).repeat_interleave(self.features // 2) * (math.pi / 2)
        self.register_buffer("phase", phase[None], persistent=False)

    def forward(self, t: Tensor) -> Tensor:
        """[n, 1] → [n, 16]."""
        return torch.sin(torch.addmm(self.phase, t, self.frequency))


class PlainTime(nn.Module):
    """The time itself, as most fields written for other libraries take it."""

    features = 1

    def forward(self, t: Tensor) -> Tensor:
        """[n, 1] → [n, 1]."""
        return t


def _tanh(a: Tensor) -> tuple[Tensor, Tensor]:
    h = torch.tanh(a)
    return h, h


def _tanh_slope(h: Tensor) -> Tensor:
    return 1 - h * h


def _silu(a: Tensor) -> tuple[Tensor, Tensor]:
    return a * torch.sigmoid(a), a


def _silu_slope(a: Tensor) -> Tensor:
    return torch.sigmoid(a) * (1 + a * torch.sigmoid(-1 * a))  # one ONNX Runtime node for a σ(−1 a)


def _softplus(a: Tensor) -> tuple[Tensor, Tensor]:
    return torch.relu(a) + torch.log(1 + torch.exp(-a.abs())), a  # ONNX Runtime has no float64 Softplus


# name: (a → σ(a) and what its slope needs, that → σ'(a))
ACTIVATIONS: dict[str, tuple[Callable[[Tensor], tuple[Tensor, Tensor]], Callable[[Tensor], Tensor]]] = {
    "tanh": (_tanh, _tanh_slope),
    "silu": (_silu, _silu_slope),
    "softplus": (_softplus, torch.sigmoid),
}


class MLP(VectorField):
    """A perceptron whose every layer has biases, and if asked gates, that depend on time and context.

    hₗ = gₗ(t, c) ∘ σ(Wₗ hₗ₋₁ + bₗ(t, c)),  f = W_L h_{L−1} + b_L(t, c),  h₀ = z, with b and g affine in
    (time features, c), g = 2 · sigmoid(affine), or g = 1 without gates.

    With dₗ = gₗ ∘ σ'(·), the divergence has a closed form for one and two hidden layers:
    tr ∂f/∂z = Σ d₁ ∘ diag(W₁ W₂)  and  d₂ᵀ (W₂ ∘ (W₁ W₃)ᵀ) d₁.
    The bracket is constant, so the second costs one h₁ × h₂ product whatever D is.  The first is the planar
    flow of Chen et al. 2018 (arXiv:1806.07366, section 4) with M = h₁.  Deeper perceptrons push all D
    tangents forward.

    Args:
        dim: D.
        hidden: widths of the hidden layers, multiples of 16.
        context_dim: C.
        activation: ``silu``, ``tanh`` or ``softplus``.
        gate: whether hidden units are gated.
        time: the features of time.

    >>> field = MLP(3, hidden=(16, 16))
    >>> value, divergence = field.with_divergence(0.5, torch.randn(4, 3))
    >>> value.shape, divergence.shape
    (torch.Size([4, 3]), torch.Size([4, 1]))
    """

    def __init__(
        self,
        dim: int,
        hidden: Sequence[int] = (256, 256),
        context_dim: int = 0,
        activation: str = "silu",
        gate: bool = False,
        time: FourierTime | PlainTime | None = None,
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, not {activation!r}")
        if not hidden or any(h < 1 or h % WIDTH_MULTIPLE for h in hidden):
            raise ValueError(
                f"hidden widths must be positive multiples of {WIDTH_MULTIPLE}, not {tuple(hidden)}"
            )
        self.dim, self.hidden, self.context_dim = dim, tuple(hidden), context_dim
        self.activation, self.gate = activation, gate
        self.time = time or FourierTime()
        sizes = [dim, *hidden, dim]
        inputs = self.time.features + context_dim
        self.weights = nn.ModuleList(nn.Linear(i, o, bias=False) for i, o in pairwise(sizes))
        self.biases = nn.ModuleList(nn.Linear(inputs, o) for o in sizes[1:])
        self.gates = nn.ModuleList(nn.Linear(inputs, o) for o in hidden) if gate else nn.ModuleList()
        for last in (self.weights[-1], self.biases[-1], *self.gates):
            for parameter in last.parameters():  # an untrained flow is the identity: training starts in order
                nn.init.zeros_(parameter)

    @property
    def matrices(self) -> list[Tensor]:
        """W₁ … W_L, each [outputs, inputs]; the 2 of a gate is in the matrix that reads what was gated."""
        first, *others = [cast(nn.Linear, weight).weight for weight in self.weights]
        return [first, *(2 * weight if self.gate else weight for weight in others)]

    @property
    def exactness(self) -> Exactness:  # type: ignore[override]
        """Closed form up to two hidden layers."""
        return "closed_form" if len(self.hidden) <= 2 else "forward_mode"

    @property
    def saved_widths(self) -> tuple[int, ...]:  # type: ignore[override]
        """The hidden layers."""
        return self.hidden

    @property
    def condition_widths(self) -> tuple[tuple[int, ...], ...]:  # type: ignore[override]
        """Biases of all layers; gates of the hidden ones."""
        return ((*self.hidden, self.dim), self.hidden) if self.gate else ((*self.hidden, self.dim),)

    def condition(self, t: Tensor, c: Tensor | None) -> Conditions:
        """The biases of all layers; half the gates of the hidden ones."""
        features = self.time(t)
        if c is not None:
            features = torch.cat([features, c], 1)
        biases = _beside(self.biases, features)
        return (biases, torch.sigmoid(_beside(self.gates, features))) if self.gate else (biases,)

    def stage(self, z: Tensor, conditions: Conditions) -> tuple[Tensor, Saved]:
        """See the class."""
        activate, _ = ACTIVATIONS[self.activation]
        depth, matrices = len(self.hidden), self.matrices
        gates = conditions[depth + 1 :]
        saved: list[Tensor] = []
        h = z
        for layer in range(depth):
            h, kept = activate(torch.addmm(conditions[layer], h, matrices[layer].T))
            saved.append(kept)
            if gates:
                h = h * gates[layer]
        return torch.addmm(conditions[depth], h, matrices[depth].T), tuple(saved)

    def divergence(self, saved: Tensor, conditions: Conditions) -> Tensor:
        """See the class."""
        _, slope = ACTIVATIONS[self.activation]
        depth, slopes = len(self.hidden), slope(saved)
        if self.gate:
            slopes = slopes * conditions[1]
        first, *inner, last = self.matrices
        if depth == 1:
            return slopes @ (first * last.T).sum(1, keepdim=True)
        outer, *d = torch.split(slopes, [*self.hidden], 1)
        if depth == 2:
            bracket = inner[0].T * (first @ last)  # [h₁, h₂]
            return ((outer @ bracket) * d[0]) @ first.new_ones(self.hidden[1], 1)
        tangents = first.T * outer.unsqueeze(1)  # [n, D, h]: row i is ∂h/∂zᵢ
        for weight, slopes in zip(inner, d, strict=True):
            tangents = (tangents @ weight.T) * slopes.unsqueeze(1)
        return (tangents * last).flatten(1) @ first.new_ones(last.numel(), 1)


def _beside(layers: nn.ModuleList, x: Tensor) -> Tensor:
    """The outputs of several linear layers, side by side, by one product."""
    linear = [cast(nn.Linear, layer) for layer in layers]
    weight, bias = torch.cat([a.weight for a in linear]), torch.cat([a.bias for a in linear])
    return nn.functional.linear(x, weight, bias)


def planar(dim: int, width: int, context_dim: int = 0) -> MLP:
    """The planar continuous flow of Chen et al. 2018, width M: Σₙ σₙ(t) uₙ tanh(wₙᵀ z + bₙ(t))."""
    return MLP(dim, (width,), context_dim, activation="tanh", gate=True)


class Linear(VectorField):
    """f = A z + b(t, c), with divergence tr A: a linear skip, and the field with a closed-form flow."""

    exactness: Exactness = "closed_form"

    def __init__(self, dim: int, context_dim: int = 0) -> None:
        super().__init__()
        self.dim, self.context_dim = dim, context_dim
        self.time = FourierTime()
        self.weight = nn.Parameter(torch.zeros(dim, dim))
        self.bias = nn.Linear(self.time.features + context_dim, dim)
        nn.init.zeros_(self.bias.weight)
        nn.init.zeros_(self.bias.bias)
        self.condition_widths, self.saved_widths = ((dim,),), (1,)

    def condition(self, t: Tensor, c: Tensor | None) -> Conditions:
        """The bias."""
        features = self.time(t)
        return (self.bias(features if c is None else torch.cat([features, c], 1)),)

    def stage(self, z: Tensor, conditions: Conditions) -> tuple[Tensor, Saved]:
        """See the class."""
        return torch.addmm(conditions[0], z, self.weight.T), (z.narrow(1, 0, 1),)

    def divergence(self, saved: Tensor, conditions: Conditions) -> Tensor:
        """Tr A, for every row."""
        return self.weight.trace().expand(saved.shape[0], 1)


class Sum(VectorField):
    """f = Σ fₙ, whose divergence is the sum of theirs: blocks beside each other keep a closed form."""

    def __init__(self, fields: Sequence[VectorField]) -> None:
        super().__init__()
        if len({(f.dim, f.context_dim) for f in fields}) != 1:
            raise ValueError("the fields of a sum must agree in dim and context_dim")
        self.fields = nn.ModuleList(fields)
        self.dim, self.context_dim = fields[0].dim, fields[0].context_dim
        kinds = [f.exactness for f in fields]
        self.exactness = next(
            (k for k in ("hutchinson", "reverse_mode", "forward_mode") if k in kinds), "closed_form"
        )
        self.condition_widths = tuple(widths for field in fields for widths in field.condition_widths)
        self.saved_widths = tuple(width for field in fields for width in field.saved_widths)

    def _typed(self) -> list[VectorField]:
        return [cast(VectorField, field) for field in self.fields]

    def condition(self, t: Tensor, c: Tensor | None) -> Conditions:
        """Those of all fields."""
        return tuple(matrix for field in self._typed() for matrix in field.condition(t, c))

    def stage(self, z: Tensor, conditions: Conditions) -> tuple[Tensor, Saved]:
        """See the class."""
        values: list[Tensor] = []
        saved: Saved = ()
        for field in self._typed():
            count = sum(map(len, field.condition_widths))
            value, kept = field.stage(z, conditions[:count])
            conditions = conditions[count:]
            values.append(value)
            saved += kept
        return functools.reduce(torch.add, values), saved

    def divergence(self, saved: Tensor, conditions: Conditions) -> Tensor:
        """See the class."""
        parts: list[Tensor] = []
        for field in self._typed():
            width, count = sum(field.saved_widths), len(field.condition_widths)
            kept, saved = torch.split(saved, [width, saved.shape[1] - width], 1)
            parts.append(field.divergence(kept, conditions[:count]))
            conditions = conditions[count:]
        return functools.reduce(torch.add, parts)


class Wrapped(VectorField):
    """A module trained elsewhere, called as ``module(t, z)`` or ``module(t, z, c)``.

    It must take t [n, 1] beside z [n, D] and c [n, C].

    The divergence is exact: all D rows of the Jacobian come from one batched product in reverse mode.
    (Forward mode would do as well, but cannot be exported: ``docs/decisions.md``.)
    """

    exactness: Exactness = "reverse_mode"
    eye: Tensor

    def __init__(self, module: nn.Module, dim: int, context_dim: int = 0) -> None:
        super().__init__()
        self.module, self.dim, self.context_dim = module, dim, context_dim
        self.register_buffer("eye", torch.eye(dim), persistent=False)
        self.condition_widths = ((1,), (context_dim,)) if context_dim else ((1,),)
        self.saved_widths = (dim,)

    def condition(self, t: Tensor, c: Tensor | None) -> Conditions:
        """Time and context themselves."""
        return (t,) if c is None else (t, c)

    def stage(self, z: Tensor, conditions: Conditions) -> tuple[Tensor, Saved]:
        """See the class."""
        t, *c = conditions
        value: Tensor = self.module(t, z, *c)
        return value, (z,)

    def divergence(self, saved: Tensor, conditions: Conditions) -> Tensor:
        """See the class."""
        repeated = (part[:, None].expand(-1, self.dim, -1).flatten(0, 1) for part in (saved, *conditions))
        z, t, *c = repeated
        cotangents = self.eye[None].expand(saved.shape[0], -1, -1).flatten(0, 1)
        diagonal = _pull(lambda y: self.module(t, y, *c), z, cotangents) * cotangents
        return diagonal.reshape(-1, self.dim * self.dim) @ z.new_ones(self.dim * self.dim, 1)


class Hutchinson(VectorField):
    """A field whose divergence is estimated: (1/K) Σ εₖᵀ (∂f/∂z) εₖ, with K fixed Rademacher probes.

    Unbiased over probes (Hutchinson 1989), cheaper than exact when K < D, and noisy: the standard deviation
    grows with the off-diagonal part of the Jacobian.  The probes are drawn once, so answers stay
    reproducible; they are marked as inexact, with the standard error that publishing measured.
    """

    exactness: Exactness = "hutchinson"
    probes: Tensor

    def __init__(self, field: VectorField, probes: int = 1, seed: int = 0) -> None:
        super().__init__()
        if probes < 1:
            raise ValueError(f"probes must be at least 1, not {probes}")
        self.field, self.dim, self.context_dim = field, field.dim, field.context_dim
        generator = torch.Generator().manual_seed(seed)
        signs = torch.randint(0, 2, (probes, field.dim), generator=generator) * 2.0 - 1.0
        self.register_buffer("probes", signs)
        self.condition_widths, self.saved_widths = field.condition_widths, (field.dim,)

    def condition(self, t: Tensor, c: Tensor | None) -> Conditions:
        """That of the field."""
        return self.field.condition(t, c)

    def stage(self, z: Tensor, conditions: Conditions) -> tuple[Tensor, Saved]:
        """That of the field."""
        return self.field.stage(z, conditions)[0], (z,)

    def divergence(self, saved: Tensor, conditions: Conditions) -> Tensor:
        """See the class."""
        z, parts = saved, self.apart(conditions)[0]
        total: Tensor | None = None
        for probe in self.probes:
            row = _pull(lambda y: self.field.stage(y, parts)[0], z, probe.expand_as(z))
            part = row @ probe[:, None]
            total = part if total is None else total + part
        assert total is not None
        return total / len(self.probes)
