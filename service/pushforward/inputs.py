"""From what a caller gave to float64 matrices, or to a word on what is wrong with it, and where."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import itemgetter
from typing import Any

import numpy as np
import numpy.typing as npt

from pushforward.errors import InvalidInput

__all__ = ["check_matrix", "from_lists", "from_named"]

Floats = npt.NDArray[np.float64]


def from_lists(rows: Sequence[Sequence[float]], names: Sequence[str], where: str) -> Floats:
    """A matrix from rows of numbers, one for each name.

    Args:
        rows: n rows.
        names: of the columns, D.
        where: what the caller calls these rows.

    Returns:
        [n, D] float64, finite.

    Raises:
        InvalidInput: naming the first row of another width, or the first number that is not finite.

    >>> from_lists([[1, 2], [3, 4]], ["a", "b"], "x").tolist()
    [[1.0, 2.0], [3.0, 4.0]]
    """
    width = len(names)
    for number, row in enumerate(rows):
        if len(row) != width:
            raise InvalidInput(
                f"{where}[{number}] has {_counted(len(row), 'number')}; "
                f"a row must have {width}: {_listed(names)}.",
                where=f"{where}[{number}]",
            )
    return check_matrix(np.array(rows, dtype=np.float64).reshape(len(rows), width), names, where)


def from_named(rows: Sequence[Mapping[str, float]], names: Sequence[str], where: str) -> Floats:
    """A matrix from rows that name their numbers.

    Args:
        rows: n mappings, each with exactly the keys in ``names``.
        names: of the columns, D.
        where: what the caller calls these rows.

    Returns:
        [n, D] float64, finite.

    Raises:
        InvalidInput: naming the first row with an unknown or missing name, or the first number that is
        not finite.

    >>> from_named([{"b": 2, "a": 1}], ["a", "b"], "rows").tolist()
    [[1.0, 2.0]]
    """
    known = set(names)
    for number, row in enumerate(rows):
        if row.keys() != known:
            place = f"{where}[{number}]"
            unknown = [name for name in row if name not in known]
            missing = [name for name in names if name not in row]
            faults = [f"has no value for {_listed(missing)}"] * bool(missing)
            faults += [f"names {_listed(unknown)}, which the model does not know"] * bool(unknown)
            raise InvalidInput(
                f"{place} {' and '.join(faults)}; a row must name {_listed(names)}.",
                where=place,
                detail={"missing": missing[:_SHOWN], "unknown": [name[:80] for name in unknown[:_SHOWN]]},
            )
    pick: Any = itemgetter(*names)
    values = np.array([pick(row) for row in rows], dtype=np.float64).reshape(len(rows), len(names))
    return check_matrix(values, names, where, named=True)


def check_matrix(values: Floats, names: Sequence[str], where: str, *, named: bool = False) -> Floats:
    """The same matrix, when it has the right width and holds only finite numbers.

    Args:
        values: [n, D].
        names: of the columns, D.
        where: what the caller calls these rows.
        named: whether the caller names the columns, rather than numbering them.

    Raises:
        InvalidInput: naming the width, or the row and column of the first number that is not finite.
    """
    if values.ndim != 2 or values.shape[1] != len(names):
        raise InvalidInput(
            f"{where} has shape {list(values.shape)}; it must have rows of {len(names)}: {_listed(names)}.",
            where=where,
        )
    finite = np.isfinite(values)
    if not finite.all():
        row, column = (int(i) for i in np.argwhere(~finite)[0])
        spot = f".{names[column]}" if named else f"[{column}]"
        raise InvalidInput(
            f"{where}[{row}]{spot} is {values[row, column]}; {names[column]!r} must be a finite number.",
            where=f"{where}[{row}]{spot}",
            detail={"row": row, "column": names[column]},
        )
    return values


_SHOWN = 12  # names that a message lists


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(repr(name if len(name) <= 80 else name[:77] + "...") for name in names[:_SHOWN])
    return f"{shown} and {len(names) - _SHOWN} more" if len(names) > _SHOWN else shown
