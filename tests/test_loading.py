"""Loading a version: it proves itself on this machine, or is refused by name."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from safetensors.numpy import load_file, save_file
from tests.problems import blobs, chunk, published

from pushforward.engine.engine import Engine
from pushforward.engine.request import Kind, Status
from pushforward.errors import InvalidModel
from pushforward.loading import LoadedModel, default_chunk, load_model, run_chunk
from pushforward.store.catalog import Catalog
from pushforward.store.manifest import Manifest

# what answers requests that ask for no other precision
DEFAULT = [
    "encode",
    "decode",
    *(f"{a}_{b}_float32" for a in ("start", "step") for b in ("density", "sample")),
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the first version, to be damaged."""
    return Path(shutil.copytree(published() / "blobs" / "1", tmp_path / "blobs" / "1"))


def rewrite(folder: Path, file: str, content: bytes) -> None:
    """Replace a file and have the manifest agree: hashes alone cannot tell."""
    (folder / file).write_bytes(content)
    document = json.loads((folder / "manifest.json").read_text())
    document["files"][file] = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    (folder / "manifest.json").write_text(json.dumps(document))
    assert Catalog.verify(folder).name == "blobs"


def test_a_version_answers_the_same_wherever_it_is_loaded(folder: Path) -> None:
    x, c = blobs(50)
    original = load_model(published() / "blobs" / "1")
    copy = load_model(folder)
    for kind in Kind:
        for precision in ("float32", "float64"):
            for density in (True, False):
                settings = {"precision": precision, "density": density}
                first, second = (run_chunk(m, chunk("x", kind, x, c, **settings)) for m in (original, copy))
                for part in ("value", "log_density", "steps", "status"):
                    assert getattr(first, part).tobytes() == getattr(second, part).tobytes()


def test_the_answers_are_those_of_publishing() -> None:
    model = load_model(published() / "blobs" / "1")
    golden = model.tensors("golden.safetensors")
    answer = run_chunk(model, default_chunk(model.manifest.solver, golden["x"], golden["context"]))
    np.testing.assert_allclose(answer.log_density, golden["served"], rtol=0, atol=1e-6)  # this machine's own


@pytest.mark.parametrize("precision", ["float32", "float64"])
@pytest.mark.parametrize("kind", Kind)
def test_rows_of_a_loaded_model_do_not_depend_on_their_batch(kind: Kind, precision: str) -> None:
    model = load_model(published() / "blobs" / "1")
    x, c = blobs(65)
    together = run_chunk(model, chunk("x", kind, x, c, precision=precision))
    engine = Engine(lambda *_: model, slots=9)
    for row in range(len(x)):
        engine.submit(chunk(str(row), kind, x[[row]], c[[row]], precision=precision))
    found = {answer.id: answer for _ in range(10_000) if engine.busy for answer in engine.step()}
    for row in range(len(x)):
        assert found[str(row)].value.tobytes() == together.value[row].tobytes()
        assert found[str(row)].log_density.tobytes() == together.log_density[row].tobytes()


def test_padding_reaches_programs_loaded_before_and_after() -> None:
    model = load_model(published() / "blobs" / "2")
    model.pad(8)
    assert model.program("encode").multiple == 8
    assert model.program("step_sample_float64").multiple == 8
    x, c = blobs(13)
    assert run_chunk(
        model, chunk("x", Kind.DECODE, x, c, precision="float64", density=False)
    ).value.shape == (13, 2)


@pytest.mark.parametrize("program", DEFAULT)
def test_another_models_program_with_a_right_hash_is_refused(folder: Path, program: str) -> None:
    other = published() / "blobs" / "2"
    if program in (
        "encode",
        "decode",
    ):  # both versions share their transform: take one that is off by a percent
        graph = onnx.load(folder / "programs" / f"{program}.onnx")
        for initializer in graph.graph.initializer:
            array = onnx.numpy_helper.to_array(initializer)
            if array.shape == (1, 2):
                initializer.CopyFrom(onnx.numpy_helper.from_array(array * 1.01, initializer.name))
        content = graph.SerializeToString()
    else:
        content = (other / "programs" / f"{program}.onnx").read_bytes()
    assert content != (folder / "programs" / f"{program}.onnx").read_bytes()
    rewrite(folder, f"programs/{program}.onnx", content)
    with pytest.raises(InvalidModel, match=r"^blobs/1 does not reproduce itself on this machine"):
        load_model(folder)


