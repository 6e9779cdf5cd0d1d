"""From columns to arrays that a flow can be fitted to: checks, parts, transforms.

Every refusal names the column and says what to do.  The label is never a feature: rows whose label is 1 are
anomalies; they are left out of training and calibration, and kept for the report.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.covariance import ledoit_wolf

from pushforward.errors import InvalidInput
from pushforward.flows.transforms import Compose, Log, Logit, Standardize, Transform, Whiten

__all__ = [
    "Array",
    "Parts",
    "Table",
    "build_transform",
    "check_varies",
    "noise_widths",
    "read_columns",
    "split",
]

Array = NDArray[np.float64]

MINIMUM_ROWS = 20  # below this no part would hold enough rows to say anything
HELD_OUT_ROWS = 10_000  # p-values down to 1e-4, and log-densities to a hundredth of a nat


@dataclass(frozen=True)
class Table:
    """Rows of features, and what else is known of them.

    Attributes:
        rows: [n, D] raw features.
        features: their D names.
        context: [n, C] what the density is conditioned on, or None.
        context_features: its C names.
        anomalous: [n] True where the row is labelled an anomaly, or None without labels.
    """

    rows: Array
    features: tuple[str, ...]
    context: Array | None = None
    context_features: tuple[str, ...] = ()
    anomalous: NDArray[np.bool_] | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, index: NDArray[Any]) -> Table:
        """The rows at ``index``."""
        return Table(
            self.rows[index],
            self.features,
            None if self.context is None else self.context[index],
            self.context_features,
            None if self.anomalous is None else self.anomalous[index],
        )


@dataclass(frozen=True)
class Parts:
    """A table in disjoint parts; only ``anomalies`` holds rows that are labelled anomalous.

    Attributes:
        train: what the weights are fitted to.
        validation: decides when to stop.
        held_out: no part of the fit sees it; it gives the figures of the report and, published with
            the model, the p-values.  Neither influences the other, so one part serves both.
        anomalies: labelled anomalies; empty without labels.
    """

    train: Table
    validation: Table
    held_out: Table
    anomalies: Table


def read_columns(
    names: Sequence[str],
    values: Sequence[NDArray[Any]],
    *,
    label: str | None = None,
    context: Sequence[str] = (),
    columns: Sequence[str] | None = None,
) -> Table:
    """Check named columns and sort them into features, context and label.

    Args:
        names: one name per column.
        values: the columns, each [n], of any type.
        label: the column that is 1 (or true) for anomalies and 0 (or false) for normal rows.
        context: the columns to condition on.
        columns: the features; all that is neither label nor context when None.

    Raises:
        InvalidInput: a name is missing or not unique, a value is missing, infinite or no number, a label is
            neither 0 nor 1, or there are too few rows; ``where`` is the column.
    """
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise InvalidInput(
            f"Two columns are named {twice[0]!r}. Give every column its own name.", where=twice[0]
        )
    table = dict(zip(names, values, strict=True))
    special = [*context, *([label] if label is not None else [])]
    chosen = [name for name in names if name not in special] if columns is None else list(columns)
    for name in [*chosen, *special]:
        if name not in table:
            raise InvalidInput(
                f"There is no column {name!r}. The columns are: {', '.join(map(repr, names))}.", where=name
            )
    repeated = [name for name, count in Counter([*chosen, *special]).items() if count > 1]
    if repeated:
        raise InvalidInput(
            f"Column {repeated[0]!r} is named more than once among features, context and label. "
            "A column can be only one of the three; take it out of the others.",
            where=repeated[0],
        )
    if not chosen:
        raise InvalidInput("No column is left to be a feature. Name at least one with --columns.")
    length = len(next(iter(table.values())))
    if length < MINIMUM_ROWS:
        rows = "no rows" if length == 0 else "1 row" if length == 1 else f"{length} rows"
        raise InvalidInput(
            f"The table has {rows}; training needs at least {MINIMUM_ROWS}, and a good fit some hundreds."
        )
    return Table(
        rows=np.stack([_numbers(name, table[name]) for name in chosen], axis=1),
        features=tuple(chosen),
        context=np.stack([_numbers(name, table[name]) for name in context], axis=1) if context else None,
        context_features=tuple(context),
        anomalous=None if label is None else _flags(label, table[label]),
    )


def split(table: Table, seed: int = 0, *, held_out: float = 0.25, validation: float = 0.1) -> Parts:
    """Divide the normal rows at random into three parts; the anomalies make the fourth.

    Args:
        table: checked rows.
        seed: the same seed gives the same parts.
        held_out: share of the normal rows, 10,000 at most.
        validation: share of the others.

    Raises:
        InvalidInput: too few normal rows.
    """
    anomalous = np.zeros(len(table), bool) if table.anomalous is None else table.anomalous
    normal = np.flatnonzero(~anomalous)
    if len(normal) < MINIMUM_ROWS:
        raise InvalidInput(
            f"Only {len(normal)} rows are labelled normal; training needs at least {MINIMUM_ROWS}. "
            "Check that 1 in the label column stands for an anomaly and 0 for a normal row."
        )
    order = np.random.default_rng(seed).permutation(normal)
    n_held_out = min(HELD_OUT_ROWS, max(1, round(held_out * len(order))))
    n_validation = max(1, round(validation * (len(order) - n_held_out)))
    held_out_rows, validation_rows, train_rows = np.split(order, [n_held_out, n_held_out + n_validation])
    return Parts(
        train=table.take(train_rows),
        validation=table.take(validation_rows),
        held_out=table.take(held_out_rows),
        anomalies=table.take(np.flatnonzero(anomalous)),
    )


def check_varies(train: Table, besides: Sequence[str] = ()) -> None:
    """Refuse a column that has one value only, as it has no density.

    Args:
        train: the training rows.
        besides: features that get dequantisation noise, and so vary in any case.

    Raises:
        InvalidInput: with the column.
    """
    for name, column in _all_columns(train):
        if name not in besides and np.ptp(column) == 0:
            raise InvalidInput(
                f"Column {name!r} is {column[0]:g} in every training row: a constant has no density. "
                "Leave it out, by naming the others with --columns.",
                where=name,
            )


def noise_widths(table: Table, dequantize: Sequence[str]) -> Array:
    """Widths [D] of the uniform noise that makes integer features continuous: 1 for those named, else 0.

    The model is then the density of x + u with u uniform on (−½, ½), features apart; its integral over the
    unit cube about a row of integers is the probability of that row (Theis et al. 2016, arXiv:1511.01844).

    Raises:
        InvalidInput: an unknown feature, or one that is not integer.
    """
    for name in dequantize:
        if name not in table.features:
            raise InvalidInput(
                f"There is no feature {name!r}; there are {', '.join(table.features)}.", where=name
            )
        column = table.rows[:, table.features.index(name)]
        odd = column[column != np.round(column)]
        if odd.size:
            raise InvalidInput(
                f"Feature {name!r} is not integer: it has the value {odd[0]:g}. "
                "Leave out its dequantisation.",
                where=name,
            )
    return np.array([1.0 if name in dequantize else 0.0 for name in table.features])


def build_transform(
    rows: Array,
    features: Sequence[str],
    *,
    whiten: bool = False,
    log: Sequence[str] = (),
    logit: Mapping[str, tuple[float, float]] | None = None,
    others: Array | None = None,
) -> Transform:
    """The layers in front of the flow: log or logit where asked, then standardising or whitening.

    Whitening uses the Ledoit–Wolf covariance of the standardised rows: the fewer they are, the more it is
    shrunk towards the identity, so that directions in which few rows happen to agree are not blown up.

    Args:
        rows: [n, D] training rows (with their dequantisation noise, if any).
        features: the D names.
        whiten: remove correlations too, not only scales.
        log: features that are positive and act by factors.
        logit: features that live between two bounds.
        others: [m, D] rows that must lie inside the support too.

    Raises:
        InvalidInput: an unknown feature, or a value outside the support of its transform.
    """
    groups: dict[tuple[float, float], list[int]] = {}
    bounds = {**dict.fromkeys(log, (0.0, np.inf)), **(logit or {})}
    for name, (lower, upper) in bounds.items():
        if name not in features:
            raise InvalidInput(f"There is no feature {name!r}; there are {', '.join(features)}.", where=name)
        column = np.concatenate([rows, rows[:0] if others is None else others])[:, features.index(name)]
        bad = column[(column <= lower) | (column >= upper)]
        if bad.size:
            kind = "log" if upper == np.inf else "logit"
            raise InvalidInput(
                f"Feature {name!r} has the value {bad[0]:g}, outside ({lower:g}, {upper:g}): "
                f"leave out its {kind} transform, or correct the value.",
                where=name,
            )
        groups.setdefault((lower, upper), []).append(features.index(name))
    dim = len(features)
    layers: list[Transform] = [
        Log(dim, chosen) if upper == np.inf else Logit(dim, chosen, lower, upper)
        for (lower, upper), chosen in groups.items()
    ]
    z = torch.from_numpy(np.ascontiguousarray(rows, dtype=np.float64))
    for layer in layers:
        z = layer.encode(z)[0]
    mean, scale = z.mean(0), z.std(0, correction=0)
    if whiten:
        covariance, _ = ledoit_wolf(((z - mean) / scale).numpy())
        floor = 1e-6 * np.eye(dim)  # exactly dependent columns stay invertible
        cholesky = torch.from_numpy(np.linalg.cholesky(covariance + floor))
        layers.append(Whiten(mean, scale[:, None] * cholesky))
    else:
        layers.append(Standardize(mean, scale))
    return layers[0] if len(layers) == 1 else Compose(layers)


def _all_columns(table: Table) -> list[tuple[str, Array]]:
    pairs = list(zip(table.features, table.rows.T, strict=True))
    if table.context is not None:
        pairs += zip(table.context_features, table.context.T, strict=True)
    return pairs


def _numbers(name: str, column: NDArray[Any]) -> Array:
    """A column as float64, or a refusal that names it."""
    column = np.asarray(column)
    advice = "or leave the column out, by naming the others with --columns"
    if column.dtype.kind not in "biuf":
        converted = np.empty(len(column))
        for row, value in enumerate(column.tolist()):
            if value is None or value == "":
                converted[row] = np.nan
                continue
            try:
                converted[row] = float(value)
            except (TypeError, ValueError):
                raise InvalidInput(
                    f"Column {name!r} is not numeric: row {row + 1} is {str(value)[:40]!r}. "
                    f"Encode it as numbers, {advice}.",
                    where=name,
                ) from None
        column = converted
    column = column.astype(np.float64)
    missing = np.flatnonzero(np.isnan(column))
    if missing.size:
        what = "a missing value" if missing.size == 1 else f"{missing.size} missing values"
        raise InvalidInput(
            f"Column {name!r} has {what}, the first in row {missing[0] + 1}. "
            f"Fill them in or drop those rows, {advice}.",
            where=name,
        )
    infinite = np.flatnonzero(np.isinf(column))
    if infinite.size:
        raise InvalidInput(
            f"Column {name!r} is infinite in row {infinite[0] + 1}. Correct the value or drop the row.",
            where=name,
        )
    return column


def _flags(name: str, column: NDArray[Any]) -> NDArray[np.bool_]:
    words = {"0": False, "0.0": False, "false": False, "1": True, "1.0": True, "true": True}
    texts = [str(value).strip().lower() for value in np.asarray(column).tolist()]
    for row, text in enumerate(texts):
        if text not in words:
            raise InvalidInput(
                f"Label column {name!r} is {text[:40]!r} in row {row + 1}. "
                "A label must be 0 or false (normal) or 1 or true (anomaly) in every row.",
                where=name,
            )
    return np.array([words[text] for text in texts])
