"""Conformal p-values: how unusual a log-density is among held-out rows of the same kind.

With calibration scores s₁ … s_n, s = −log p, and a row of score s,

    p_low  = (1 + #{i : sᵢ ≥ s}) / (n + 1)            small when the row is too unlikely
    p_high = (1 + #{i : sᵢ ≤ s}) / (n + 1)            small when the row is too likely
    p_two  = min(1, 2·min(p_low, p_high))             small when it is either: not typical

If the row and the calibration rows are exchangeable, P(p ≤ α) ≤ α for every α, over the draw of both,
however bad the model is (Vovk, Gammerman, Shafer, "Algorithmic learning in a random world", 2005).
No p-value is below 1/(n + 1), or 2/(n + 1) two-sided, so smaller levels can flag nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from pushforward.errors import InvalidInput, InvalidModel

__all__ = ["QUANTILE_LEVELS", "Calibration", "benjamini_hochberg", "flag"]

QUANTILE_LEVELS = (0.05, 0.25, 0.5, 0.75, 0.95)

_AXES = {"log_density": 1, "quantiles": 2, "quantile_levels": 1}

Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Calibration:
    """What held-out rows look like to a model.

    Args:
        log_density: [n] float64, ascending; −∞ for rows outside the support of the model.
        quantiles: [q, D] float64, ascending per column: quantiles of each feature, in raw units.
        quantile_levels: [q] float64, strictly ascending in (0, 1).

    Raises:
        ValueError: when the arrays are not as described.
    """

    log_density: Floats
    quantiles: Floats
    quantile_levels: Floats

    def __post_init__(self) -> None:
        for name, axes in _AXES.items():
            array = getattr(self, name)
            if array.dtype != np.float64 or array.ndim != axes or array.size == 0:
                raise ValueError(f"{name} must be a filled float64 array with {axes} axes")
        levels = self.quantile_levels
        if not (np.all(self.log_density[:-1] <= self.log_density[1:]) and self.log_density[-1] < np.inf):
            raise ValueError("log_density must ascend, without NaN or +inf")
        if not (np.all(levels > 0) and np.all(levels < 1) and np.all(np.diff(levels) > 0)):
            raise ValueError("quantile_levels must ascend strictly between 0 and 1")
        if len(self.quantiles) != len(levels):
            raise ValueError("quantiles must have one row for each of quantile_levels")
        if not (np.isfinite(self.quantiles).all() and np.all(np.diff(self.quantiles, axis=0) >= 0)):
            raise ValueError("quantiles must be finite and ascend down each column")

    @classmethod
    def from_rows(
        cls, log_density: ArrayLike, x: ArrayLike, levels: Sequence[float] = QUANTILE_LEVELS
    ) -> Self:
        """Calibrate on held-out rows.

        Args:
            log_density: [n] log-densities of the rows, in any order.
            x: [n, D] the rows, in raw units.
            levels: levels of the feature quantiles to keep for attributions.

        Raises:
            ValueError: when a log-density is NaN or +inf, a feature is not finite, or there are no rows.
        """
        rows = np.asarray(x, dtype=np.float64)
        if rows.ndim != 2 or len(rows) == 0 or np.shape(log_density) != (len(rows),):
            raise ValueError("calibration needs log_density [n] and x [n, D] with n ≥ 1")
        quantiles = np.quantile(rows, levels, axis=0)
        # Interpolation may round neighbours out of order by a bit when they are equal.
        ordered = np.maximum.accumulate(quantiles, axis=0)
        return cls(
            np.sort(np.asarray(log_density, dtype=np.float64)), ordered, np.array(levels, dtype=np.float64)
        )

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read ``calibration.safetensors``.

        Raises:
            InvalidModel: naming the file, when it is missing or not a sound calibration.
        """
        file = "/".join(path.parts[-3:])
        try:
            arrays = load(path.read_bytes())
            if set(arrays) != set(_AXES):
                raise ValueError(f"it must hold {', '.join(_AXES)} and no more")
            return cls(**arrays)
        except OSError as error:
            raise InvalidModel(f"{file} cannot be read: {error.strerror}.", file=file) from None
        except (SafetensorError, KeyError, ValueError) as error:
            raise InvalidModel(f"{file} is not a sound calibration file: {error}.", file=file) from None

    def save(self, path: Path) -> None:
        """Write what ``load`` reads."""
        # Not by save_file, whose files only their owner can read.
        path.write_bytes(save({name: np.ascontiguousarray(getattr(self, name)) for name in _AXES}))

    @property
    def rows(self) -> int:
        """n, the number of calibration rows."""
        return len(self.log_density)

    def smallest_p_value(self, *, two_sided: bool = False) -> float:
        """The least p-value there can be; flagging at a level below it flags nothing."""
        return (2 if two_sided else 1) / (self.rows + 1)

    def p_values(self, log_density: ArrayLike, *, two_sided: bool = False) -> Floats:
        """Conformal p-values of log-densities.

        Args:
            log_density: [m], in nats; NaN for a row that could not be solved.
            two_sided: whether rows that are too likely count as unusual as well.

        Returns:
            [m]: p_low, or p_two; NaN where the log-density is NaN.
        """
        value = np.asarray(log_density, dtype=np.float64)
        below = np.searchsorted(self.log_density, value, side="right")  # #{sᵢ ≥ s}
        p = (1 + below) / (self.rows + 1)
        if two_sided:
            above = self.rows - np.searchsorted(self.log_density, value, side="left")  # #{sᵢ ≤ s}
            p = np.minimum(1.0, 2 * np.minimum(p, (1 + above) / (self.rows + 1)))
        return np.where(np.isnan(value), np.nan, p)


def flag(p_values: ArrayLike, alpha: float) -> NDArray[np.bool_]:
    """Which rows are anomalous at level α: p ≤ α.

    Args:
        p_values: [m]; NaN is never flagged.
        alpha: the share of ordinary rows that may be flagged, in (0, 1).

    Raises:
        InvalidInput: when alpha is not between 0 and 1.

    >>> flag([0.004, 0.2], alpha=0.01).tolist()
    [True, False]
    """
    _check_level(alpha, "alpha")
    return np.asarray(p_values, dtype=np.float64) <= alpha


def benjamini_hochberg(p_values: ArrayLike, fdr: float) -> NDArray[np.bool_]:
    """Which rows of a batch are anomalous, with a bound on the share of false ones among them.

    The k rows of smallest p-value are flagged, k = max{i : p₍ᵢ₎ ≤ i·q/m}. The expected share of ordinary
    rows among the flagged is then at most q, for one-sided conformal p-values too although they share
    their calibration rows (Bates, Candès, Lei, Romano, Sesia, Annals of Statistics 2023).

    Args:
        p_values: [m]; NaN counts as 1, so that a row that failed neither is flagged nor helps others be.
        fdr: q, in (0, 1).

    Raises:
        InvalidInput: when fdr is not between 0 and 1.

    >>> benjamini_hochberg([0.01, 0.03, 0.04, 0.9], fdr=0.1).tolist()
    [True, True, True, False]
    """
    _check_level(fdr, "fdr")
    p = np.nan_to_num(np.asarray(p_values, dtype=np.float64), nan=1.0)
    ranked = np.sort(p)
    passing = ranked[ranked <= fdr * np.arange(1, p.size + 1) / p.size]
    return p <= passing[-1] if passing.size else np.zeros(p.shape, dtype=np.bool_)


def _check_level(level: float, where: str) -> None:
    if not 0 < level < 1:
        raise InvalidInput(f"{where} must be between 0 and 1, such as 0.01; it is {level}.", where=where)
