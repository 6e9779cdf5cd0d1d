"""Tableaux: every order condition, the order that is measured, and coefficients that are refused."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.integrate import RK45
from tests.problems import Affine, Growth, linear_flow
from torch import Tensor

from pushforward.flows.fields import VectorField, Wrapped
from pushforward.solvers.state import Clock
from pushforward.solvers.step import Start, Step
from pushforward.solvers.tableau import METHODS, Tableau

ERROR_ORDER = {"dopri5": 4, "tsit5": 4, "bosh3": 2, "dopri8": 7}  # of the embedded solution b̂

Tree = tuple["Tree", ...]
"""A rooted tree as the sorted tuple of its root's subtrees: the order conditions of Butcher, one by one."""

Array = NDArray[np.float64]


def trees(order: int) -> set[Tree]:
    """Every rooted tree of that many nodes: the smaller ones with a leaf added anywhere."""

    def grown(tree: Tree) -> Iterator[Tree]:
        yield tuple(sorted([*tree, ()]))
        for i, branch in enumerate(tree):
            yield from (tuple(sorted([*tree[:i], more, *tree[i + 1 :]])) for more in grown(branch))

    return {()} if order == 1 else {tree for smaller in trees(order - 1) for tree in grown(smaller)}


def nodes(tree: Tree) -> int:
    return 1 + sum(nodes(branch) for branch in tree)


def density(tree: Tree) -> int:
    return nodes(tree) * math.prod(density(branch) for branch in tree)


def elementary(tree: Tree, a: Array) -> Array:
    """Per stage, the product over the branches of a · elementary(branch)."""
    result = np.ones(len(a))
    for branch in tree:
        result = result * (a @ elementary(branch, a))
    return result


def fsal(tableau: Tableau) -> tuple[Array, Array, Array]:
    """a, b and e of the FSAL form, [s + 1, s + 1] and [s + 1]."""
    size = tableau.stages + 1
    a = np.zeros((size, size))
    for i, row in enumerate(tableau.rows):
        a[i + 1, : len(row)] = row
    return a, np.array([*tableau.b, 0.0]), np.array(tableau.e)


def test_there_are_as_many_trees_as_there_should_be() -> None:
    assert [len(trees(order)) for order in range(1, 9)] == [1, 1, 2, 4, 9, 20, 48, 115]


@pytest.mark.parametrize("tableau", METHODS.values(), ids=METHODS)
def test_every_order_condition_holds_and_the_next_order_does_not(tableau: Tableau) -> None:
    a, b, _ = fsal(tableau)
    for order in range(1, tableau.order + 1):
        for tree in trees(order):
            assert b @ elementary(tree, a) == pytest.approx(1 / density(tree), abs=1e-13), tree
    beyond = [b @ elementary(tree, a) - 1 / density(tree) for tree in trees(tableau.order + 1)]
    assert np.abs(beyond).max() > 1e-6


@pytest.mark.parametrize("name", ERROR_ORDER)
def test_the_error_weights_compare_with_a_solution_of_the_order_below(name: str) -> None:
    a, _, e = fsal(METHODS[name])
    for order in range(1, ERROR_ORDER[name] + 1):
        for tree in trees(order):
            assert e @ elementary(tree, a) == pytest.approx(0, abs=1e-13), tree
    assert max(abs(e @ elementary(tree, a)) for tree in trees(ERROR_ORDER[name] + 1)) > 1e-6
    exponent = METHODS[name].exponent
    assert exponent == round(16 / (ERROR_ORDER[name] + 1)) / 16


def test_dopri5_is_the_textbook_pair() -> None:
    a, b, e = fsal(METHODS["dopri5"])
    np.testing.assert_allclose(a[:6, :5], RK45.A, rtol=1e-15)
    np.testing.assert_allclose(b[:6], RK45.B, rtol=1e-15)
    np.testing.assert_allclose(e, -RK45.E, rtol=1e-13)  # SciPy writes b̂ − b
    np.testing.assert_allclose(METHODS["dopri5"].c, [*RK45.C, 1], rtol=1e-15)


@pytest.mark.parametrize("tableau", METHODS.values(), ids=METHODS)
def test_the_fsal_form(tableau: Tableau) -> None:
    assert tableau.rows[-1] == tableau.b
    assert tableau.c[0] == 0
    assert tableau.c[-1] == pytest.approx(1, abs=1e-15)
    assert tableau.stages == len(tableau.b) == len(tableau.c) - 1
    assert tableau.adaptive == (tableau.name not in ("rk4", "euler"))


