"""Attribution: how much more likely a row would be were one of its features typical.

For a row x and the calibration quantiles q_{ji} of feature i at levels j = 1 … q,

    attribution_i = max(0, max_j log p(x with x_i replaced by q_{ji}) − log p(x))        in nats.

Keeping x_i is always one of the choices, hence the 0: no typical value of the feature makes the row more
likely. An attribution is about one feature at a time, so a row that is odd in two features together can
have small ones. The log-densities are somebody else's work: ``replacements`` makes the D·q rows to
ask for, ``attributions`` reads their answers.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["attributions", "replacements"]

Floats = NDArray[np.float64]


def replacements(x: Floats, quantiles: Floats) -> Floats:
    """Every row with every feature replaced by each of its quantiles.

    Args:
        x: [n, D] rows, in raw units.
        quantiles: [q, D] calibration quantiles.

    Returns:
        [n·D·q, D]; row (r·D + i)·q + j is x[r] with feature i replaced by quantiles[j, i].

    Raises:
        ValueError: when the widths differ.

    >>> replacements(np.array([[1.0, 2.0]]), np.array([[0.0, 0.0], [5.0, 6.0]])).tolist()
    [[0.0, 2.0], [5.0, 2.0], [1.0, 0.0], [1.0, 6.0]]
    """
    rows, dim = x.shape
    if quantiles.shape[1:] != (dim,):
        raise ValueError(f"rows have {dim} features, quantiles have shape {quantiles.shape}")
    candidates = np.tile(x[:, None, None, :], (1, dim, len(quantiles), 1))
    feature = np.arange(dim)
    candidates[:, feature, :, feature] = quantiles.T[:, None, :]
    return candidates.reshape(rows * dim * len(quantiles), dim)


def attributions(log_density: Floats, candidate_log_density: Floats, dim: int) -> Floats:
    """Attributions from the log-densities of the rows and of their replacements.

    Args:
        log_density: [n], of the rows.
        candidate_log_density: [n·D·q], of ``replacements``, in its order.
        dim: D.

    Returns:
        [n, D] in nats, at least 0: +∞ where a row outside the support would come into it, NaN where
        the row, or every replacement of the feature, could not be solved. Replacements that failed
        among others that did not are left out.

    Raises:
        ValueError: when the lengths do not fit.
    """
    rows = len(log_density)
    if rows == 0:
        return np.empty((0, dim))
    best = np.fmax.reduce(candidate_log_density.reshape(rows, dim, -1), axis=2)
    before = log_density[:, None]
    with np.errstate(invalid="ignore"):
        gain = best - before
    return np.where(best <= before, 0.0, gain)  # of −∞ and −∞ too, whose difference is NaN
