"""Conformal p-values and false discoveries: definitions, edge cases and the guarantees themselves."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from pushforward.errors import InvalidInput, InvalidModel
from pushforward.scoring.calibration import QUANTILE_LEVELS, Calibration, benjamini_hochberg, flag

# Few distinct values make ties, which the inequalities must count.
values = st.one_of(st.integers(-5, 5).map(float), st.floats(-1e6, 1e6), st.just(-np.inf))


def calibrated(log_density: Any) -> Calibration:
    return Calibration.from_rows(log_density, np.zeros((len(log_density), 1)))


# p-values


@given(st.lists(values, min_size=1, max_size=30), st.lists(values, max_size=10))
def test_p_values_are_those_of_the_definition(held_out: list[float], asked: list[float]) -> None:
    n = len(held_out)
    low = [(1 + sum(-c >= -x for c in held_out)) / (n + 1) for x in asked]
    high = [(1 + sum(-c <= -x for c in held_out)) / (n + 1) for x in asked]
    calibration = calibrated(held_out)
    assert calibration.p_values(asked).tolist() == low
    assert calibration.p_values(asked, two_sided=True).tolist() == [
        min(1.0, 2 * min(pair)) for pair in zip(low, high, strict=True)
    ]


def test_extreme_and_failed_rows() -> None:
    calibration = calibrated(np.arange(99.0))
    p = calibration.p_values([-np.inf, -1.0, 0.0, 49.0, 98.0, 1e300, np.inf, np.nan])
    np.testing.assert_array_equal(p, [0.01, 0.01, 0.02, 0.51, 1.0, 1.0, 1.0, np.nan])
    two = calibration.p_values([-np.inf, 0.0, 49.0, 98.0, 99.0, np.inf, np.nan], two_sided=True)
    np.testing.assert_array_equal(two, [0.02, 0.04, 1.0, 0.04, 0.02, 0.02, np.nan])
    assert calibration.smallest_p_value() == 0.01
    assert calibration.smallest_p_value(two_sided=True) == 0.02
    assert calibration.p_values([]).shape == (0,)


@pytest.mark.parametrize("two_sided", [False, True])
@pytest.mark.parametrize("alpha", [0.01, 0.05, 0.2])
def test_false_alarms_are_at_most_alpha_whatever_the_score(alpha: float, two_sided: bool) -> None:
    # The "model" is a wrong density with heavy ties; only exchangeability is needed.
    random = np.random.default_rng(17)
    n, asked, repeats = 99, 20, 600
    alarms = np.empty(repeats)
    for repeat in range(repeats):
        log_density = -np.round(random.standard_cauchy(n + asked) ** 2, 1)
        p = calibrated(log_density[:n]).p_values(log_density[n:], two_sided=two_sided)
        alarms[repeat] = flag(p, alpha).mean()
    assert alarms.mean() <= alpha + 4 * alarms.std() / repeats**0.5
    if not two_sided:  # and the level is used, as far as the ties leave it
        assert alarms.mean() >= 0.6 * alpha


def test_p_values_of_ordinary_rows_are_uniform() -> None:
    random = np.random.default_rng(5)
    n = 199
    one, two = np.array(
        [
            [calibration.p_values(row)[0], calibration.p_values(row, two_sided=True)[0]]
            for calibration, row in (
                (calibrated(random.normal(size=n)), random.normal(size=1)) for _ in range(1500)
            )
        ]
    ).T
    assert stats.kstest(one - random.random(1500) / (n + 1), "uniform").pvalue > 1e-3
    assert stats.kstest(two - 2 * random.random(1500) / (n + 1), "uniform").pvalue > 1e-3


# Flags


def test_flag_is_at_most_alpha_and_never_nan() -> None:
    assert flag([0.05, 0.0500001, np.nan], 0.05).tolist() == [True, False, False]


@given(
    st.lists(st.one_of(st.floats(0, 1), st.just(float("nan"))), max_size=25),
    st.floats(0.001, 0.999),
)
def test_benjamini_hochberg_is_scipys_adjustment(p: list[float], fdr: float) -> None:
    filled = np.nan_to_num(p, nan=1.0)
    flagged = benjamini_hochberg(p, fdr)
    assert flagged.shape == (len(p),)
    if p:
        adjusted = stats.false_discovery_control(filled, method="bh")
        clear = np.abs(adjusted - fdr) > 1e-12
        assert (flagged == (adjusted <= fdr))[clear].all()
    assert not flagged[np.isnan(p)].any()


def test_the_share_of_false_discoveries_is_bounded_for_conformal_p_values() -> None:
    random = np.random.default_rng(23)
    fdr, repeats = 0.1, 400
    false_share, found = np.empty(repeats), np.empty(repeats)
    for repeat in range(repeats):
        calibration = calibrated(random.normal(size=1000))
        log_density = np.concatenate([random.normal(size=180), random.normal(loc=-5, size=20)])
        flagged = benjamini_hochberg(calibration.p_values(log_density), fdr)
        false_share[repeat] = flagged[:180].sum() / max(1, flagged.sum())
        found[repeat] = flagged[180:].mean()
    assert false_share.mean() <= fdr + 4 * false_share.std() / repeats**0.5
    assert found.mean() > 0.8


def test_failed_rows_do_not_make_others_easier_to_flag() -> None:
    p = [0.02, 0.5, 0.5, 0.5]
    assert benjamini_hochberg(p, 0.09).tolist() == [True, False, False, False]
    assert not benjamini_hochberg([*p, np.nan], 0.09).any()


@pytest.mark.parametrize("level", [0, 1, -0.1, 5, float("nan"), float("inf")])
def test_levels_outside_zero_and_one_are_refused(level: float) -> None:
    with pytest.raises(InvalidInput, match="alpha must be between 0 and 1") as raised:
        flag([0.5], level)
    assert raised.value.where == "alpha"
    with pytest.raises(InvalidInput, match="fdr must be between 0 and 1") as raised:
        benjamini_hochberg([0.5], level)
    assert raised.value.where == "fdr"


# Making, writing and reading


def test_calibration_rows_become_sorted_densities_and_quantiles(tmp_path: Path) -> None:
    random = np.random.default_rng(1)
    log_density, x = random.normal(size=301), random.normal(size=(301, 3))
    log_density[7] = -np.inf
    x[:, 2] = 0.1  # a constant column
    calibration = Calibration.from_rows(log_density, x)
    assert calibration.rows == 301
    np.testing.assert_array_equal(calibration.log_density, np.sort(log_density))
    np.testing.assert_array_equal(calibration.quantile_levels, QUANTILE_LEVELS)
    np.testing.assert_allclose(calibration.quantiles, np.quantile(x, QUANTILE_LEVELS, axis=0), rtol=1e-15)

    path = tmp_path / "calibration.safetensors"
    calibration.save(path)
    again = Calibration.load(path)
    for name in ("log_density", "quantiles", "quantile_levels"):
        np.testing.assert_array_equal(getattr(again, name), getattr(calibration, name))
    (tmp_path / "other").touch()
    assert path.stat().st_mode == (tmp_path / "other").stat().st_mode  # as readable as any new file


@pytest.mark.parametrize(
    ("log_density", "x"),
    [
        ([], np.zeros((0, 2))),
        ([0.0, np.nan], np.zeros((2, 2))),
        ([0.0, np.inf], np.zeros((2, 2))),
        ([0.0], np.zeros((2, 2))),
        ([0.0, 1.0], np.zeros(2)),
        ([[0.0, 1.0]], np.zeros((2, 2))),
        ([0.0, 1.0], np.array([[0.0], [np.nan]])),
        ([0.0, 1.0], np.zeros((2, 0))),
    ],
)
def test_rows_that_cannot_calibrate_are_refused(log_density: Any, x: Any) -> None:
    with pytest.raises(ValueError, match=r"log_density|quantiles"):
        Calibration.from_rows(log_density, x)


GOOD = {
    "log_density": np.array([-np.inf, -1.0, 0.0]),
    "quantiles": np.array([[0.0, 1.0], [0.0, 2.0]]),
    "quantile_levels": np.array([0.25, 0.75]),
}


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"log_density": np.array([1.0, 0.0])}, "log_density must ascend"),
        ({"log_density": np.array([0.0, np.nan])}, "log_density must ascend"),
        ({"log_density": np.array([np.nan])}, "log_density must ascend"),
        ({"log_density": np.array([0.0, np.inf])}, "log_density must ascend"),
        ({"log_density": np.zeros(3, dtype=np.float32)}, "log_density must be"),
        ({"log_density": np.zeros((3, 1))}, "log_density must be"),
        ({"log_density": np.zeros(0)}, "log_density must be"),
        ({"quantiles": np.array([[1.0, 1.0], [0.0, 2.0]])}, "quantiles must be finite and ascend"),
        ({"quantiles": np.array([[0.0, 1.0], [np.inf, 2.0]])}, "quantiles must be finite and ascend"),
        ({"quantiles": np.zeros((3, 2))}, "one row for each"),
        ({"quantiles": np.zeros((2, 0))}, "quantiles must be"),
        ({"quantile_levels": np.array([0.75, 0.25])}, "quantile_levels must ascend"),
        ({"quantile_levels": np.array([0.0, 0.25])}, "quantile_levels must ascend"),
        ({"quantile_levels": np.array([0.25, np.nan])}, "quantile_levels must ascend"),
        ({"more": np.zeros(1)}, "no more"),
        ({"log_density": None}, "must hold"),
    ],
)
def test_a_file_with_unsound_arrays_is_refused(tmp_path: Path, change: dict[str, Any], what: str) -> None:
    path = tmp_path / "moons" / "1" / "calibration.safetensors"
    path.parent.mkdir(parents=True)
    arrays = {name: array for name, array in (GOOD | change).items() if array is not None}
    safetensors.numpy.save_file(GOOD, path)
    assert Calibration.load(path).rows == 3
    safetensors.numpy.save_file(arrays, path)
    with pytest.raises(InvalidModel, match=what) as raised:
        Calibration.load(path)
    assert raised.value.file == "moons/1/calibration.safetensors"
    assert str(tmp_path) not in raised.value.message


class Bomb:
    """Unpickling this creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


def test_a_file_of_another_kind_is_refused_and_never_run(tmp_path: Path) -> None:
    path, mark = tmp_path / "calibration.safetensors", tmp_path / "mark"
    whole = safetensors.numpy.save(GOOD)
    pickled = pickle.dumps(Bomb(mark))
    unknown_dtype = whole.replace(b'"F64"', b'"F8_E5M2"', 1)
    huge_header = (2**62).to_bytes(8, "little") + whole[8:]
    for content in (b"", whole[:20], whole[:-1], whole + b"\0", pickled, unknown_dtype, huge_header):
        path.write_bytes(content)
        with pytest.raises(InvalidModel, match=r"calibration\.safetensors is not a sound calibration file"):
            Calibration.load(path)
    assert not mark.exists()
    pickle.loads(pickled)
    assert mark.exists()  # the bomb was live
    path.unlink()
    with pytest.raises(InvalidModel, match=r"calibration\.safetensors cannot be read: No such file"):
        Calibration.load(path)
