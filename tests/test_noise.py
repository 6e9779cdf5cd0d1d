"""Base noise: a pure function of (seed, row), and standard normal."""

from __future__ import annotations

from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from pushforward.errors import InvalidInput
from pushforward.noise import MAX_SEED, _inverse_normal_cdf, fresh_seed, standard_normal

PINNED = [
    "0x1.22e119f4c4f13p+0",
    "-0x1.13578de716137p-1",
    "-0x1.9cf751ecde01bp-3",
    "-0x1.62de1a82988fcp+0",
    "0x1.078c187aa266ep-1",
    "-0x1.11df233088e55p-1",
]

seeds = st.integers(0, MAX_SEED)
starts = st.one_of(st.integers(0, 1000), st.integers(0, 2**62))


@given(seeds, starts, st.lists(st.integers(0, 9), min_size=1, max_size=6), st.integers(1, 19))
def test_every_split_gives_the_same_bits(seed: int, start: int, chunks: list[int], dim: int) -> None:
    whole = standard_normal(seed, start, sum(chunks), dim)
    edges = np.cumsum([0, *chunks])
    parts = [standard_normal(seed, start + int(a), n, dim) for a, n in zip(edges[:-1], chunks, strict=True)]
    assert whole.tobytes() == np.concatenate(parts).tobytes()
    assert whole.shape == (sum(chunks), dim)
    assert whole.dtype == np.float64
    assert np.isfinite(whole).all()


def test_long_vectors_and_single_rows_agree() -> None:
    # Vector instructions work on whole groups and treat the rest apart: nothing may show of that.
    whole = standard_normal(3, 0, 2001, 5)
    alone = np.concatenate([standard_normal(3, row, 1, 5) for row in range(2001)])
    assert whole.tobytes() == alone.tobytes()


@given(st.integers(1, 16), st.integers(1, 16))
def test_widths_of_one_block_count_share_their_columns(a: int, b: int) -> None:
    if (a + 3) // 4 == (b + 3) // 4:
        shared = min(a, b)
        first, second = standard_normal(1, 5, 3, a), standard_normal(1, 5, 3, b)
        assert np.array_equal(first[:, :shared], second[:, :shared])


def test_the_generator_is_philox_4x64_10() -> None:
    # Known answers of the Random123 distribution for counter 0 and key 0, and all bits set.
    ones = 2**64 - 1
    zero = np.random.Philox(counter=2**256 - 1, key=0).random_raw(4)  # NumPy counts up before it draws
    full = np.random.Philox(counter=[ones - 1, ones, ones, ones], key=[ones, ones]).random_raw(4)
    assert [f"{int(word):016x}" for word in zero] == [
        "16554d9eca36314c",
        "db20fe9d672d0fdc",
        "d7e772cee186176b",
        "7e68b68aec7ba23b",
    ]
    assert [f"{int(word):016x}" for word in full] == [
        "87b092c3013fe90b",
        "438c3c67be8d0224",
        "9cc7d7c69cd777b6",
        "a09caebf594f0ba0",
    ]


def test_the_documented_equation() -> None:
    seed, row, dim = 11, 6, 5
    draws = np.random.Philox(key=seed).advance(row * 2).random_raw(8)[:dim]
    expected = [NormalDist().inv_cdf(((int(k) >> 12) + 0.5) / 2**52) for k in draws]
    np.testing.assert_allclose(standard_normal(seed, row, 1, dim)[0], expected, rtol=1e-14)


def test_the_bits_do_not_change_between_releases() -> None:
    rows = standard_normal(seed=7, start=0, count=2, dim=3)
    assert [value.hex() for value in rows.ravel().tolist()] == PINNED


def test_the_inverse_agrees_with_an_independent_one() -> None:
    tails = 2.0 ** -np.arange(1, 54, dtype=np.float64)
    u = np.concatenate([np.random.default_rng(0).random(20_000), tails, 1 - tails[1:]])
    expected = stats.norm.ppf(u)
    np.testing.assert_allclose(_inverse_normal_cdf(u), expected, rtol=4e-15, atol=1e-16)
    np.testing.assert_array_equal(_inverse_normal_cdf(1 - tails[1:40]), -_inverse_normal_cdf(tails[1:40]))


@pytest.mark.parametrize("dim", [1, 2, 30])
def test_rows_are_standard_normal_and_independent(dim: int) -> None:
    z = standard_normal(seed=2024, start=10**9, count=200_000 // dim, dim=dim)
    n = z.size
    assert abs(z.mean()) < 4 / n**0.5
    assert abs((z**2).mean() - 1) < 4 * (2 / n) ** 0.5
    assert abs((z**3).mean()) < 4 * (15 / n) ** 0.5
    assert abs((z**4).mean() - 3) < 4 * (96 / n) ** 0.5
    assert stats.kstest(z.ravel(), "norm").pvalue > 1e-3
    assert abs(np.corrcoef(z[:-1, 0], z[1:, 0])[0, 1]) < 4 / len(z) ** 0.5
    if dim > 1:
        off_diagonal = (z.T @ z / len(z))[~np.eye(dim, dtype=bool)]
        assert np.abs(off_diagonal).max() < 5 / len(z) ** 0.5


def test_neighbouring_seeds_are_unrelated() -> None:
    a, b = standard_normal(1, 0, 20_000, 4).ravel(), standard_normal(2, 0, 20_000, 4).ravel()
    assert abs(np.corrcoef(a, b)[0, 1]) < 4 / a.size**0.5
    assert not np.intersect1d(a, b).size


@pytest.mark.parametrize(
    ("arguments", "where"),
    [
        ((-1, 0, 1, 1), "seed"),
        ((2**64, 0, 1, 1), "seed"),
        ((0, -1, 1, 1), "start"),
        ((0, 0, -1, 1), "count"),
        ((0, 0, 1, 0), "dim"),
    ],
)
def test_arguments_out_of_range_are_named(arguments: tuple[int, int, int, int], where: str) -> None:
    with pytest.raises(InvalidInput, match=where) as raised:
        standard_normal(*arguments)
    assert raised.value.where == where


def test_the_extreme_seed_and_row_work() -> None:
    assert standard_normal(MAX_SEED, 2**63, 2, 3).shape == (2, 3)
    assert standard_normal(0, 0, 0, 3).shape == (0, 3)


def test_fresh_seeds_differ_and_survive_json_readers() -> None:
    drawn = [fresh_seed() for _ in range(50)]
    assert len(set(drawn)) == 50
    assert all(0 <= seed < 2**53 for seed in drawn)
