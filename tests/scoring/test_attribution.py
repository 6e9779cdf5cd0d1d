"""Attributions: the order of the replaced rows, and what their log-densities come to."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pushforward.scoring.attribution import attributions, replacements
from pushforward.scoring.calibration import Calibration

sizes = st.integers(1, 5)


@given(st.integers(0, 4), sizes, sizes)
def test_every_feature_is_replaced_by_every_quantile(n: int, dim: int, levels: int) -> None:
    random = np.random.default_rng([n, dim, levels])
    x, quantiles = random.normal(size=(n, dim)), random.normal(size=(levels, dim))
    before = x.copy()
    candidates = replacements(x, quantiles)
    expected = []
    for row in x:
        for feature in range(dim):
            for level in range(levels):
                replaced = row.copy()
                replaced[feature] = quantiles[level, feature]
                expected.append(replaced)
    np.testing.assert_array_equal(candidates, np.reshape(expected, (n * dim * levels, dim)))
    np.testing.assert_array_equal(x, before)
    assert attributions(np.zeros(n), np.zeros(len(candidates)), dim).shape == (n, dim)


def test_a_gaussian_gives_the_closed_form() -> None:
    # For independent features, replacing xᵢ by its median 0 gains xᵢ²/2 nats, and 0.3²/2 less by ±0.3.
    x = np.array([[0.0, 1.0, -4.0], [0.1, -0.2, 3.0]])
    quantiles = np.array([[-0.3] * 3, [0.0] * 3, [0.3] * 3])

    def log_density(rows: np.ndarray) -> np.ndarray:
        return np.asarray(-0.5 * (rows**2).sum(axis=1) - 1.5 * np.log(2 * np.pi))

    found = attributions(log_density(x), log_density(replacements(x, quantiles)), 3)
    np.testing.assert_allclose(found, x**2 / 2, atol=1e-12)


def test_the_feature_that_breaks_a_correlation_is_blamed_with_its_partner() -> None:
    random = np.random.default_rng(0)
    covariance = np.array([[1.0, 0.9, 0.0], [0.9, 1.0, 0.0], [0.0, 0.0, 1.0]])
    rows = random.multivariate_normal(np.zeros(3), covariance, size=2000)
    inverse = np.linalg.inv(covariance)

    def log_density(x: np.ndarray) -> np.ndarray:
        return np.asarray(-0.5 * np.einsum("ni,ij,nj->n", x, inverse, x))

    calibration = Calibration.from_rows(log_density(rows), rows)
    x = np.array([[1.6, -1.6, 0.1]])  # each feature ordinary alone
    found = attributions(log_density(x), log_density(replacements(x, calibration.quantiles)), 3)[0]
    assert calibration.p_values(log_density(x))[0] < 0.001
    assert found[:2].min() > 10 > 0.1 > found[2]


def test_gains_below_zero_are_zero() -> None:
    assert attributions(np.array([0.0]), np.array([-1.0, -2.0, 1.0, -5.0]), 2).tolist() == [[0.0, 1.0]]


def test_infinite_and_failed_densities() -> None:
    inf, nan = np.inf, np.nan
    outside = attributions(np.array([-inf]), np.array([-inf, -inf, -3.0, -inf, nan, -inf]), 3)
    np.testing.assert_array_equal(outside, [[0.0, inf, 0.0]])
    partly = attributions(np.array([0.0]), np.array([nan, 2.0, nan, nan, -inf, -inf]), 3)
    np.testing.assert_array_equal(partly, [[2.0, nan, 0.0]])
    np.testing.assert_array_equal(attributions(np.array([nan]), np.array([1.0, nan]), 2), [[nan, nan]])


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="rows have 2 features"):
        replacements(np.zeros((1, 2)), np.zeros((3, 4)))
    with pytest.raises(ValueError, match="reshape"):
        attributions(np.zeros(2), np.zeros(7), 2)