def test_a_sample_that_is_off_is_refused_by_its_row_and_feature(folder: Path) -> None:
    golden = load_file(folder / "golden.safetensors")
    golden["x"][5, 1] += 0.02 * golden["x"][:, 1].std()
    golden["decoded"][5] = golden["x"][5]
    model = load_model(published() / "blobs" / "1")
    rows = default_chunk(model.manifest.solver, golden["x"], golden["context"])
    golden["log_density"] = golden["served"] = run_chunk(model, rows).log_density
    save_file(golden, folder / "golden.safetensors")
    rewrite(folder, "golden.safetensors", (folder / "golden.safetensors").read_bytes())
    with pytest.raises(
        InvalidModel, match=r"golden row 5 has .* as feature 1 of its sample, its reference is"
    ):
        load_model(folder)


def test_the_refusal_says_by_how_much_and_what_to_do(folder: Path) -> None:
    golden = load_file(folder / "golden.safetensors")
    expected = golden["log_density"][3]
    golden["log_density"][3] = golden["served"][3] = expected + 0.5
    save_file(golden, folder / "golden.safetensors")
    rewrite(folder, "golden.safetensors", (folder / "golden.safetensors").read_bytes())
    with pytest.raises(InvalidModel) as raised:
        load_model(folder)
    assert "golden row 3 has log-density" in raised.value.message
    assert f"its reference is {expected + 0.5:.6g}" in raised.value.message
    assert "Publish the model again" in raised.value.message
    assert raised.value.file == "blobs/1/golden.safetensors"


def identity(width: int, outputs: list[str]) -> bytes:
    """A program that is none of ours: x [n, width] → x, twice."""
    x = helper.make_tensor_value_info("x", TensorProto.DOUBLE, ["n", width])
    ys = [helper.make_tensor_value_info(name, TensorProto.DOUBLE, ["n", width]) for name in outputs]
    nodes = [helper.make_node("Identity", ["x"], [name]) for name in outputs]
    graph = helper.make_graph(nodes, "g", [x], ys)
    return helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9
    ).SerializeToString()


@pytest.mark.parametrize("file", DEFAULT)
@pytest.mark.parametrize("width", [2, 5])
def test_a_program_of_another_shape_is_refused(folder: Path, file: str, width: int) -> None:
    rewrite(folder, f"programs/{file}.onnx", identity(width, ["z", "log_det"]))
    with pytest.raises(InvalidModel, match="blobs/1"):
        load_model(folder)


def test_a_program_that_is_none_is_refused_by_name(folder: Path) -> None:
    rewrite(folder, "programs/step_density_float32.onnx", b"MZ\x90\x00 not a graph")
    with pytest.raises(InvalidModel, match=r"^blobs/1/programs/step_density_float32\.onnx is not a program"):
        load_model(folder)


@pytest.mark.parametrize("program", ["step_density_float32", "step_sample_float32"])
def test_a_program_that_mixes_its_rows_is_refused(folder: Path, program: str) -> None:
    path = folder / "programs" / f"{program}.onnx"
    model = onnx.load(path)
    graph = model.graph
    name = graph.output[1].name
    for node in graph.node:
        node.output[:] = [f"own_{name}" if output == name else output for output in node.output]
        node.input[:] = [f"own_{name}" if value == name else value for value in node.input]
    graph.initializer.append(onnx.numpy_helper.from_array(np.array([0], np.int64), "rows"))
    graph.initializer.append(onnx.numpy_helper.from_array(np.float32(1e-6), "little"))
    graph.node.extend(
        [
            helper.make_node("ReduceMean", [f"own_{name}", "rows"], ["all_rows"], keepdims=1),
            helper.make_node("Mul", ["all_rows", "little"], ["a_little"]),
            helper.make_node("Add", [f"own_{name}", "a_little"], [name]),
        ]
    )
    rewrite(folder, f"programs/{program}.onnx", model.SerializeToString())
    with pytest.raises(InvalidModel, match="its rows depend on their batch"):
        load_model(folder)


def test_a_program_with_external_data_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = TensorProto(
        name="w", data_type=TensorProto.DOUBLE, dims=[2, 2], data_location=TensorProto.EXTERNAL
    )
    for key, value in {"location": "weights.bin", "offset": "0", "length": "32"}.items():
        weights.external_data.add(key=key, value=value)
    x = helper.make_tensor_value_info("x", TensorProto.DOUBLE, ["n", 2])
    y = helper.make_tensor_value_info("y", TensorProto.DOUBLE, ["n", 2])
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], "g", [x], [y], [weights])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    rewrite(folder, "programs/encode.onnx", model.SerializeToString())
    monkeypatch.chdir(folder.parent)
    np.eye(2).tofile(folder.parent / "weights.bin")
    with pytest.raises(InvalidModel, match=r"^blobs/1/programs/encode\.onnx is not a program"):
        load_model(folder)


