"""The figures of the report, against closed forms."""

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal

from pushforward.flows.fields import Linear
from pushforward.flows.flow import Flow
from pushforward.flows.transforms import Standardize
from pushforward.training.data import build_transform
from pushforward.training.evaluate import c2st, log_density, mixture_log_density, ranking, sample


@pytest.fixture
def flow():
    """x = 3 exp(A) z + 1: a Gaussian flow."""
    field = Linear(2)
    with torch.no_grad():
        field.weight.copy_(torch.tensor([[0.3, -0.5], [0.2, 0.4]]))
    return Flow(field, Standardize(torch.ones(2), torch.full((2,), 3.0)))


@pytest.fixture
def truth(flow):
    grow = 3 * torch.linalg.matrix_exp(flow.field.weight.detach().double()).numpy()
    return multivariate_normal([1, 1], grow @ grow.T)


def test_log_density_of_a_gaussian_flow(flow, truth, rng):
    rows = rng.normal(size=(5000, 2)) * 3
    np.testing.assert_allclose(log_density(flow, rows), truth.logpdf(rows), atol=1e-4)
    np.testing.assert_allclose(log_density(flow, rows, double=True, steps=64), truth.logpdf(rows), atol=1e-7)
    assert flow.field.weight.dtype == torch.float32  # float64 was lent, not kept


def test_samples_of_a_gaussian_flow(flow, truth):
    rows = sample(flow, 20_000, seed=1)
    np.testing.assert_allclose(np.cov(rows.T), truth.cov, rtol=0.05, atol=0.1)
    np.testing.assert_array_equal(sample(flow, 20_000, seed=1), rows)
    accuracy, error = c2st(rows[:300], np.random.default_rng(0).multivariate_normal([1, 1], truth.cov, 300))
    assert abs(accuracy - 0.5) < 4 * error


def test_a_classifier_finds_a_difference():
    rng = np.random.default_rng(0)
    accuracy, error = c2st(rng.normal(size=(200, 2)), rng.normal(size=(200, 2)) + 2)
    assert accuracy > 0.85
    assert error == pytest.approx(0.5 / np.sqrt(400))


def test_one_component_is_the_gaussian_of_maximum_likelihood(rng):
    rows = rng.normal(size=(500, 3)) @ rng.normal(size=(3, 3)) + 5
    transform = build_transform(rows, ["a", "b", "c"])
    expected = multivariate_normal(rows.mean(0), np.cov(rows.T, bias=True)).logpdf(rows)
    found = mixture_log_density(rows, rows, transform, components=1)
    np.testing.assert_allclose(found, expected, atol=0.02)  # 1e-4 on the diagonal
    assert found.mean() == pytest.approx(expected.mean(), abs=1e-3)


def test_the_mixture_finds_two_clusters(rng):
    centres = rng.integers(0, 2, 2000)[:, None] * 20.0
    rows = centres + rng.normal(size=(2000, 1))
    transform = build_transform(rows, ["a"])
    expected = np.log(0.5) - 0.5 * np.log(2 * np.pi) - 0.5
    assert mixture_log_density(rows, rows, transform).mean() == pytest.approx(expected, abs=0.05)
    assert mixture_log_density(rows, rows, transform, components=1).mean() < expected - 1.5


def test_the_conditional_gaussian_is_linear_regression(rng):
    c = rng.normal(size=(3000, 2)) * [1.0, 50.0]
    x = c @ np.array([[2.0], [0.1]]) + 0.5 * rng.normal(size=(3000, 1))
    transform = build_transform(x, ["x"])
    found = mixture_log_density(x, x, transform, context=c, test_context=c, components=1)
    expected = -0.5 * ((x - c @ np.array([[2.0], [0.1]]))[:, 0] / 0.5) ** 2 - np.log(0.5 * np.sqrt(2 * np.pi))
    assert found.mean() == pytest.approx(expected.mean(), abs=0.02)
    np.testing.assert_allclose(found, expected, atol=0.3)


def test_ranking():
    normal, anomalous = np.array([0.0, -1.0, -2.0, -3.0]), np.array([-2.5, -np.inf])
    auroc, precision = ranking(normal, anomalous)
    assert auroc == pytest.approx(7 / 8)  # one of eight pairs is the wrong way round
    assert precision == pytest.approx((1 / 1 + 2 / 3) / 2)
