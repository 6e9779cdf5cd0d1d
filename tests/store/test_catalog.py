"""The catalog: finding versions, moving labels, and staying inside the store."""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from pushforward.errors import InvalidInput, InvalidModel, NotFound, PublishFailed
from pushforward.store.catalog import Catalog

WriteVersion = Callable[..., Path]


# Finding


def test_models_and_versions_are_listed_in_order(catalog: Catalog) -> None:
    assert catalog.models() == ["moons", "wine"]
    assert catalog.versions("moons") == [1, 2, 10]


@pytest.mark.parametrize(("version", "number"), [(None, 10), (1, 1), ("2", 2), ("10", 10)])
def test_a_version_is_found_by_number_or_as_the_newest(
    catalog: Catalog, version: str | int | None, number: int
) -> None:
    found = catalog.resolve("moons", version)
    assert (found.manifest.name, found.manifest.version) == ("moons", number)
    assert found.folder == catalog.root / "moons" / str(number)


def test_a_version_is_found_by_label_and_stable_is_the_default(catalog: Catalog) -> None:
    catalog.set_label("moons", "canary", 1)
    assert catalog.resolve("moons", "canary").manifest.version == 1
    assert catalog.resolve("moons").manifest.version == 10
    catalog.set_label("moons", "stable", 2)
    assert catalog.resolve("moons").manifest.version == 2


def test_what_is_not_a_version_is_ignored(catalog: Catalog, write_version: WriteVersion) -> None:
    model = catalog.root / "moons"
    for name in ("03", "v4", "5.0", "-6", "+7", "8_0", "٩", "0", "1e1", "latest"):
        (model / name).mkdir()
    write_version("moons", 11, folder="moons/.publishing-11")  # unfinished
    write_version("wine", 1, folder=".publishing/1")
    (model / "12").write_text("a file")
    (model / "13").symlink_to(write_version("moons", 13, folder="elsewhere/13"))
    (catalog.root / "Upper" / "1").mkdir(parents=True)
    (catalog.root / "empty").mkdir()
    (catalog.root / "README.md").write_text("a file")
    shutil.move(catalog.root / "elsewhere", catalog.root.parent / "elsewhere")
    (catalog.root / "linked").symlink_to(catalog.root.parent / "elsewhere")
    assert catalog.models() == ["moons", "wine"]
    assert catalog.versions("moons") == [1, 2, 10]
    for version in ("03", "v4", "13", 12, "+7"):
        with pytest.raises(NotFound, match=r"it has 1, 2, 10\."):
            catalog.resolve("moons", version)


def test_an_unknown_model_lists_names_that_come_close(catalog: Catalog) -> None:
    with pytest.raises(NotFound, match=r"There is no model 'moon': there is moons\.") as raised:
        catalog.resolve("moon")
    assert raised.value.known == ["moons"]
    with pytest.raises(NotFound, match=r"'Moons': there is moons\."):
        catalog.resolve("Moons")
    with pytest.raises(NotFound, match="there is moons, wine"):
        catalog.versions("something-else-entirely")


@pytest.mark.parametrize("version", [0, -1, 3, 11, "stabel", "01", "", " 1", "1 ", "1.0", "１", "²", 10**30])
def test_an_unknown_version_lists_those_that_exist(catalog: Catalog, version: str | int) -> None:
    catalog.set_label("moons", "stable", 2)
    with pytest.raises(NotFound, match=r"Model moons has no version or label") as raised:
        catalog.resolve("moons", version)
    assert raised.value.known == ["1", "2", "10", "stable"]


HOSTILE = [
    *("..", ".", "", "/", "../outside", "moons/../../outside", "/etc", "//etc", "..\\outside"),
    *("%2e%2e", "%2e%2e%2foutside", "..%2foutside", "moons%00", "moons\0", "moons\0/../..", "moons/1"),
    *("．．/outside", "．．", "moons\n", " moons", "~", "~root", "$HOME", "\udc80", "m\u043eons"),
    *("x" * 100_000, "moons/", "./moons", "C:\\moons", "file:///etc"),
]


@pytest.mark.parametrize("name", HOSTILE, ids=lambda name: ascii(name)[:24])
def test_nothing_outside_the_store_can_be_reached(
    catalog: Catalog, write_version: WriteVersion, name: str
) -> None:
    outside = write_version("outside", 1, folder="../outside/1")
    assert outside.resolve() == catalog.root.parent / "outside" / "1"
    for ask in (catalog.resolve, catalog.versions, catalog.labels):
        with pytest.raises(NotFound) as raised:
            ask(name)
        raised.value.message.encode("ascii")
        assert len(raised.value.message) < 300
    with pytest.raises(NotFound):
        catalog.set_label(name, "stable", 1)
    with pytest.raises(NotFound):
        catalog.remove_label(name, "stable")
    with pytest.raises(NotFound):
        catalog.resolve("moons", name)
    with pytest.raises(InvalidInput):
        catalog.set_label("moons", name, 1)
    assert not (outside.parent / "labels.json").exists()