GOLDEN: dict[str, Callable[[dict[str, np.ndarray]], object]] = {
    "no answers": lambda g: g.pop("log_density"),
    "no rows": lambda g: g.pop("x"),
    "not one row": lambda g: g.update({name: array[:0] for name, array in g.items()}),
    "no served answers": lambda g: g.pop("served"),
    "no context": lambda g: g.pop("context"),
    "a feature more": lambda g: g.update(x=np.hstack([g["x"], g["x"]])),
    "a context more": lambda g: g.update(context=np.hstack([g["context"]] * 2)),
    "fewer answers": lambda g: g.update(log_density=g["log_density"][:-1]),
    "fewer contexts": lambda g: g.update(context=g["context"][:-1]),
    "rows as a vector": lambda g: g.update(x=g["x"].ravel()),
    "float32 rows": lambda g: g.update(x=g["x"].astype(np.float32)),
    "NaN answers": lambda g: g.update(log_density=g["log_density"] * np.nan),
    "NaN rows": lambda g: g.update(x=g["x"] * np.nan),
    "answers that allow everything": lambda g: g.update(served=g["served"] + np.inf),
    "no base points": lambda g: g.pop("z"),
    "no samples": lambda g: g.pop("decoded"),
    "fewer base points": lambda g: g.update(z=g["z"][:-1]),
    "fewer samples": lambda g: g.update(decoded=g["decoded"][:-1]),
    "a base point without its row": lambda g: g["z"].__setitem__((3, 0), np.nan),
    "NaN base points": lambda g: g.update(z=g["z"] * np.nan, log_density=g["log_density"] - np.inf),
    "another base point": lambda g: g["z"].__setitem__(3, g["z"][3] + 0.1),
    "NaN samples": lambda g: g.update(decoded=g["decoded"] * np.nan),
    "samples that allow everything": lambda g: g.update(decoded=g["decoded"] + np.inf),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_rows_that_do_not_fit_are_refused_by_name(folder: Path, name: str) -> None:
    golden = load_file(folder / "golden.safetensors")
    GOLDEN[name](golden)
    save_file(golden, folder / "golden.safetensors")
    rewrite(folder, "golden.safetensors", (folder / "golden.safetensors").read_bytes())
    with pytest.raises(InvalidModel) as raised:
        load_model(folder)
    assert raised.value.file == "blobs/1/golden.safetensors"


def test_golden_rows_that_are_no_tensors_are_refused_by_name(folder: Path) -> None:
    rewrite(folder, "golden.safetensors", b"\x80\x04 pickle, perhaps")
    with pytest.raises(InvalidModel, match=r"^blobs/1/golden\.safetensors is not a safetensors file"):
        load_model(folder)


def test_a_file_that_changes_after_loading_is_noticed_when_it_is_read(folder: Path) -> None:
    model = load_model(folder)
    path = folder / "programs" / "step_sample_float64.onnx"
    path.write_bytes(path.read_bytes() + b" ")
    model = LoadedModel(Manifest.read(folder / "manifest.json"), folder)
    with pytest.raises(InvalidModel, match=r"^blobs/1/programs/step_sample_float64\.onnx was changed"):
        model.program("step_sample_float64")


def test_a_loaded_version_does_not_need_its_folder(folder: Path) -> None:
    model = load_model(folder)
    shutil.rmtree(folder)
    x, c = blobs(5)
    for precision in ("float32", "float64"):
        for kind in Kind:
            for density in (True, False):
                asked = chunk("x", kind, x, c, precision=precision, density=density)
                assert run_chunk(model, asked).status.tolist() == [Status.OK] * 5


def test_a_file_that_goes_after_loading_is_noticed_when_it_is_read(folder: Path) -> None:
    model = LoadedModel(Manifest.read(folder / "manifest.json"), folder)
    (folder / "programs" / "step_sample_float64.onnx").unlink()
    with pytest.raises(InvalidModel, match=r"^blobs/1/programs/step_sample_float64\.onnx"):
        model.program("step_sample_float64")


def test_a_program_that_the_version_lacks_is_named_with_those_it_has(folder: Path) -> None:
    model = load_model(folder)
    with pytest.raises(
        InvalidModel, match=r"blobs/1 has no program step_density_float16; it has decode, encode,"
    ):
        model.program("step_density_float16")
