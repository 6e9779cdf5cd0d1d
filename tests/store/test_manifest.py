"""Manifests: strict reading, and refusals that name the file and the field."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from pushforward.errors import InvalidInput, InvalidModel
from pushforward.store.manifest import MAX_BYTES, Manifest, check_name, sha256_file, shown

Document = Callable[..., dict[str, Any]]


def replaced(document: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """The document with the value at a dotted path replaced; ``...`` removes it."""
    *parents, last = path.split("/")
    target = document
    for parent in parents:
        target = target[parent]
    if value is ...:
        del target[last]
    else:
        target[last] = value
    return document


@pytest.fixture
def read(tmp_path: Path) -> Callable[[Any], Manifest]:
    """Write a document (or raw bytes) where a manifest belongs, and read it."""

    def write_and_read(document: Any) -> Manifest:
        path = tmp_path / "moons" / "1" / "manifest.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(document if isinstance(document, bytes) else json.dumps(document).encode())
        return Manifest.read(path)

    return write_and_read


def test_reading_returns_what_was_written(
    manifest_document: Document, read: Callable[[Any], Manifest]
) -> None:
    manifest = read(manifest_document())
    assert manifest.model_dump() == manifest_document()
    assert read(manifest.to_bytes()) == manifest
    assert (manifest.dim, manifest.context_dim, manifest.exact) == (2, 0, True)


def test_a_conditional_model_with_an_estimated_trace(
    manifest_document: Document, read: Callable[[Any], Manifest]
) -> None:
    manifest = read(manifest_document() | {"context_features": ["class"], "divergence": "hutchinson"})
    assert (manifest.context_dim, manifest.exact) == (1, False)


def test_it_is_frozen(manifest_document: Document) -> None:
    manifest = Manifest.model_validate(manifest_document())
    with pytest.raises(ValidationError, match="frozen"):
        manifest.version = 2  # type: ignore[misc]


def test_every_field_is_documented() -> None:
    def undocumented(schema: dict[str, Any]) -> list[str]:
        return [name for name, field in schema["properties"].items() if not field.get("description")]

    schema = Manifest.model_json_schema()
    assert {name: undocumented(each) for name, each in schema["$defs"].items()} == {
        name: [] for name in ("Certificate", "FileEntry", "Solver")
    }
    assert undocumented(schema) == []


SHA = "0" * 64
FAULTS: list[tuple[str, Any, str]] = [
    ("surprise", 1, "surprise"),
    ("solver/surprise", 1, "solver.surprise"),
    ("format_version", 2, "format_version"),
    ("format_version", ..., "format_version"),
    ("name", "Moons", "name"),
    ("name", "../moons", "name"),
    ("name", "moons\n", "name"),
    ("name", "", "name"),
    ("name", 3, "name"),
    ("version", 0, "version"),
    ("version", 10**9, "version"),
    ("version", "1", "version"),
    ("version", 1.0, "version"),
    ("version", True, "version"),
    ("created", "yesterday", "created"),
    ("created", "2026-01-31T12:00:00", "UTC"),
    ("created", "2026-01-31T12:00:00+02:00", "UTC"),
    ("features", [], "features"),
    ("features", ["x", ""], "features[1]"),
    ("features", ["x", 1], "features[1]"),
    ("features", ["x", "x"], "'x' occurs twice"),
    ("features", "xy", "features"),
    ("context_features", ["y"], "'y' occurs twice"),
    ("context_features", None, "context_features"),
    ("t_data", 0.0, "t_base and t_data"),
    ("t_data", "1.0", "t_data"),
    ("t_data", float("nan"), "t_data"),
    ("solver/rtol", 0, "solver.rtol"),
    ("solver/atol", -1e-5, "solver.atol"),
    ("solver/logp_atol", float("inf"), "solver.logp_atol"),
    ("solver/logp_atol", ..., "solver.logp_atol"),
    ("solver/precision", "float16", "solver.precision"),
    ("solver/method", "../dopri5", "solver.method"),
    ("solver/dt_data_to_base", -0.1, "solver.dt_data_to_base"),
    ("solver/max_steps", 0, "solver.max_steps"),
    ("divergence", "guess", "divergence"),
    ("method_stages", 0, "method_stages"),
    ("programs", {}, "programs"),
    ("programs/encode", "programs/other.onnx", "programs/other.onnx"),
    ("programs/encode", "../../other/1/programs/encode.onnx", "programs.encode"),
    ("files/weights.safetensors", ..., "weights.safetensors"),
    ("files/weights.safetensors/sha256", SHA.upper() + "G", "files.weights.safetensors.sha256"),
    ("files/weights.safetensors/sha256", "A" * 64, "files.weights.safetensors.sha256"),
    ("files/weights.safetensors/bytes", -1, "files.weights.safetensors.bytes"),
    ("files/manifest.json", {"sha256": SHA, "bytes": 1}, "manifest.json"),
    ("files/weights.pkl", {"sha256": SHA, "bytes": 1}, "'weights.pkl'"),
    ("files/weights.pt", {"sha256": SHA, "bytes": 1}, "'weights.pt'"),
    ("files/code.py", {"sha256": SHA, "bytes": 1}, "'code.py'"),
    ("certificate/p50", 1.0, "ascend"),
    ("certificate/share_within_1e3", 1.1, "certificate.share_within_1e3"),
    ("certificate/rows", 0, "certificate.rows"),
    ("calibration_rows", 0, "calibration_rows"),
    ("metrics", {"auroc": "good"}, "metrics.auroc"),
    ("metrics", {"auroc": float("nan")}, "metrics.auroc"),
    ("training", {"layers": [1, 2]}, "training.layers"),
    ("training", {"loss": float("nan")}, "training.loss"),
    ("data", {"rows": {}}, "data.rows"),
]


@pytest.mark.parametrize(("path", "value", "named"), FAULTS)
def test_a_wrong_field_is_refused_by_name(
    manifest_document: Document, read: Callable[[Any], Manifest], path: str, value: Any, named: str
) -> None:
    with pytest.raises(InvalidModel) as raised:
        read(replaced(manifest_document(), path, value))
    assert raised.value.file == "moons/1/manifest.json"
    assert "moons/1/manifest.json" in raised.value.message
    assert named in raised.value.message


@pytest.mark.parametrize(
    "path",
    [
        *("/etc/passwd.json", "../up.json", "programs/../../up.json", "programs//a.onnx", "./a.onnx", "a/"),
        *(".hidden.json", "programs\\a.onnx", "a\0.json", "a\n.json", "%2e%2e/a.json", "ä.json", "C:a.json"),
        *("．．/a.json", "a/b/c/d.json", "", "x" * 200 + ".json"),
    ],
)
def test_a_file_path_that_is_not_plain_is_refused(
    manifest_document: Document, read: Callable[[Any], Manifest], path: str
) -> None:
    document = manifest_document()
    document["files"][path] = {"sha256": SHA, "bytes": 1}
    with pytest.raises(InvalidModel, match=r"moons/1/manifest\.json is not a valid manifest: files"):
        read(document)


@pytest.mark.parametrize(
    ("raw", "what"),
    [
        (b"", "EOF"),
        (b"{", "EOF"),
        (b"[]", "object"),
        (b"null", "object"),
        (b"\xff\xfe{}", "not UTF-8"),
        (b'{"name": "caf\xe9"}', "not UTF-8"),
        (b"\x80\x04\x95\x0c\x00\x00\x00\x00\x00\x00\x00}\x94.", "not UTF-8"),  # a pickle
        (b"[" * 500_000, "recursion"),
        (b" " * (MAX_BYTES + 1), "larger than"),
    ],
)
def test_what_is_no_manifest_at_all_is_refused(
    read: Callable[[Any], Manifest], raw: bytes, what: str
) -> None:
    with pytest.raises(InvalidModel, match=what) as raised:
        read(raw)
    assert raised.value.file == "moons/1/manifest.json"


def test_every_truncation_is_refused(manifest_document: Document, read: Callable[[Any], Manifest]) -> None:
    raw = json.dumps(manifest_document()).encode()
    for length in range(0, len(raw), 97):
        with pytest.raises(InvalidModel):
            read(raw[:length])


def test_wide_models_are_read_and_wide_repetitions_refused(
    manifest_document: Document, read: Callable[[Any], Manifest]
) -> None:
    assert read(manifest_document() | {"features": [f"f{i}" for i in range(10_000)]}).dim == 10_000
    with pytest.raises(InvalidModel, match="occurs twice"):
        read(manifest_document() | {"features": ["f"] * 100_000})


def test_missing_links_folders_and_pipes_are_refused(tmp_path: Path, manifest_document: Document) -> None:
    path = tmp_path / "moons" / "1" / "manifest.json"
    path.parent.mkdir(parents=True)
    with pytest.raises(InvalidModel, match=r"moons/1/manifest\.json is missing"):
        Manifest.read(path)
    outside = tmp_path / "outside.json"
    outside.write_text(json.dumps(manifest_document()))
    path.symlink_to(outside)
    with pytest.raises(InvalidModel, match="not a plain file"):
        Manifest.read(path)
    path.unlink()
    os.mkfifo(path)  # opening it would wait for a writer for ever
    with pytest.raises(InvalidModel, match="not a plain file"):
        Manifest.read(path)
    path.unlink()
    path.mkdir()
    with pytest.raises(InvalidModel, match="not a plain file"):
        Manifest.read(path)


def test_messages_escape_what_a_hostile_manifest_says(
    manifest_document: Document, read: Callable[[Any], Manifest]
) -> None:
    with pytest.raises(InvalidModel) as raised:
        read(manifest_document() | {"\x1b[2J" + "x" * 5000: 1})
    assert "\x1b" not in raised.value.message
    assert len(raised.value.message) < 400


@given(st.from_regex(r"[a-z0-9][a-z0-9._-]{0,62}", fullmatch=True))
def test_plain_names_pass(name: str) -> None:
    assert check_name(name) == name


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", ".a", "-a", "A", "a/b", "a\\b", "a\0", "a\n", "a b", "%2e", "é", "ａ", "a" * 64],
)
def test_other_names_are_refused_by_saying_what_a_name_is(name: str) -> None:
    with pytest.raises(InvalidInput, match="lower-case letters") as raised:
        check_name(name)
    assert raised.value.where == "name"


def test_shown_escapes_and_shortens() -> None:
    assert shown("a\n\x1b") == r"'a\n\x1b'"
    assert shown("é\udc80") == r"'\xe9\udc80'"
    assert len(shown("x" * 1000)) == 82


def test_sha256_file(tmp_path: Path) -> None:
    content = bytes(range(256)) * 5000
    (tmp_path / "a").write_bytes(content)
    assert sha256_file(tmp_path / "a") == hashlib.sha256(content).hexdigest()
