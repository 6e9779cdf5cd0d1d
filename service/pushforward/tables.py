"""Tables in files: CSV and Parquet (by pyarrow, an extra), npy and npz.

A file without column names (npy, npz) has columns ``x0 … x{D−1}``; the ``y`` of an npz is a column ``y``.
"""

from __future__ import annotations

import importlib
import os
import re
import sys
import tempfile
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from pushforward.errors import InvalidInput, UsageError

__all__ = ["FORMATS", "Source", "read_table", "writing"]

Array = NDArray[Any]
Floats = NDArray[np.float64]

FORMATS = (".csv", ".parquet", ".npy", ".npz")
_NPY_ROWS = 4096  # rows of an array that are taken at a time


@dataclass(frozen=True)
class Source:
    """A table that is read piece by piece.

    Args:
        path: the file.
        names: of all its columns.
        named: whether the file itself gives the names.
        rows: how many rows it has; for CSV the number of its lines but one.
    """

    path: Path
    names: tuple[str, ...]
    named: bool
    rows: int

    @classmethod
    def open(cls, path: Path) -> Source:
        """Look into a file.

        Raises:
            InvalidInput: when it cannot be read as what its name says, or two of its columns have the
            same name. UsageError: when the kind of file is unknown, or pyarrow is needed and not
            installed.
        """
        with _explained(path):
            kind = _kind(path, FORMATS)
            if kind == ".csv":
                with _csv().open_csv(path) as reader:
                    names, rows = tuple(reader.schema.names), _lines(path) - 1
            elif kind == ".parquet":
                with _parquet().ParquetFile(path) as file:
                    names, rows = tuple(file.schema_arrow.names), file.metadata.num_rows
            else:
                columns = _arrays(path)
                names, rows = tuple(columns), len(next(iter(columns.values())))
        twice = [name for name, count in Counter(names).items() if count > 1]
        if twice:
            raise InvalidInput(f"{path.name} has two columns named {twice[0]!r}.", where=twice[0])
        return cls(path, names, kind in (".csv", ".parquet"), rows)

    def batches(self, columns: Sequence[str]) -> Iterator[Floats]:
        """The numbers of some columns, [rows, columns] at a time; NaN where a value is missing.

        Raises:
            InvalidInput: naming the column that is not numeric, and the row where that can be told.
        """
        kind = self.path.suffix.lower()
        with _explained(self.path, self.names):
            if kind == ".csv":
                yield from self._csv_batches(columns)
            elif kind == ".parquet":
                yield from self._parquet_batches(columns)
            else:
                arrays = _arrays(self.path)
                for first in range(0, self.rows, _NPY_ROWS):
                    yield np.stack([arrays[name][first : first + _NPY_ROWS] for name in columns], 1).astype(
                        float
                    )

    def _csv_batches(self, columns: Sequence[str]) -> Iterator[Floats]:
        import pyarrow as pa

        csv = _csv()
        convert = csv.ConvertOptions(
            include_columns=list(columns),
            column_types=dict.fromkeys(columns, pa.float64()),
            strings_can_be_null=True,
        )
        # One thread, so that a fault comes with its row.
        read = csv.ReadOptions(use_threads=False)
        with csv.open_csv(self.path, read_options=read, convert_options=convert) as reader:
            for batch in reader:
                yield _matrix(batch, columns)

    def _parquet_batches(self, columns: Sequence[str]) -> Iterator[Floats]:
        import pyarrow as pa

        with _parquet().ParquetFile(self.path) as file:
            for name in columns:
                kind = file.schema_arrow.field(name).type
                if not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)):
                    raise InvalidInput(
                        f"{self.path.name}: column {name!r} is not numeric but {kind}.", where=name
                    )
            for batch in file.iter_batches(batch_size=_NPY_ROWS, columns=list(columns)):
                yield _matrix(batch, columns)


def read_table(path: Path) -> tuple[list[str], list[Array]]:
    """A whole table: names and columns, the columns of any type, with None or NaN where a value is missing.

    Raises:
        InvalidInput: when it cannot be read as what its name says.
        UsageError: when the kind of file is unknown, or pyarrow is needed and not installed.
    """
    with _explained(path):
        kind = _kind(path, FORMATS)
        if kind in (".npy", ".npz"):
            arrays = _arrays(path)
            return list(arrays), list(arrays.values())
        table = _csv().read_csv(path) if kind == ".csv" else _parquet().read_table(path)
        return list(table.column_names), [column.to_numpy() for column in table.columns]


@contextmanager
def writing(path: Path | None) -> Iterator[Callable[[Mapping[str, Array]], None]]:
    """Write a table piece by piece: call what this gives with equally long columns, the same ones each time.

    The file appears under its name when the block ends well, and not at all when it does not. NaN becomes
    a missing value in CSV and Parquet. An npy is a matrix when all columns are floating-point, otherwise
    a structured array.

    Args:
        path: CSV, Parquet or npy; None writes CSV to standard output.

    Raises:
        UsageError: when the kind of file is unknown, pyarrow is needed and not installed, or the file
            cannot be written.
    """
    kind = ".csv" if path is None else _kind(path, (".csv", ".parquet", ".npy"))
    sheet = _SHEETS[kind]
    if path is None:
        with closing(sheet(sys.stdout.buffer)) as table:
            yield table.write
        sys.stdout.buffer.flush()
        return
    try:
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with open(descriptor, "w+b") as stream, closing(sheet(stream)) as table:
                yield table.write
            os.chmod(temporary, 0o666 & ~_umask())
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror or error}.") from None


