"""Vector fields: every divergence equals the trace of the Jacobian, and estimates are unbiased."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from tests.problems import Foreign, shaken
from torch import Tensor, nn
from torch.func import jacfwd, vmap

from pushforward.flows.fields import (
    MLP,
    FourierTime,
    Hutchinson,
    Linear,
    PlainTime,
    Sum,
    VectorField,
    Wrapped,
    planar,
)

ROWS = 7


def mlps() -> dict[str, Callable[[], VectorField]]:
    made: dict[str, Callable[[], VectorField]] = {}
    for depth, hidden in ((1, (32,)), (2, (32, 16)), (3, (16, 32, 16)), (4, (16, 16, 32, 16))):
        for activation in ("tanh", "silu", "softplus"):
            for gate in (False, True):
                for context_dim in (0, 2):
                    name = f"{depth} {activation}{' gated' * gate}{' | c' * bool(context_dim)}"
                    made[name] = lambda a=(5, hidden, context_dim, activation, gate): MLP(*a)
    return made


FIELDS = mlps() | {
    "one feature": lambda: MLP(1, (16, 16)),
    "wider than its layers": lambda: MLP(40, (16, 32)),
    "plain time": lambda: MLP(3, (16, 16), 1, time=PlainTime()),
    "planar": lambda: planar(4, 32, 3),
    "linear": lambda: Linear(6),
    "linear | c": lambda: Linear(3, 2),
    "sum": lambda: Sum([MLP(4, (16,)), MLP(4, (16, 32), activation="tanh", gate=True), Linear(4)]),
    "sum of sums | c": lambda: Sum([Sum([MLP(3, (16,), 2), Linear(3, 2)]), MLP(3, (16, 16, 16), 2)]),
    "wrapped": lambda: Wrapped(Foreign(4, (10, 7, 9)), 4),
    "wrapped | c": lambda: Wrapped(Foreign(3, (12,), 2, nn.GELU), 3, 2),
    "sum with wrapped": lambda: Sum([Wrapped(Foreign(3, (8, 8)), 3), MLP(3, (16,))]),
}


def made(name: str, dtype: torch.dtype = torch.float64) -> VectorField:
    return shaken(FIELDS[name](), 3).to(dtype)


def inputs(field: VectorField, rows: int = ROWS) -> tuple[Tensor, Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(11)
    t = torch.rand(rows, 1, generator=generator, dtype=torch.float64)
    z = torch.randn(rows, field.dim, generator=generator, dtype=torch.float64)
    c = torch.randn(rows, field.context_dim, generator=generator, dtype=torch.float64)
    return t, z, c if field.context_dim else None


def jacobians(field: VectorField, t: Tensor, z: Tensor, c: Tensor | None) -> Tensor:
    """∂f/∂z [n, D, D] of each row, by forward mode through the plain evaluation."""

    def one(t: Tensor, z: Tensor, *c: Tensor) -> Tensor:
        return field(t[None], z[None], *(part[None] for part in c))[0]

    return vmap(jacfwd(one, argnums=1))(t, z, *(() if c is None else (c,))).detach()


@pytest.mark.parametrize("name", FIELDS)
def test_the_divergence_is_the_trace_of_the_jacobian(name: str) -> None:
    field = made(name)
    t, z, c = inputs(field)
    value, divergence = field.with_divergence(t, z, c)
    expected = jacobians(field, t, z, c).diagonal(dim1=1, dim2=2).sum(1, keepdim=True)
    assert divergence.shape == (ROWS, 1)
    torch.testing.assert_close(divergence, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(value, field(t, z, c), rtol=0, atol=0)
    # a random field in which the rows differ: zeros, or one value for all, would prove nothing
    assert divergence.abs().min() > 1e-6
    assert isinstance(field, Linear) or divergence.std() > 1e-4


@pytest.mark.parametrize("name", FIELDS)
def test_float32_loses_only_rounding(name: str) -> None:
    field, narrow = made(name), made(name, torch.float32)
    t, z, c = inputs(field)
    value, divergence = field.with_divergence(t, z, c)
    f32 = narrow.with_divergence(t.float(), z.float(), None if c is None else c.float())
    torch.testing.assert_close(f32[0].double(), value, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(f32[1].double(), divergence, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", FIELDS)
def test_rows_stand_for_themselves_and_a_number_is_a_time_for_all(name: str) -> None:
    field = made(name)
    t, z, c = inputs(field)
    value, divergence = field.with_divergence(t, z, c)
    for row in range(ROWS):
        alone = field.with_divergence(float(t[row]), z[[row]], None if c is None else c[[row]])
        torch.testing.assert_close(alone[0][0], value[row], rtol=0, atol=1e-13)
        torch.testing.assert_close(alone[1][0], divergence[row], rtol=0, atol=1e-13)


@pytest.mark.parametrize("name", FIELDS)
def test_stages_beside_one_another_give_the_divergences_of_each(name: str) -> None:
    # as a step uses a field: conditions of all stages at once, stage by stage, divergences of all at once
    field = made(name)
    t, z, c = inputs(field, 3 * ROWS)
    conditions = field.condition(t, c)
    stages = zip(z.view(ROWS, 3, -1).unbind(1), field.apart(conditions, 3), strict=True)
    values, saved = zip(*(field.stage(*given) for given in stages), strict=True)
    kept = torch.cat([part for parts in saved for part in parts], 1).view(3 * ROWS, -1)
    divergences = field.divergence(kept, conditions)
    expected = field.with_divergence(t, z, c)
    torch.testing.assert_close(torch.stack(values, 1).flatten(0, 1), expected[0], rtol=0, atol=1e-13)
    torch.testing.assert_close(divergences, expected[1], rtol=0, atol=1e-13)


@pytest.mark.parametrize("name", [n for n in FIELDS if n[0] in "12"] + ["planar", "linear", "sum"])
def test_a_closed_form_can_be_trained_through(name: str) -> None:
    field = made(name)
    t, z, c = inputs(field)
    field.with_divergence(t, z, c)[1].sum().backward()
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in field.parameters())


def test_exactness_says_how_the_divergence_is_computed() -> None:
    kinds = {name: made(name).exactness for name in FIELDS}
    assert {kinds[name] for name in kinds if name[0] in "12"} == {"closed_form"}
    assert {kinds[name] for name in kinds if name[0] in "34"} == {"forward_mode"}
    assert kinds["planar"] == kinds["linear"] == kinds["sum"] == "closed_form"
    assert kinds["sum of sums | c"] == "forward_mode"
    assert kinds["wrapped"] == kinds["sum with wrapped"] == "reverse_mode"
    assert Sum([Hutchinson(MLP(3, (16,))), Wrapped(Foreign(3, (8,)), 3)]).exactness == "hutchinson"


def test_the_planar_field_is_the_sum_of_planar_units() -> None:
    # Chen et al. 2018, section 4: f = Σ σₙ(t) uₙ tanh(wₙᵀ z + bₙ(t)), tr = Σ σₙ tanh'(·) uₙᵀ wₙ
    field = made("planar")
    t, z, c = inputs(field)
    features = torch.cat([field.time(t), c], 1)
    w, u = field.weights[0].weight, field.weights[1].weight.T  # [M, D] each
    value, divergence = field.biases[1](features), torch.zeros(ROWS, 1, dtype=torch.float64)
    for n in range(len(w)):
        a = z @ w[n] + field.biases[0](features)[:, n]
        gate = 2 * torch.sigmoid(field.gates[0](features)[:, n])
        value = value + (gate * torch.tanh(a))[:, None] * u[n]
        divergence = divergence + (gate * (1 - torch.tanh(a) ** 2) * (u[n] @ w[n]))[:, None]
    ours = field.with_divergence(t, z, c)
    torch.testing.assert_close(ours[0], value, rtol=0, atol=1e-12)
    torch.testing.assert_close(ours[1], divergence, rtol=0, atol=1e-12)


def test_time_features_are_sines_and_cosines_of_quarter_turns() -> None:
    t = torch.tensor([[0.0], [0.3], [1.0]], dtype=torch.float64)
    k = torch.arange(1, 9) * math.pi / 2
    features = FourierTime().double()(t)
    torch.testing.assert_close(
        features, torch.cat([torch.sin(t * k), torch.cos(t * k)], 1), rtol=0, atol=1e-6
    )


UNTRAINED: dict[str, Callable[[], VectorField]] = {
    "mlp": lambda: MLP(3, (16, 16), 2, gate=True),
    "planar": lambda: planar(2, 16),
    "linear": lambda: Linear(2),
}


@pytest.mark.parametrize("name", UNTRAINED)
def test_an_untrained_field_is_zero(name: str) -> None:
    field = UNTRAINED[name]()
    t, z, c = (None if part is None else part.float() for part in inputs(field))
    value, divergence = field.with_divergence(t, z, c)
    assert value.abs().max() == divergence.abs().max() == 0


REFUSED: dict[str, tuple[Callable[[], VectorField], str]] = {
    "activation": (lambda: MLP(2, (16,), activation="relu"), "one of tanh, silu, softplus, not 'relu'"),
    "width": (lambda: MLP(2, (20,)), r"multiples of 16, not \(20,\)"),
    "no width": (lambda: MLP(2, (0,)), "multiples of 16"),
    "no layer": (lambda: MLP(2, ()), "multiples of 16"),
    "dims": (lambda: Sum([MLP(2, (16,)), MLP(3, (16,))]), "agree in dim"),
    "contexts": (lambda: Sum([MLP(2, (16,)), MLP(2, (16,), 1)]), "agree in dim"),
    "empty sum": (lambda: Sum([]), "fields"),
    "no probes": (lambda: Hutchinson(MLP(2, (16,)), 0), "probes must be at least 1, not 0"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_fields_that_cannot_be_are_refused(name: str) -> None:
    make, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        make()


# -------------------------------------------------------------------------------------- Hutchinson

ESTIMATED = ["2 silu gated | c", "3 tanh", "wrapped | c", "sum"]


@pytest.mark.parametrize("name", ESTIMATED)
def test_hutchinson_is_unbiased_and_as_noisy_as_theory_says(name: str) -> None:
    # Rademacher probes: Var εᵀJε = Σ_{i<j} (Jᵢⱼ + Jⱼᵢ)²
    field = made(name)
    t, z, c = inputs(field, 1)
    jacobian = jacobians(field, t, z, c)[0]
    seeds = 1500
    fields = (Hutchinson(field, 1, seed).double() for seed in range(seeds))
    estimates = torch.cat([estimate.with_divergence(t, z, c)[1] for estimate in fields])
    deviation = float((jacobian + jacobian.T).triu(1).square().sum().sqrt())
    assert deviation > 0.05
    assert float(estimates.std()) == pytest.approx(deviation, rel=0.1)
    assert abs(float(estimates.mean() - jacobian.trace())) < 4 * deviation / seeds**0.5


@pytest.mark.parametrize("name", ESTIMATED)
def test_more_probes_average_and_every_sign_pattern_together_is_exact(name: str) -> None:
    field = made(name)
    t, z, c = inputs(field)
    exact = field.with_divergence(t, z, c)[1]
    estimate = Hutchinson(field, 2**field.dim).double()
    signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=torch.float64)] * field.dim)
    estimate.probes = signs
    torch.testing.assert_close(estimate.with_divergence(t, z, c)[1], exact, rtol=0, atol=1e-12)
    assert estimate.exactness == "hutchinson"


def test_probes_are_signs_drawn_once() -> None:
    field = made("2 silu")
    first, again, other = (Hutchinson(field, 3, seed) for seed in (5, 5, 6))
    assert first.probes.shape == (3, 5)
    assert torch.equal(first.probes.abs(), torch.ones(3, 5))
    assert torch.equal(first.probes, again.probes)
    assert not torch.equal(first.probes, other.probes)
    assert torch.equal(first(0.5, torch.ones(2, 5).double()), field(0.5, torch.ones(2, 5).double()))
