"""Tables read and written in every format, and what is said of files that are not sound."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest

from pushforward.errors import InvalidInput, UsageError
from pushforward.tables import Source, read_table, writing

COLUMNS: Mapping[str, Any] = {
    "a": np.array([1.5, -2.25, 1e-300, 0.1]),
    "b": np.array([0.0, 1.0, 2.0, 1 / 3]),
}


def write(path: Path, columns: Mapping[str, Any] = COLUMNS, pieces: int = 2) -> Path:
    with writing(path) as add:
        for piece in range(pieces):
            add({name: values[piece::pieces] for name, values in columns.items()})
    return path


def interleaved(values: np.ndarray, pieces: int = 2) -> np.ndarray:
    return np.concatenate([values[piece::pieces] for piece in range(pieces)])


@pytest.mark.parametrize("ending", [".csv", ".parquet"])
def test_what_is_written_is_read_bit_for_bit(tmp_path: Path, ending: str) -> None:
    path = write(tmp_path / f"t{ending}")
    source = Source.open(path)
    assert (source.names, source.named, source.rows) == (("a", "b"), True, 4)
    read = np.concatenate(list(source.batches(["b", "a"])))
    assert read.tolist() == np.stack([interleaved(COLUMNS["b"]), interleaved(COLUMNS["a"])], 1).tolist()
    names, values = read_table(path)
    assert names == ["a", "b"]
    assert values[0].tolist() == interleaved(COLUMNS["a"]).tolist()


def test_an_npy_of_numbers_is_a_matrix(tmp_path: Path) -> None:
    path = write(tmp_path / "t.npy")
    assert np.load(path).tolist() == np.stack([interleaved(v) for v in COLUMNS.values()], 1).tolist()
    source = Source.open(path)
    assert (source.names, source.named, source.rows) == (("x0", "x1"), False, 4)
    assert (
        np.concatenate(list(source.batches(["x1"]))).tolist() == interleaved(COLUMNS["b"])[:, None].tolist()
    )


def test_an_npy_of_several_types_is_a_structured_array(tmp_path: Path) -> None:
    columns = {
        "p": np.array([0.5, 0.25]),
        "flag": np.array([True, False]),
        "status": np.array(["ok", "max_steps"]),
    }
    written = np.load(write(tmp_path / "t.npy", columns))
    assert written.dtype.names == ("p", "flag", "status")
    assert written["status"].tolist() == ["ok", "max_steps"]
    assert written["flag"].tolist() == [True, False]


def test_an_npz_has_x_and_perhaps_y(tmp_path: Path) -> None:
    x, y = np.arange(6.0).reshape(3, 2), np.array([0, 1, 0])
    np.savez(tmp_path / "t.npz", X=x, y=y)
    names, values = read_table(tmp_path / "t.npz")
    assert names == ["x0", "x1", "y"]
    assert values[2].tolist() == [0, 1, 0]
    np.savez(tmp_path / "short.npz", X=x, y=y[:2])
    with pytest.raises(InvalidInput, match=r"y has shape \[2\]; it must be \[3\]"):
        read_table(tmp_path / "short.npz")
    np.savez(tmp_path / "other.npz", data=x)
    with pytest.raises(InvalidInput, match=r"must hold an array X .*; it holds data"):
        read_table(tmp_path / "other.npz")


def test_missing_values_are_nan_and_nan_is_written_as_missing(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("a,b\n1,\n,2\nNA,3\n")
    (batch,) = Source.open(tmp_path / "t.csv").batches(["a", "b"])
    assert np.isnan(batch).tolist() == [[False, True], [True, False], [True, False]]
    path = write(tmp_path / "out.csv", {"v": np.array([1.0, np.nan, -np.inf])}, pieces=1)
    assert path.read_text().split() == ['"v"', "1", "", "-inf"] or path.read_text() == '"v"\n1\n\n-inf\n'
    column = pa.parquet.read_table(write(tmp_path / "out.parquet", {"v": np.array([np.nan])}, pieces=1))["v"]
    assert column.null_count == 1


def test_a_cell_that_is_no_number_is_named_with_its_line_and_column(tmp_path: Path) -> None:
    lines = ["id,age,dose"] + [f"r{i},{i},{i}" for i in range(200_000)]
    lines[150_001] = "r150000,old,3"
    path = tmp_path / "t.csv"
    path.write_text("\n".join(lines))
    source = Source.open(path)
    assert source.rows == 200_000
    with pytest.raises(
        InvalidInput, match=r"t.csv, line 150002: column 'age' is not numeric but 'old'"
    ) as caught:
        list(source.batches(["dose", "age"]))
    assert caught.value.where == "age"
    assert sum(map(len, source.batches(["dose"]))) == 200_000


def test_a_parquet_column_that_is_no_number_is_named(tmp_path: Path) -> None:
    pa.parquet.write_table(pa.table({"a": [1, 2], "s": ["x", "y"]}), tmp_path / "t.parquet")
    source = Source.open(tmp_path / "t.parquet")
    with pytest.raises(InvalidInput, match="column 's' is not numeric but string"):
        list(source.batches(["s"]))
    assert np.concatenate(list(source.batches(["a"]))).tolist() == [[1.0], [2.0]]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("t.csv", "", "not a sound csv file: Empty CSV file"),
        ("t.csv", "a,b\n1,2\n3\n", "not a sound csv file: .*Expected 2 columns, got 1"),
        ("t.csv", "a,a\n1,2\n", "two columns named 'a'"),
        ("t.parquet", "a,b\n1,2\n", "not a sound parquet file"),
        ("t.npy", "a,b\n1,2\n", "not a sound npy file"),
        ("t.npz", "a,b\n1,2\n", "not a sound npz file"),
    ],
)
def test_a_file_that_is_not_sound_is_named(tmp_path: Path, name: str, content: str, says: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(InvalidInput, match=says):
        Source.open(tmp_path / name)


def test_a_file_that_is_not_there_or_cannot_be_read_is_named(tmp_path: Path) -> None:
    for name in ("no.csv", "no.parquet", "no.npy", "no.npz"):
        with pytest.raises(InvalidInput, match=f"There is no file .*{name}"):
            Source.open(tmp_path / name)
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(InvalidInput, match="cannot be read"):
        Source.open(tmp_path / "folder.csv")
    with pytest.raises(UsageError, match=r"t.xlsx has to end in one of .csv, .parquet, .npy, .npz"):
        Source.open(tmp_path / "t.xlsx")


def test_objects_are_never_unpickled(tmp_path: Path) -> None:
    np.save(tmp_path / "t.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(InvalidInput, match=r"not a sound npy file: .*Python objects in dtype"):
        Source.open(tmp_path / "t.npy")
    np.save(tmp_path / "t.npy", np.zeros(3))
    with pytest.raises(InvalidInput, match=r"shape \[3\]; it must be a matrix of numbers"):
        Source.open(tmp_path / "t.npy")


@pytest.mark.parametrize("ending", [".csv", ".parquet", ".npy"])
def test_a_table_that_is_not_finished_leaves_nothing(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"t{ending}"
    write(path)
    before = path.read_bytes()

    def interrupted() -> None:
        with writing(path) as add:
            add(COLUMNS)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with (
        pytest.raises(UsageError, match=r"no/t.csv cannot be written: No such file or directory"),
        writing(tmp_path / "no" / "t.csv"),
    ):
        pass
    with pytest.raises(UsageError, match=r"t.npz has to end in one of"), writing(tmp_path / "t.npz"):
        pass
