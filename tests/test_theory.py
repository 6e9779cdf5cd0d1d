"""The theory, as checks: the instantaneous change of variables, and densities against exact ones."""

from __future__ import annotations

import copy
import itertools
import math

import numpy as np
import pytest
import torch
from scipy.integrate import quad_vec
from scipy.linalg import expm
from scipy.stats import kstest, multivariate_normal
from tests.problems import Affine, exported, identity, linear_flow, shaken
from torch import Tensor

from pushforward.engine.request import Kind
from pushforward.flows.fields import MLP, Linear, planar
from pushforward.flows.flow import Flow, base_log_density
from pushforward.noise import standard_normal
from pushforward.solvers.solve import integrate, log_density
from pushforward.solvers.state import Clock


def composed_planar_flows(field: MLP, z: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """The discrete flow of Rezende and Mohamed 2015: maps z ← z + u tanh(wᵀz + b), one unit after another.

    Every map has the determinant 1 + uᵀw tanh'(wᵀz + b) (determinant lemma), so the sum of the logarithms
    is the exact log|det| of the composition, whatever it has to do with a differential equation.
    """
    h, log_det = 1 / steps, torch.zeros(len(z), dtype=torch.float64)
    w, u = field.weights[0].weight, field.weights[1].weight.T
    for step in range(steps):
        features = field.time(torch.full((1, 1), step * h, dtype=torch.float64))
        offset = field.biases[0](features)[0]
        gate = 2 * torch.sigmoid(field.gates[0](features))[0]
        for n in range(len(w)):
            h_n = torch.tanh(z @ w[n] + offset[n])
            log_det = log_det + (1 + h * gate[n] * (u[n] @ w[n]) * (1 - h_n**2)).abs().log()
            z = z + h * gate[n] * h_n[:, None] * u[n]
        z = z + h * field.biases[1](features)
    return z, log_det


@torch.no_grad()
def test_theorem_1_is_the_limit_of_the_discrete_change_of_variables() -> None:
    # Chen et al. 2018, theorem 1: d log p(z(t)) / dt = −tr ∂f/∂z.  A composition of planar flows with steps
    # of size h is a first-order discretisation of the planar continuous flow: both errors must fall like h.
    field = shaken(planar(3, 16), 8, gain=1.5).double()
    z = torch.randn(5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    exact = integrate(Flow(field, identity(3)), z, None, 0.0, 1.0)
    ell = exact.clock[:, Clock.ELL]
    assert ell.abs().min() > 0.01
    errors = []
    for steps in (50, 100, 200, 400):
        end, log_det = composed_planar_flows(field, z, steps)
        errors.append([float((log_det - ell).abs().max()), float((end - exact.z).abs().max())])
    for coarse, fine in itertools.pairwise(np.array(errors)):
        assert (coarse / fine > 1.8).all()
        assert (coarse / fine < 2.2).all()
    assert max(errors[-1]) < 1e-2


@torch.no_grad()
def test_the_divergence_integral_is_the_log_determinant_of_the_flow_map() -> None:
    # the same without any discrete flow: log|det ∂z(1)/∂z(0)|, the Jacobian by differences of solves
    field = shaken(MLP(3, (32, 16), gate=True), 9, gain=1.2).double()
    flow, z = Flow(field, identity(3)), torch.tensor([[0.3, -0.7, 1.1]], dtype=torch.float64)
    h = 1e-4
    shifted = torch.cat([z + h * torch.eye(3), z - h * torch.eye(3)])
    end = integrate(flow, shifted, None, 0.0, 1.0, tolerance=1e-12).z
    jacobian = (end[:3] - end[3:]) / (2 * h)
    ell = integrate(flow, z, None, 0.0, 1.0).clock[0, Clock.ELL]
    assert float(ell) == pytest.approx(float(torch.linalg.slogdet(jacobian).logabsdet), abs=1e-6)
    assert abs(float(ell)) > 0.05


@pytest.mark.parametrize(
    ("precision", "tolerance", "allowed"), [("float64", 1e-9, 1e-6), ("float32", 1e-5, 1e-3)]
)
def test_where_both_are_exact_the_flow_is_the_discrete_flow_and_the_gaussian(
    precision: str, tolerance: float, allowed: float
) -> None:
    # dz/dt = A z + b: one affine map x = e^A z + …, a discrete flow, and a Gaussian, all in closed form
    model = exported("linear3")
    affine = Affine(model.flow)
    gaussian = multivariate_normal(affine.shift, affine.matrix @ affine.matrix.T)
    x = gaussian.rvs(size=50, random_state=0)
    np.testing.assert_allclose(affine.log_density(x), gaussian.logpdf(x), rtol=0, atol=1e-10)

    settings = {"precision": precision, "tolerance": tolerance, "max_steps": 10_000}
    encoded = model.solve(Kind.ENCODE, x, None, **settings)
    np.testing.assert_allclose(encoded.log_density, gaussian.logpdf(x), rtol=0, atol=allowed)
    np.testing.assert_allclose(encoded.value, affine.inverse(x), rtol=0, atol=allowed)
    z = standard_normal(0, 0, 50, 3)
    decoded = model.solve(Kind.DECODE, z, None, **settings)
    np.testing.assert_allclose(decoded.value, affine.forward(z), rtol=0, atol=10 * allowed)
    np.testing.assert_allclose(decoded.log_density, gaussian.logpdf(affine.forward(z)), rtol=0, atol=allowed)


def test_samples_are_those_of_the_gaussian() -> None:
    model = exported("linear3")
    affine = Affine(model.flow)
    x = model.solve(Kind.DECODE, standard_normal(3, 0, 4000, 3), None, density=False).value
    for direction in np.random.default_rng(0).normal(size=(5, 3)):
        mean = direction @ affine.shift
        deviation = np.linalg.norm(affine.matrix.T @ direction)
        assert kstest((x @ direction - mean) / deviation, "norm").pvalue > 1e-3


def test_a_bias_that_changes_with_time_has_its_own_closed_form() -> None:
    # x(1) = e^A z + ∫ e^{A (1 − s)} b(s) ds, by quadrature
    torch.manual_seed(0)
    field = Linear(2).double()
    with torch.no_grad():
        field.weight.copy_(torch.tensor([[0.3, -1.0], [1.2, -0.1]]))
        field.bias.weight.normal_()
    matrix = field.weight.detach().numpy()

    def integrand(s: float) -> np.ndarray:
        features = field.time(torch.tensor([[s]], dtype=torch.float64))
        return expm(matrix * (1 - s)) @ field.bias(features).detach().numpy()[0]

    shift, _ = quad_vec(integrand, 0, 1, epsabs=1e-12)
    gaussian = multivariate_normal(shift, expm(matrix) @ expm(matrix).T)
    x = gaussian.rvs(size=20, random_state=1)
    value, base = log_density(Flow(field, identity(2)), torch.from_numpy(x))
    np.testing.assert_allclose(value, gaussian.logpdf(x), rtol=0, atol=1e-8)
    np.testing.assert_allclose(base, np.linalg.solve(expm(matrix), (x - shift).T).T, rtol=0, atol=1e-8)


def test_densities_integrate_to_one() -> None:
    # the first feature is positive: a grid of its logarithm, with dx = x d log x
    axes = [np.linspace(-6, 6, 241), np.linspace(-8, 8, 241)]
    grid = np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 2)
    x = np.stack([np.exp(grid[:, 0]), grid[:, 1]], 1)
    answer = exported("tanh2").solve(Kind.ENCODE, x, None, tolerance=1e-4)
    cell = math.prod(axis[1] - axis[0] for axis in axes)
    assert np.exp(answer.log_density + grid[:, 0]).sum() * cell == pytest.approx(1, abs=1e-3)


@torch.no_grad()
def test_densities_transform_as_they_should_under_a_change_of_units() -> None:
    # p in new units is p divided by the factor: −log 10 for each feature that is measured in tenths
    flow = linear_flow(3, seed=2)
    scaled = copy.deepcopy(flow)
    scaled.transform.mean.mul_(10)
    scaled.transform.scale.mul_(10)
    x = torch.randn(6, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    before, _ = log_density(flow, x)
    after, _ = log_density(scaled, 10 * x)
    np.testing.assert_allclose(after, before - 3 * math.log(10), rtol=0, atol=1e-9)


@torch.no_grad()
def test_the_untrained_flow_is_its_base() -> None:
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    value, z = log_density(Flow(MLP(4, (16, 16)), identity(4)), x)
    np.testing.assert_allclose(value, base_log_density(x)[:, 0], rtol=0, atol=1e-12)
    np.testing.assert_allclose(z, x, rtol=0, atol=1e-12)