class _Arrow:
    """What CSV and Parquet have in common: a writer that wants the types of the columns first."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._writer: Any = None

    def write(self, columns: Mapping[str, Array]) -> None:
        import pyarrow as pa

        table = pa.table({name: pa.array(values, from_pandas=True) for name, values in columns.items()})
        if self._writer is None:
            self._writer = self._open(table.schema)
        self._writer.write_table(table)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()

    def _open(self, schema: Any) -> Any:
        raise NotImplementedError


class _Csv(_Arrow):
    def _open(self, schema: Any) -> Any:
        csv = _csv()
        return csv.CSVWriter(self._stream, schema, write_options=csv.WriteOptions(quoting_style="needed"))


class _Parquet(_Arrow):
    def _open(self, schema: Any) -> Any:
        return _parquet().ParquetWriter(self._stream, schema)


class _Npy:
    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._rows = 0
        self._like: Array | None = None

    def write(self, columns: Mapping[str, Array]) -> None:
        values = list(columns.values())
        if all(column.dtype == np.float64 for column in values):
            rows = np.stack(values, 1)
        else:
            rows = np.empty(len(values[0]), [(name, column.dtype) for name, column in columns.items()])
            for name, column in columns.items():
                rows[name] = column
        if self._like is None:
            self._like = rows[:0]
            self._header()
        self._stream.write(rows.tobytes())
        self._rows += len(rows)

    def close(self) -> None:
        if self._like is not None and self._stream.seekable():
            self._stream.seek(0)
            self._header()

    def _header(self) -> None:
        """The header; numpy pads it so that one with more rows takes the same place."""
        assert self._like is not None
        facts = np.lib.format.header_data_from_array_1_0(self._like)
        facts["shape"] = (self._rows, *self._like.shape[1:])
        np.lib.format.write_array_header_2_0(self._stream, facts)


_SHEETS: dict[str, type[_Csv | _Parquet | _Npy]] = {".csv": _Csv, ".parquet": _Parquet, ".npy": _Npy}


def _matrix(batch: Any, columns: Sequence[str]) -> Floats:
    arrays = [batch.column(name).to_numpy(zero_copy_only=False) for name in columns]
    return np.stack(arrays, 1).astype(np.float64, copy=False)


def _arrays(path: Path) -> dict[str, Array]:
    """Columns of an npy or npz; never of Python objects."""
    if path.suffix.lower() == ".npy":
        x, labels = np.load(path, mmap_mode="r", allow_pickle=False), None
    else:
        with np.load(path, allow_pickle=False) as archive:
            if "X" not in archive.files:
                held = ", ".join(archive.files) or "nothing"
                raise InvalidInput(f"{path.name} must hold an array X (and may hold y); it holds {held}.")
            x, labels = archive["X"], archive["y"] if "y" in archive.files else None
    if x.ndim != 2 or x.dtype.kind not in "biuf":
        raise InvalidInput(
            f"{path.name} holds an array of {x.dtype} with shape {list(x.shape)}; "
            "it must be a matrix of numbers."
        )
    if labels is not None and labels.shape != (len(x),):
        raise InvalidInput(
            f"{path.name}: y has shape {list(labels.shape)}; it must be [{len(x)}], one for each row."
        )
    columns = {f"x{number}": x[:, number] for number in range(x.shape[1])}
    return columns if labels is None else columns | {"y": labels}


def _kind(path: Path, allowed: Sequence[str]) -> str:
    kind = path.suffix.lower()
    if kind not in allowed:
        raise UsageError(f"{path.name} has to end in one of {', '.join(allowed)}.")
    return kind


@contextmanager
def _explained(path: Path, names: Sequence[str] = ()) -> Iterator[None]:
    """What goes wrong in reading a file, as an error that names the file and, where it can, the place."""
    try:
        yield
    except FileNotFoundError:
        raise InvalidInput(f"There is no file {path}.") from None
    except OSError as error:
        raise InvalidInput(f"{path} cannot be read: {error.strerror or error}.") from None
    except (ValueError, EOFError, zipfile.BadZipFile) as error:  # pyarrow's errors are ValueErrors
        cell = re.search(r"In CSV column #(\d+): Row #(\d+): .*invalid value '(.*)'", str(error), re.DOTALL)
        if cell is None:
            raise InvalidInput(f"{path.name} is not a sound {path.suffix[1:]} file: {error}.") from None
        name, line, value = names[int(cell[1])], cell[2], cell[3][:40]
        raise InvalidInput(
            f"{path.name}, line {line}: column {name!r} is not numeric but {value!r}.", where=name
        ) from None


def _lines(path: Path) -> int:
    with path.open("rb") as stream:
        count, last = 0, b"\n"
        while block := stream.read(1 << 20):
            count, last = count + block.count(b"\n"), block[-1:]
    return count + (last != b"\n")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _csv() -> ModuleType:
    return _pyarrow("pyarrow.csv")


def _parquet() -> ModuleType:
    return _pyarrow("pyarrow.parquet")


def _pyarrow(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise UsageError(
            "CSV and Parquet files need pyarrow: pip install 'pushforward[tables]', or use an .npy file."
        ) from None