def fixed_steps(
    tableau: Tableau, field: VectorField, z: Tensor, steps: int, t_end: float = 4.0
) -> tuple[Tensor, Tensor, float]:
    """Where equal steps from 0 to t_end lead: z, ℓ, and how far the carried k₁ and tr are from fresh ones."""
    start, step = Start(field, True), Step(field, dataclasses.replace(tableau, e=()), True)
    t = torch.zeros(len(z), 1, dtype=torch.float64)
    state = start(t, z)
    clock = torch.zeros(len(z), len(Clock), dtype=torch.float64)
    clock[:, Clock.DT], clock[:, Clock.CAP] = t_end / steps, 10
    span = torch.tensor([[t_end, 1e9, 1e9, 1e9, 1e9]], dtype=torch.float64).repeat(len(z), 1)
    for _ in range(steps):
        clock, state = step(clock, span, state)
    assert (clock[:, Clock.T] == t_end).all()
    value, divergence = field.with_divergence(t_end, state[:, : z.shape[1]])
    stale = state[:, z.shape[1] :] - torch.cat([value, divergence], 1)
    return state[:, : z.shape[1]], clock[:, Clock.ELL], float(stale.abs().max())


# from coarse enough for the leading term to fine enough to stand above rounding, on [0, 4]
STEPS = {
    "euler": (32, 128),
    "bosh3": (16, 128),
    "rk4": (16, 128),
    "dopri5": (16, 128),
    "tsit5": (8, 64),
    "dopri8": (4, 8),
}


def slope(errors: list[float], steps: tuple[int, int]) -> float:
    return math.log(errors[0] / errors[1]) / math.log(steps[1] / steps[0])


@pytest.mark.parametrize("tableau", METHODS.values(), ids=METHODS)
@torch.no_grad()
def test_the_measured_order_on_a_field_that_changes_with_time(tableau: Tableau) -> None:
    field, z = Wrapped(Growth(), 1).double(), torch.tensor([[1.5]], dtype=torch.float64)
    errors, errors_ell = [], []
    for steps in STEPS[tableau.name]:
        end, ell, stale = fixed_steps(tableau, field, z, steps)
        errors.append(abs(float(end) - 1.5 * math.exp(math.sin(4))))
        errors_ell.append(abs(float(ell[0]) - math.sin(4)))
        assert stale < 1e-13
    assert slope(errors, STEPS[tableau.name]) > tableau.order - 0.5
    assert slope(errors_ell, STEPS[tableau.name]) > tableau.order - 0.5


@pytest.mark.parametrize("tableau", METHODS.values(), ids=METHODS)
@torch.no_grad()
def test_the_measured_order_on_a_linear_system(tableau: Tableau) -> None:
    flow = linear_flow(4, seed=1, t_data=4.0).double()
    z = torch.randn(3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    exact = torch.from_numpy(Affine(flow).forward(z.numpy()))
    errors = []
    for steps in STEPS[tableau.name]:
        end, ell, stale = fixed_steps(tableau, flow.field, z, steps)
        errors.append(float((flow.transform.decode(end)[0] - exact).abs().max()))
        assert stale < 1e-11
        np.testing.assert_allclose(ell.numpy(), Affine(flow).log_det_of_flow, rtol=1e-12)  # constant: exact
    assert slope(errors, STEPS[tableau.name]) > tableau.order - 0.5


def damaged() -> Iterator[tuple[str, Tableau, dict[str, object]]]:
    """Every coefficient of every method with a wrong digit, and every two error weights exchanged."""
    for method in METHODS.values():
        for i, row in enumerate(method.a):
            for j, value in enumerate(row):
                wrong = (*row[:j], value * 1.001, *row[j + 1 :])
                if value:
                    yield (
                        f"{method.name}-a{i + 2},{j + 1}",
                        method,
                        {"a": (*method.a[:i], wrong, *method.a[i + 1 :])},
                    )
        for name in ("b", "e"):
            weights = getattr(method, name)
            for j, value in enumerate(weights):
                if value:
                    wrong = (*weights[:j], value * 1.001, *weights[j + 1 :])
                    yield f"{method.name}-{name}{j + 1}", method, {name: wrong}
        for j in range(1, len(method.e)):
            if method.e[j] != method.e[j - 1]:
                e = (*method.e[: j - 1], method.e[j], method.e[j - 1], *method.e[j + 1 :])
                yield f"{method.name}-e{j}<->e{j + 1}", method, {"e": e}


DAMAGED = {name: (method, change) for name, method, change in damaged()}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_wrong_digit_is_refused(name: str) -> None:
    method, change = DAMAGED[name]
    with pytest.raises(ValueError, match=f"tableau {method.name}"):
        dataclasses.replace(method, **change)


def test_the_sign_that_the_tsit5_paper_prints_is_refused() -> None:
    tsit5 = METHODS["tsit5"]
    with pytest.raises(ValueError, match=r"tsit5: Σ e"):
        dataclasses.replace(tsit5, e=(*tsit5.e[:-1], 1 / 66))


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"order": 6}, "Σ b"),
        ({"a": METHODS["dopri5"].a[:-1]}, "rows of length"),
        ({"e": METHODS["dopri5"].e[:-1]}, "7 entries, has 6"),
        ({"b": (math.nan, *METHODS["dopri5"].b[1:])}, "Σ b"),
    ],
)
def test_shapes_and_claims_are_checked(change: dict[str, object], what: str) -> None:
    with pytest.raises(ValueError, match=what):
        dataclasses.replace(METHODS["dopri5"], **change)
