"""Running programs: padding, and graphs that are refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from pushforward.errors import InvalidModel, UsageError
from pushforward.programs.runtime import Program


def graph(*nodes: onnx.NodeProto, weights: onnx.TensorProto | None = None) -> bytes:
    """A program x [n, 4] → y, of the given nodes."""
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    made = helper.make_graph(nodes, "g", [x], [y], [] if weights is None else [weights])
    return helper.make_model(
        made, opset_imports=[helper.make_opsetid("", 20)], ir_version=9
    ).SerializeToString()


DOUBLE = graph(helper.make_node("Add", ["x", "x"], ["y"]))


@pytest.mark.parametrize("multiple", [1, 8, 32])
@pytest.mark.parametrize("rows", [0, 1, 7, 8, 33])
def test_padding_does_not_show(rows: int, multiple: int) -> None:
    x = np.arange(4 * rows, dtype=np.float32).reshape(rows, 4)
    (y,) = Program(DOUBLE, "double", multiple)(x)
    np.testing.assert_array_equal(y, 2 * x)


def test_results_are_new_arrays_that_may_be_written() -> None:
    x = np.ones((3, 4), np.float32)
    for multiple in (1, 8):
        program = Program(DOUBLE, "double", multiple)
        (first,), (second,) = program(x), program(x)
        first[:] = 7
        np.testing.assert_array_equal(second, 2)
        np.testing.assert_array_equal(x, 1)


def test_inputs_are_counted() -> None:
    with pytest.raises(ValueError, match="argument"):
        Program(DOUBLE, "double")(np.ones((3, 4), np.float32), np.ones((3, 4), np.float32))


@pytest.mark.parametrize("data", [b"", b"not a graph", DOUBLE[:-20]], ids=["empty", "text", "truncated"])
def test_what_is_no_program_is_refused_by_name(data: bytes) -> None:
    with pytest.raises(
        InvalidModel, match=r"^moons/1/step\.onnx is not a program that ONNX Runtime can load: "
    ):
        Program(data, "moons/1/step.onnx")


@pytest.mark.parametrize("place", ["beside.bin", "../beside.bin", "absolute"])
def test_a_program_cannot_read_other_files(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # with the file in the working folder, where a graph that is loaded from memory would look for it
    folder = tmp_path / "working"
    folder.mkdir()
    monkeypatch.chdir(folder)
    for target in (folder / "beside.bin", tmp_path / "beside.bin"):
        np.eye(4, dtype=np.float32).tofile(target)
    weights = TensorProto(
        name="w", data_type=TensorProto.FLOAT, dims=[4, 4], data_location=TensorProto.EXTERNAL
    )
    location = str(folder / "beside.bin") if place == "absolute" else place
    for key, value in {"location": location, "offset": "0", "length": "64"}.items():
        weights.external_data.add(key=key, value=value)
    with pytest.raises(InvalidModel, match="is not a program that ONNX Runtime can load"):
        Program(graph(helper.make_node("MatMul", ["x", "w"], ["y"]), weights=weights), "hostile")


def test_a_program_for_a_device_that_is_not_here_is_refused_and_does_not_run_elsewhere() -> None:
    with pytest.raises(UsageError, match="cuda:0 needs ONNX Runtime for CUDA"):
        Program(DOUBLE, "double", device="cuda:0")
