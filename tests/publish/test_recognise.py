"""Fields trained elsewhere: recognised where there is a closed form, wrapped where not, or refused."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from tests.problems import Foreign, shaken
from torch import Tensor, nn
from torch.func import jacfwd, vmap

from pushforward.errors import InvalidInput
from pushforward.flows.fields import MLP, Linear, VectorField, Wrapped
from pushforward.publish.recognise import recognise


class Ordered(nn.Module):
    """A perceptron whose inputs come in any order, with the activation as a function or as a module."""

    def __init__(
        self,
        order: str,
        hidden: tuple[int, ...] = (24,),
        act: Callable[[Tensor], Tensor] = torch.tanh,
        bias: bool = True,
        dim: int = 3,
        context_dim: int = 2,
    ) -> None:
        super().__init__()
        self.order, self.act = order, act
        width = sum({"z": dim, "t": 1, "c": context_dim}[part] for part in order)
        sizes = [width, *hidden, dim]
        self.layers = nn.ModuleList(nn.Linear(a, b, bias) for a, b in itertools.pairwise(sizes))

    def forward(self, t: Tensor, z: Tensor, *c: Tensor) -> Tensor:
        parts = {"z": z, "t": t * torch.ones_like(z[:, :1]), "c": c[0] if c else None}
        h = torch.cat([parts[part] for part in self.order], 1)
        for layer in self.layers[:-1]:
            h = self.act(layer(h))
        return self.layers[-1](h)


class ScalarTime(Foreign):
    """Takes the scalar t of torchdiffeq, and nothing else."""

    def forward(self, t: Tensor, z: Tensor, *c: Tensor) -> Tensor:
        return super().forward(torch.as_tensor(float(t), dtype=z.dtype), z, *c)


def check(module: nn.Module, field: VectorField, dim: int, context_dim: int) -> None:
    """The field is the module, row by row with its own scalar time, and its divergence is exact."""
    generator = torch.Generator().manual_seed(5)
    t = torch.rand(6, 1, generator=generator, dtype=torch.float64)
    z = torch.randn(6, dim, generator=generator, dtype=torch.float64)
    context = (torch.randn(6, context_dim, generator=generator, dtype=torch.float64),) if context_dim else ()
    module = module.double().eval()
    value, divergence = field.double().with_divergence(t, z, *context)

    def one(t: Tensor, z: Tensor, *c: Tensor) -> Tensor:
        return module(t[0], z[None], *(part[None] for part in c))[0]

    jacobian = vmap(jacfwd(one, argnums=1))(t, z, *context)
    torch.testing.assert_close(value, vmap(one)(t, z, *context), rtol=1e-9, atol=1e-9)
    expected = jacobian.diagonal(dim1=1, dim2=2).sum(1, keepdim=True)
    torch.testing.assert_close(divergence, expected, rtol=1e-9, atol=1e-9)


RECOGNISED: dict[str, tuple[Callable[[], nn.Module], int, int]] = {
    "torchdiffeq style": (lambda: Foreign(3, (24,)), 3, 0),
    "two layers": (lambda: Foreign(3, (24, 17)), 3, 0),
    "with context": (lambda: Foreign(2, (16, 16), 3), 2, 3),
    "SiLU modules": (lambda: Foreign(3, (20,), 0, nn.SiLU), 3, 0),
    "Softplus modules": (lambda: Foreign(3, (20, 8), 0, nn.Softplus), 3, 0),
    "t first": (lambda: Ordered("tz"), 3, 0),
    "c, t, z": (lambda: Ordered("ctz", (8, 24)), 3, 2),
    "t, c, z": (lambda: Ordered("tcz"), 3, 2),
    "no time": (lambda: Ordered("z", (16, 16)), 3, 0),
    "context without time": (lambda: Ordered("cz"), 3, 2),
    "no biases": (lambda: Ordered("zt", bias=False), 3, 0),
    "silu as a function": (lambda: Ordered("zt", act=nn.functional.silu), 3, 0),
    "as many contexts as features": (lambda: Ordered("czt", context_dim=3), 3, 3),
    "float64": (lambda: Ordered("zt").double(), 3, 0),
}


@pytest.mark.parametrize("name", RECOGNISED)
def test_perceptrons_get_a_closed_form(name: str) -> None:
    make, dim, context_dim = RECOGNISED[name]
    module = shaken(make(), 4, gain=1.5)
    field = recognise(module, dim, context_dim)
    assert isinstance(field, MLP)
    assert field.exactness == "closed_form"
    assert (field.dim, field.context_dim) == (dim, context_dim)
    assert all(width % 16 == 0 for width in field.hidden)
    check(module, field, dim, context_dim)


class Residual(Foreign):
    def forward(self, t: Tensor, z: Tensor, *c: Tensor) -> Tensor:
        return super().forward(t, z, *c) - 0.3 * z


class Scaled(Foreign):
    """A parameter that is in no layer."""

    def __init__(self) -> None:
        super().__init__(3, (24,))
        self.scale = nn.Parameter(torch.tensor(0.7))

    def forward(self, t: Tensor, z: Tensor, *c: Tensor) -> Tensor:
        return self.scale * super().forward(t, z, *c)


class Clipped(Foreign):
    """Looks like a perceptron near the origin only."""

    def forward(self, t: Tensor, z: Tensor, *c: Tensor) -> Tensor:
        return super().forward(t, z.clamp(-5, 5), *c)


class TimesTime(Foreign):
    def forward(self, t: Tensor, z: Tensor, *c: Tensor) -> Tensor:
        return super().forward(t * t, z, *c)


class Sharper(Foreign):
    """A softplus with another slope is none of ours."""

    def __init__(self) -> None:
        super().__init__(3, (24,), 0, lambda: nn.Softplus(beta=2.0))


WRAPPED: dict[str, tuple[Callable[[], nn.Module], int, int]] = {
    "three layers": (lambda: Foreign(3, (16, 16, 16)), 3, 0),
    "ReLU": (lambda: Foreign(3, (24,), 0, nn.ReLU), 3, 0),
    "GELU": (lambda: Foreign(2, (16, 16), 1, nn.GELU), 2, 1),
    "residual": (lambda: Residual(3, (24,)), 3, 0),
    "a parameter more": (Scaled, 3, 0),
    "clipped far out": (lambda: Clipped(3, (24,)), 3, 0),
    "t squared": (lambda: TimesTime(3, (24,)), 3, 0),
    "another softplus": (Sharper, 3, 0),
    "sine": (lambda: Ordered("zt", act=torch.sin), 3, 0),
    "one layer": (lambda: Ordered("zt", ()), 3, 0),
}


@pytest.mark.parametrize("name", WRAPPED)
def test_other_modules_are_wrapped_and_differentiated(name: str) -> None:
    make, dim, context_dim = WRAPPED[name]
    module = shaken(make(), 4, gain=1.5)
    field = recognise(module, dim, context_dim)
    assert isinstance(field, Wrapped)
    assert field.exactness == "reverse_mode"
    check(module, field, dim, context_dim)


def test_a_recognised_field_needs_no_times_by_row() -> None:
    assert isinstance(recognise(shaken(ScalarTime(3, (24,))), 3), MLP)


def test_our_own_fields_are_taken_as_they_are() -> None:
    field = MLP(3, (16,), 2)
    assert recognise(field, 3, 2) is field


def test_the_module_of_the_caller_stays_as_it_was() -> None:
    module = nn.Sequential()
    module = shaken(Foreign(3, (24,), 0, nn.Tanh)).train()
    recognise(module, 3)
    assert module.training
    assert all(p.requires_grad and p.dtype == torch.float32 for p in module.parameters())


def test_dropout_is_off_when_it_is_served() -> None:
    class Dropped(Foreign):
        def forward(self, t: Tensor, z: Tensor, *c: Tensor) -> Tensor:
            return nn.functional.dropout(super().forward(t, z, *c), 0.5, self.training)

    module = shaken(Dropped(3, (24,))).train()
    field = recognise(module, 3)
    check(module, field, 3, 0)


class Broken(Foreign):
    """Returns something else than [B, D]."""

    def __init__(self, what: Callable[[Tensor], object]) -> None:
        super().__init__(3, (16, 16, 16))
        self.what = what

    def forward(self, t: Tensor, z: Tensor, *c: Tensor) -> Tensor:
        return self.what(super().forward(t, z, *c))


class Growing(nn.Module):
    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        return z * t


def raising(value: Tensor) -> Tensor:
    raise RuntimeError("no such luck")


REFUSED: dict[str, tuple[Callable[[], nn.Module], int, str]] = {
    "too wide": (lambda: Broken(lambda v: torch.cat([v, v], 1)), 0, r"field\(t, z\) must return .* \[B, 3\]"),
    "a number": (lambda: Broken(lambda v: v.sum()), 0, r"must return a tensor \[B, 3\]"),
    "a tuple": (lambda: Broken(lambda v: (v, v)), 0, r"must return a tensor \[B, 3\]"),
    "raises": (
        lambda: Broken(raising),
        0,
        r"could not be called as field\(t, z\).*RuntimeError: no such luck",
    ),
    "made for other rows": (lambda: Foreign(4, (16,)), 0, r"field\(t, z\) with a scalar t and z \[1, 3\]"),
    "context it does not take": (Growing, 2, r"field\(t, z, c\).*positional argument"),
    "context it lacks": (lambda: Foreign(3, (16,), 2), 0, r"field\(t, z\)"),
    "scalar time only": (lambda: ScalarTime(3, (16, 16, 16)), 0, r"one time per row, t \[B, 1\]"),
    "ours, for other rows": (
        lambda: MLP(4, (16,)),
        0,
        "made for 4 features and 0 context features, .* 3 and 0",
    ),
    "ours, without context": (lambda: Linear(3), 1, "made for 3 features and 0 context features, .* 3 and 1"),
    "not a number": (lambda: Broken(lambda v: v * math.nan), 0, "finite"),
    "infinite": (lambda: Broken(lambda v: v / 0), 0, "finite"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_modules_that_are_no_fields_are_refused_with_the_reason(name: str) -> None:
    make, context_dim, message = REFUSED[name]
    with pytest.raises(InvalidInput, match=message) as raised:
        recognise(make(), 3, context_dim)
    assert raised.value.where == "field"