def test_a_missing_store_and_an_empty_store_say_so(tmp_path: Path) -> None:
    missing = Catalog(tmp_path / "nowhere")
    for ask in (missing.models, lambda: missing.resolve("moons")):
        with pytest.raises(NotFound, match=r"There is no model store at .*nowhere \(No such file"):
            ask()
    (tmp_path / "file").write_text("")
    with pytest.raises(NotFound, match=r"There is no model store at .*file \(Not a directory"):
        Catalog(tmp_path / "file").models()
    (tmp_path / "empty").mkdir()
    assert Catalog(tmp_path / "empty").models() == []
    with pytest.raises(NotFound, match=r"There is no model 'moons': the store is empty\."):
        Catalog(tmp_path / "empty").resolve("moons")


# Labels


def test_labels_are_set_moved_copied_and_removed(catalog: Catalog) -> None:
    assert catalog.labels("moons") == {}
    catalog.set_label("moons", "stable", 2)
    catalog.set_label("moons", "canary", 10)
    assert catalog.labels("moons") == {"canary": 10, "stable": 2}
    catalog.set_label("moons", "stable", "canary")
    assert catalog.labels("moons") == {"canary": 10, "stable": 10}
    catalog.remove_label("moons", "canary")
    assert catalog.labels("moons") == {"stable": 10}
    assert json.loads((catalog.root / "moons" / "labels.json").read_text()) == {"stable": 10}
    assert catalog.labels("wine") == {}


def test_labels_that_cannot_be_are_refused(catalog: Catalog) -> None:
    for label in ("3", "3a", "", "Stable", "a b", "-a", ".a", "x" * 64):
        with pytest.raises(InvalidInput) as raised:
            catalog.set_label("moons", label, 1)
        assert raised.value.where == "label"
    with pytest.raises(NotFound, match="no version or label '3': it has 1, 2, 10"):
        catalog.set_label("moons", "stable", 3)
    with pytest.raises(NotFound, match="no label 'stable': it has none"):
        catalog.remove_label("moons", "stable")
    assert not (catalog.root / "moons" / "labels.json").exists()


def test_a_label_does_not_move_to_a_broken_version(catalog: Catalog) -> None:
    catalog.set_label("moons", "stable", 1)
    (catalog.root / "moons" / "2" / "manifest.json").write_text("{}")
    with pytest.raises(InvalidModel, match=r"moons/2/manifest\.json"):
        catalog.set_label("moons", "stable", 2)
    assert catalog.labels("moons") == {"stable": 1}


def test_a_label_of_a_version_that_is_gone_is_an_error_not_another_version(catalog: Catalog) -> None:
    catalog.set_label("moons", "stable", 2)
    shutil.rmtree(catalog.root / "moons" / "2")
    with pytest.raises(NotFound, match=r"'stable' \(which is 2\): it has 1, 10"):
        catalog.resolve("moons", "stable")
    with pytest.raises(NotFound, match="'stable'"):
        catalog.resolve("moons")


@pytest.mark.parametrize(
    "raw",
    [
        *(b"", b"[]", b'{"stable": "2"}', b'{"stable": 2.0}', b'{"stable": true}', b'{"stable": 0}'),
        *(b'{"stable": {"a": 1}}', b'{"3": 1}', b'{"../x": 1}', b'{"stable": 2', b"\xff", b"[" * 50_000),
        b" " * 70_000,
    ],
)
def test_broken_labels_are_refused_by_name(catalog: Catalog, raw: bytes) -> None:
    (catalog.root / "moons" / "labels.json").write_bytes(raw)
    for ask in (lambda: catalog.labels("moons"), lambda: catalog.resolve("moons")):
        with pytest.raises(InvalidModel, match=r"moons/labels\.json") as raised:
            ask()
        assert raised.value.file == "moons/labels.json"


def test_labels_behind_a_link_are_refused(catalog: Catalog) -> None:
    outside = catalog.root.parent / "labels.json"
    outside.write_text('{"stable": 1}')
    (catalog.root / "moons" / "labels.json").symlink_to(outside)
    with pytest.raises(InvalidModel, match="not a plain file"):
        catalog.labels("moons")


def test_a_failed_write_leaves_the_old_labels_and_no_litter(catalog: Catalog) -> None:
    catalog.set_label("moons", "stable", 1)
    before = sorted(os.listdir(catalog.root / "moons"))

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3, limits[1]))  # the disk is full after three bytes
    try:
        with pytest.raises(PublishFailed, match="labels of moons could not be written: File too large"):
            catalog.set_label("moons", "stable", 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert catalog.labels("moons") == {"stable": 1}
    assert sorted(os.listdir(catalog.root / "moons")) == before


def _label_many(root: Path, prefix: str) -> None:
    catalog = Catalog(root)
    for number in range(10):
        catalog.set_label("moons", f"{prefix}{number}", 1)


def test_processes_that_label_at_once_lose_nothing(catalog: Catalog) -> None:
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_label_many, args=(catalog.root, prefix)) for prefix in "ab"]
    for process in processes:
        process.start()
    while any(process.is_alive() for process in processes):
        catalog.labels("moons")  # a reader never meets half a file
        processes[0].join(0.01)
        processes[1].join(0.01)
    assert [process.exitcode for process in processes] == [0, 0]
    assert set(catalog.labels("moons")) == {f"{prefix}{number}" for prefix in "ab" for number in range(10)}
