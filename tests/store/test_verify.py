"""Verifying a version: every damaged, swapped, added or hostile file is refused by name."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pickle
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pushforward.errors import InvalidModel
from pushforward.store.catalog import Catalog

WriteVersion = Callable[..., Path]


def test_an_untouched_version_is_verified(catalog: Catalog, monkeypatch: pytest.MonkeyPatch) -> None:
    for version in catalog.versions("moons"):
        assert catalog.verify(catalog.root / "moons" / str(version)).version == version
    monkeypatch.chdir(catalog.root / "moons" / "2")
    assert Catalog.verify(Path()).version == 2


def truncate(folder: Path) -> None:
    path = folder / "weights.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def extend(folder: Path) -> None:
    with (folder / "golden.safetensors").open("ab") as stream:
        stream.write(b"\0")


def edit(folder: Path) -> None:
    path = folder / "programs" / "encode.onnx"
    content = bytearray(path.read_bytes())
    content[150] ^= 1
    path.write_bytes(content)


def swap(folder: Path) -> None:
    first, second = folder / "programs" / "decode.onnx", folder / "programs" / "encode.onnx"
    contents = first.read_bytes(), second.read_bytes()
    second.write_bytes(contents[0])
    first.write_bytes(contents[1])


def take_away(folder: Path) -> None:
    (folder / "golden.safetensors").unlink()


def take_away_a_folder(folder: Path) -> None:
    shutil.rmtree(folder / "programs")


def add(folder: Path) -> None:
    (folder / "programs" / "extra.onnx").write_bytes(b"extra")


def add_a_pickle(folder: Path) -> None:
    (folder / "weights.pkl").write_bytes(pickle.dumps({"a": 1}))


def add_a_folder(folder: Path) -> None:
    (folder / "more" / "and" / "more").mkdir(parents=True)


def add_an_unspeakable_name(folder: Path) -> None:
    (folder / os.fsdecode(b"\xff\x1b[2J")).write_bytes(b"")


def link_out(folder: Path) -> None:
    path, outside = folder / "weights.safetensors", folder.parents[2] / "outside.safetensors"
    path.rename(outside)
    path.symlink_to(outside)  # of the right size and hash, but not in the folder


def link_a_folder_out(folder: Path) -> None:
    path, outside = folder / "programs", folder.parents[2] / "outside"
    path.rename(outside)
    path.symlink_to(outside)


def link_within(folder: Path) -> None:
    (folder / "programs" / "encode.onnx").unlink()
    (folder / "programs" / "encode.onnx").symlink_to("decode.onnx")


def pipe(folder: Path) -> None:
    (folder / "golden.safetensors").unlink()
    os.mkfifo(folder / "golden.safetensors")


def folder_for_file(folder: Path) -> None:
    (folder / "golden.safetensors").unlink()
    (folder / "golden.safetensors").mkdir()


def rehash(folder: Path) -> None:
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["files"]["weights.safetensors"]["sha256"] = hashlib.sha256(b"other").hexdigest()
    path.write_text(json.dumps(manifest))


def rename_in_manifest(folder: Path) -> None:
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace('"name": "moons"', '"name": "suns"'))


def renumber_in_manifest(folder: Path) -> None:
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace('"version": 2', '"version": 3'))


def lose_the_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


@pytest.mark.parametrize(
    ("damage", "file", "what"),
    [
        (truncate, "weights.safetensors", "has 199 bytes, but its manifest says 200"),
        (extend, "golden.safetensors", "has 101 bytes, but its manifest says 100"),
        (edit, "programs/encode.onnx", "SHA-256"),
        (swap, "programs/decode.onnx", "SHA-256"),
        (take_away, "golden.safetensors", "is missing"),
        (take_away_a_folder, "programs/decode.onnx", "is missing"),
        (add, "programs/extra.onnx", "not among the files"),
        (add_a_pickle, "weights.pkl", "not among the files"),
        (add_a_folder, "more", "not among the files"),
        (add_an_unspeakable_name, "\\udcff\x1b[2J", "not among the files"),
        (link_out, "weights.safetensors", "not a plain file"),
        (link_a_folder_out, "programs", "not among the files"),
        (link_within, "programs/encode.onnx", "not a plain file"),
        (pipe, "golden.safetensors", "not a plain file"),
        (folder_for_file, "golden.safetensors", "not a plain file"),
        (rehash, "weights.safetensors", "SHA-256"),
        (rename_in_manifest, "manifest.json", "is the manifest of suns/2"),
        (renumber_in_manifest, "manifest.json", "is the manifest of moons/3"),
        (lose_the_manifest, "manifest.json", "is missing"),
    ],
)
def test_a_damaged_version_is_refused_by_naming_the_file(
    catalog: Catalog, damage: Callable[[Path], None], file: str, what: str
) -> None:
    folder = catalog.root / "moons" / "2"
    damage(folder)
    with pytest.raises(InvalidModel, match=what) as raised:
        catalog.verify(folder)
    assert raised.value.file == f"moons/2/{file}"
    assert f"moons/2/{file}" in raised.value.message
    assert catalog.verify(catalog.root / "moons" / "1").version == 1


def test_every_single_edited_byte_is_seen(catalog: Catalog) -> None:
    path = catalog.root / "wine" / "1" / "MODEL_CARD.md"
    content = path.read_bytes()
    for position in range(len(content)):
        path.write_bytes(content[:position] + bytes([content[position] ^ 0x20]) + content[position + 1 :])
        with pytest.raises(InvalidModel, match=r"wine/1/MODEL_CARD\.md was changed"):
            catalog.verify(path.parent)
    path.write_bytes(content)
    assert catalog.verify(path.parent).name == "wine"


def test_a_version_in_the_wrong_folder_is_refused(catalog: Catalog, write_version: WriteVersion) -> None:
    shutil.copytree(catalog.root / "moons" / "2", catalog.root / "moons" / "3")
    shutil.copytree(catalog.root / "moons" / "2", catalog.root / "suns" / "2")
    for name, version in (("moons", 3), ("suns", 2)):
        with pytest.raises(InvalidModel, match=f"{name}/{version}/manifest.json is the manifest of moons/2"):
            catalog.resolve(name, version)
        with pytest.raises(InvalidModel, match=f"{name}/{version}/manifest.json is the manifest of moons/2"):
            catalog.verify(catalog.root / name / str(version))


@pytest.fixture
def public(catalog: Catalog) -> Iterator[Catalog]:
    """The store where any user may look: pytest keeps its own folders private."""
    with tempfile.TemporaryDirectory() as place:
        os.chmod(place, 0o755)
        yield Catalog(Path(shutil.copytree(catalog.root, Path(place) / "store")))


@contextlib.contextmanager
def ordinary_user() -> Iterator[None]:
    """Permissions mean nothing to root, so leave root for a while."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


@pytest.mark.parametrize("path", ["weights.safetensors", "programs", "manifest.json"])
def test_what_may_not_be_read_is_named(public: Catalog, path: str) -> None:
    folder = public.root / "moons" / "2"
    (folder / path).chmod(0)
    with (
        ordinary_user(),
        pytest.raises(InvalidModel, match=rf"moons/2/{path} cannot be read: Permission denied") as raised,
    ):
        public.verify(folder)
    (folder / path).chmod(0o755)
    assert raised.value.file == f"moons/2/{path}"


def test_a_pickle_under_a_listed_name_of_another_format_is_refused(write_version: WriteVersion) -> None:
    with pytest.raises(InvalidModel, match=r"'weights\.pkl'"):
        Catalog.verify(write_version("moons", 7, extra={"weights.pkl": pickle.dumps({"a": 1})}))


def test_extra_files_that_the_manifest_lists_belong(write_version: WriteVersion) -> None:
    manifest = Catalog.verify(write_version("moons", 7, extra={"programs/step.onnx": b"step"}))
    assert manifest.files["programs/step.onnx"].bytes == 4
