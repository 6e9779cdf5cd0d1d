"""The closed-batch solver against closed forms, SciPy's DOP853 and torchdiffeq."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
import torchdiffeq
from scipy.integrate import solve_ivp
from tests.problems import FLOWS, Affine, Expiring, Growth, identity, linear_flow, shaken, wrapped_flow
from torch import Tensor

from pushforward.flows.fields import MLP, VectorField
from pushforward.flows.flow import Flow
from pushforward.solvers.solve import integrate, log_density
from pushforward.solvers.state import Clock, Stop
from pushforward.solvers.tableau import METHODS

ADAPTIVE = [method.name for method in METHODS.values() if method.adaptive]


def dop853(field: VectorField, z: Tensor, c: Tensor | None, t_start: float, t_end: float) -> np.ndarray:
    """[z, ∫ tr dt] of one row at the end, at 1e-12."""

    def right_hand_side(t: float, y: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            value, divergence = field.with_divergence(t, torch.from_numpy(y[None, :-1]), c)
        return torch.cat([value, divergence], 1)[0].numpy()

    start = np.append(z.numpy(), 0.0)
    solution = solve_ivp(right_hand_side, (t_start, t_end), start, "DOP853", rtol=1e-12, atol=1e-12)
    assert solution.success
    return solution.y[:, -1]


def data(flow: Flow, rows: int) -> tuple[Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(flow.dim)
    z = torch.randn(rows, flow.dim, generator=generator, dtype=torch.float64)
    c = torch.randn(rows, flow.context_dim, generator=generator, dtype=torch.float64)
    return flow.transform.decode(z)[0], c if flow.context_dim else None


@pytest.mark.parametrize("name", FLOWS)
def test_the_reference_agrees_with_dop853(name: str) -> None:
    flow = FLOWS[name][0]()
    x, c = data(flow, 3)
    value, base = log_density(flow, x, c)
    exact = Flow(flow.field.double(), flow.transform, flow.t_base, flow.t_data)
    z, log_det = exact.transform.encode(x)
    for row in range(len(x)):
        end = dop853(exact.field, z[row], None if c is None else c[[row]], flow.t_data, flow.t_base)
        np.testing.assert_allclose(base[row], end[:-1], rtol=1e-7, atol=1e-8)
        expected = -0.5 * (end[:-1] @ end[:-1]) - 0.5 * flow.dim * math.log(2 * math.pi) + end[-1]
        assert float(value[row]) == pytest.approx(expected + float(log_det[row, 0]), abs=1e-7)


@pytest.mark.parametrize("method", ADAPTIVE)
@pytest.mark.parametrize("interval", [(0.0, 1.0), (1.0, 0.0), (-1.0, 0.5)], ids=str)
def test_the_linear_flow_is_solved_to_its_closed_form(method: str, interval: tuple[float, float]) -> None:
    flow = linear_flow(4, seed=3, t_base=interval[0], t_data=interval[1])
    x = torch.from_numpy(np.random.default_rng(0).normal(size=(6, 4)))
    tolerance = 1e-7 if method == "bosh3" else 1e-10
    value, base = log_density(flow, x, method=method, tolerance=tolerance)
    np.testing.assert_allclose(value, Affine(flow).log_density(x.numpy()), rtol=0, atol=100 * tolerance)
    np.testing.assert_allclose(base, Affine(flow).inverse(x.numpy()), rtol=0, atol=100 * tolerance)


def test_float32_fields_are_solved_in_float64() -> None:
    flow = linear_flow(3).float()
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    value, _ = log_density(flow, x)
    assert value.dtype == torch.float64
    np.testing.assert_allclose(value, Affine(flow).log_density(x.double().numpy()), rtol=0, atol=1e-8)
    assert next(flow.parameters()).dtype == torch.float32  # the flow of the caller stays as it was


def test_rows_outside_the_support_have_no_density_and_rows_that_fail_have_none_to_tell() -> None:
    flow = FLOWS["tanh2"][0]()
    value, _ = log_density(flow, torch.tensor([[-0.5, 0.0], [0.5, 0.0], [0.0, 0.0]]))
    assert value[0] == value[2] == -math.inf
    assert math.isfinite(value[1])
    broken, _ = log_density(wrapped_flow(Expiring(), 2), torch.ones(1, 2))
    assert math.isnan(broken[0])


def test_the_error_falls_with_the_tolerance_and_the_estimate_goes_along() -> None:
    flow = wrapped_flow(Growth(), 2, 0.0, 3.0)
    z = torch.tensor([[1.0, -0.3]], dtype=torch.float64)
    errors, estimates = [], []
    for tolerance in (1e-3, 1e-5, 1e-7, 1e-9):
        end = integrate(flow, z, None, 0.0, 3.0, method="dopri5", tolerance=tolerance).clock[0]
        errors.append(abs(float(end[Clock.ELL]) - 2 * math.sin(3)))
        estimates.append(float(end[Clock.ERROR]))
    assert all(b < a / 10 for a, b in itertools.pairwise(errors))
    assert all(b < a / 10 for a, b in itertools.pairwise(estimates))
    assert all(error <= estimate for error, estimate in zip(errors, estimates, strict=True))


def test_torchdiffeq_needs_as_many_steps_for_the_same_error() -> None:
    # Its error estimate is 2/3 of the classical one, so tol there is 1.5 tol here; the controllers differ in
    # other details too, so the two are compared at the error they reach, not step for step.
    field = shaken(MLP(6, (32, 32), activation="tanh"), 5, gain=1.5).double()
    flow = Flow(field, identity(6))
    tolerance = 1e-6
    ours, theirs, our_steps, their_steps = [], [], 0, 0
    for z in torch.randn(5, 1, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64):
        evaluations = 0

        def coupled(t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            nonlocal evaluations
            evaluations += 1
            return field.with_divergence(t, state[0])

        reference = dop853(field, z[0], None, 1.0, 0.0)
        start = (z, torch.zeros(1, 1, dtype=torch.float64))
        with torch.no_grad():
            end = torchdiffeq.odeint(
                coupled, start, torch.tensor([1.0, 0.0]).double(), rtol=tolerance / 1.5, atol=tolerance / 1.5
            )
        theirs.append(abs(float(end[1][-1]) - reference[-1]))
        their_steps += evaluations // 6
        clock = integrate(flow, z, None, 1.0, 0.0, method="dopri5", tolerance=tolerance).clock[0]
        assert clock[Clock.STOP] == Stop.FINISHED
        ours.append(abs(float(clock[Clock.ELL]) - reference[-1]))
        our_steps += int(clock[Clock.ATTEMPTS])
    assert 1 / 3 < np.mean(ours) / np.mean(theirs) < 3
    assert 0.8 < our_steps / their_steps < 1.25
