"""Find the closed-form divergence of a module that was trained elsewhere.

Most vector fields are perceptrons of one or two hidden layers on [z, t, c] in some order.  Rather than read
code, we guess every such reading of the module's layers and keep the one that reproduces the module's own
values on random points: a guess that is proven is a recognition, and anything else is differentiated
automatically.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from itertools import pairwise, permutations
from typing import cast

import torch
from torch import Tensor, nn

from pushforward.errors import InvalidInput
from pushforward.flows.fields import MLP, WIDTH_MULTIPLE, PlainTime, VectorField, Wrapped

__all__ = ["recognise"]

_ACTIVATIONS: dict[type[nn.Module], str] = {nn.Tanh: "tanh", nn.SiLU: "silu", nn.Softplus: "softplus"}
_POINTS, _AGREE = 16, 1e-9


def recognise(module: nn.Module, dim: int, context_dim: int = 0) -> VectorField:
    """The field as one of ours: itself, a perceptron with a closed-form divergence, or wrapped.

    Args:
        module: f, called as ``module(t, z)`` or ``module(t, z, c)`` with a scalar t, z [B, D] and c [B, C].
        dim: D.
        context_dim: C.

    Raises:
        InvalidInput: when the module cannot be called like that, or does not return [B, D].
    """
    if isinstance(module, VectorField):
        if (module.dim, module.context_dim) != (dim, context_dim):
            raise InvalidInput(
                f"the field is made for {module.dim} features and {module.context_dim} context features, "
                f"the rows have {dim} and {context_dim}",
                where="field",
            )
        return module
    module = copy.deepcopy(module).cpu().eval().requires_grad_(False)
    double = copy.deepcopy(module).double()
    generator = torch.Generator().manual_seed(0)
    spread = torch.logspace(-1, 3, _POINTS, dtype=torch.float64)[:, None]  # clipped inputs show far out only
    z = torch.randn(_POINTS, dim, generator=generator, dtype=torch.float64) * spread
    t = torch.rand(_POINTS, 1, generator=generator, dtype=torch.float64)
    c = torch.randn(_POINTS, context_dim, generator=generator, dtype=torch.float64) if context_dim else None
    expected = _row_by_row(double, dim, t, z, c)
    if not bool(torch.isfinite(expected[spread[:, 0] < 3]).all()):
        raise InvalidInput(
            "the field is not finite everywhere: it returned NaN or infinity at random points", where="field"
        )
    for candidate in _readings(module, dim, context_dim):
        if torch.allclose(
            copy.deepcopy(candidate).double()(t, z, c), expected, rtol=_AGREE, atol=_AGREE, equal_nan=True
        ):
            return candidate
    try:
        together = Wrapped(double, dim, context_dim)(t, z, c)
        fault = (
            ""
            if torch.allclose(together, expected, rtol=_AGREE, atol=_AGREE, equal_nan=True)
            else "its values differ"
        )
    except Exception as error:
        fault = f"it raised {type(error).__name__}: {error}"
    if fault:
        raise InvalidInput(
            "the field works for a scalar t, but must also take one time per row, t [B, 1] beside z [B, D] "
            f"(write z.shape[0] for the number of rows, and t * torch.ones_like(z[:, :1])); {fault}",
            where="field",
        )
    return Wrapped(module, dim, context_dim)


def _row_by_row(module: nn.Module, dim: int, t: Tensor, z: Tensor, c: Tensor | None) -> Tensor:
    """What the field means: every row with its own scalar time."""
    call = "field(t, z)" if c is None else "field(t, z, c)"
    try:
        rows = [module(t[i, 0], z[i : i + 1], *(() if c is None else (c[i : i + 1],))) for i in range(len(z))]
    except Exception as error:
        raise InvalidInput(
            f"the field could not be called as {call} with a scalar t and z [1, {dim}]: "
            f"{type(error).__name__}: {error}",
            where="field",
        ) from error
    if any(not isinstance(row, Tensor) or row.numel() != dim for row in rows):
        raise InvalidInput(
            f"{call} must return a tensor [B, {dim}], one derivative per feature", where="field"
        )
    return torch.cat([row.reshape(1, dim) for row in rows])


def _readings(module: nn.Module, dim: int, context_dim: int) -> Iterator[MLP]:
    """Perceptrons that have the module's linear layers, under every order of inputs and activation."""
    linears = [m for m in module.modules() if isinstance(m, nn.Linear)]
    if len(linears) not in (2, 3):
        return
    if sum(p.numel() for p in module.parameters()) != sum(p.numel() for m in linears for p in m.parameters()):
        return
    if any(a.out_features != b.in_features for a, b in pairwise(linears)):
        return
    if linears[-1].out_features != dim:
        return
    named = {_ACTIVATIONS[type(m)] for m in module.modules() if type(m) in _ACTIVATIONS}
    for segments in (("z", "t", "c"), ("z", "c"), ("z", "t"), ("z",)):
        sizes = {"z": dim, "t": 1, "c": context_dim}
        if sum(sizes[s] for s in segments) != linears[0].in_features or ("c" in segments) != bool(
            context_dim
        ):
            continue
        for order in permutations(segments):
            columns, start = {}, 0
            for segment in order:
                columns[segment] = slice(start, start + sizes[segment])
                start += sizes[segment]
            for activation in named or set(_ACTIVATIONS.values()):
                yield _perceptron(linears, columns, dim, context_dim, activation)


def _perceptron(
    linears: list[nn.Linear], columns: dict[str, slice], dim: int, context_dim: int, activation: str
) -> MLP:
    """An MLP with these layers; hidden widths are filled up with units that nothing reads."""
    hidden = [m.out_features + -m.out_features % WIDTH_MULTIPLE for m in linears[:-1]]
    field = MLP(dim, hidden, context_dim, activation, time=PlainTime()).to(linears[0].weight.dtype)
    with torch.no_grad():
        for parameter in field.parameters():
            parameter.zero_()
        for index, linear in enumerate(linears):
            weight = linear.weight
            if index == 0:
                bias = cast(nn.Linear, field.biases[0]).weight
                if "t" in columns:
                    bias[: linear.out_features, :1] = weight[:, columns["t"]]
                if "c" in columns:
                    bias[: linear.out_features, 1:] = weight[:, columns["c"]]
                weight = weight[:, columns["z"]]
            field.matrices[index][: weight.shape[0], : weight.shape[1]] = weight
            if linear.bias is not None:
                cast(nn.Linear, field.biases[index]).bias[: linear.out_features] = linear.bias
    return field
