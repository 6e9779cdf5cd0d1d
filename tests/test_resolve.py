"""Which version a request gets, over a real store and what a real keeper says of its versions."""

from __future__ import annotations

import json
import os
import select
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from pushforward.dataplane.resolve import Model, Resolver
from pushforward.errors import InvalidModel, NotFound
from pushforward.keeper import Keeper
from pushforward.messages import ModelState
from pushforward.store.catalog import Catalog

LIMIT_S = 60


class World:
    """A store with moons 1, a keeper that loads what it is told to, and a resolver."""

    def __init__(self, root: Path, bundled: Path) -> None:
        self.root = root
        shutil.copytree(bundled / "moons", root / "moons")
        self.catalog = Catalog(root)
        self.keeper = Keeper(self.catalog, load="first-use")
        self.keeper.start()
        self.states: dict[tuple[str, int], ModelState] = {}
        self.resolver = Resolver(self.catalog, lambda: self.states, canary_share=0.25)

    def publish(self, number: int, damage: str | None = None) -> None:
        draft = self.root / f".{number}"
        shutil.copytree(self.root / "moons" / "1", draft)
        manifest = json.loads((draft / "manifest.json").read_text()) | {"version": number}
        (draft / "manifest.json").write_text(json.dumps(manifest))
        if damage:
            (draft / damage).write_bytes(b"{")
        draft.rename(self.root / "moons" / str(number))

    def until(self, number: int, *states: str) -> None:
        """Listen to the keeper until a version is in one of the states."""
        while True:
            state = self.states.get(("moons", number))
            if state is not None and state.state in states:
                return
            assert select.select([self.keeper], [], [], LIMIT_S)[0]
            for event in self.keeper.events():
                self.states[event.model, event.version] = event

    def load(self, number: int) -> None:
        self.keeper.load("moons", number)
        self.until(number, "ready", "failed")

    def unload(self, number: int) -> None:
        self.keeper.unload("moons", number)
        for key in self.keeper.dropping():
            self.keeper.dropped(*key)
        self.until(number, "unloaded")

    def find(self, version: str | int | None = None, request_id: str = "") -> Model:
        return self.resolver.find("moons", version, request_id)

    def number(self, version: str | int | None = None, request_id: str = "") -> int:
        return self.find(version, request_id).manifest.version


@pytest.fixture
def world(tmp_path: Path, checkout: Path) -> Iterator[World]:
    world = World(tmp_path / "store", checkout / "model_store")
    yield world
    world.keeper.close()


def test_at_the_start_the_newest_is_taken_before_it_is_ready(world: World) -> None:
    world.publish(2)
    assert world.number() == 2
    world.catalog.set_label("moons", "stable", 1)
    assert world.number() == world.number("stable") == 1


def test_a_number_means_that_version_whatever_its_state(world: World) -> None:
    world.publish(2, "programs/decode.onnx")
    world.load(2)
    for version in (2, "2"):
        assert world.number(version) == 2
    for version in (3, "3", "03", "x", "１"):
        with pytest.raises(NotFound):
            world.find(version)
    for name in ("../moons", "moons/1", "", "\0", "a" * 5000):
        with pytest.raises(NotFound):
            world.resolver.find(name)


def test_publishing_leads_over_when_the_version_is_ready(world: World) -> None:
    world.load(1)
    assert world.number() == 1
    world.publish(2)
    assert world.number() == 1
    world.keeper.load("moons", 2)
    world.until(2, "loading")
    assert world.number() == 1
    world.until(2, "ready")
    assert world.number() == 2
    world.publish(3)
    world.unload(2)  # by hand: it is not to be served
    assert world.number() == 1


@pytest.mark.parametrize("damage", ["programs/decode.onnx", "manifest.json"])
def test_a_broken_version_is_passed_over(world: World, damage: str) -> None:
    world.load(1)
    assert world.number() == 1
    world.publish(2, damage)
    world.load(2)
    assert world.number() == 1


def test_when_all_are_broken_the_reason_is_given(world: World) -> None:
    (world.root / "moons" / "1" / "programs" / "decode.onnx").write_bytes(b"")
    world.load(1)
    with pytest.raises(InvalidModel, match=r"moons/1/programs/decode\.onnx has 0 bytes"):
        world.find()
    world.publish(2, "manifest.json")
    with pytest.raises(InvalidModel, match=r"moons/2/manifest\.json is not a valid manifest"):
        world.find()


def test_a_version_that_made_way_for_others_is_still_what_is_meant(world: World) -> None:
    world.publish(2)
    world.load(1)
    world.load(2)
    assert world.number() == 2
    world.states["moons", 2] = ModelState("moons", 2, "unloaded")  # as the keeper says it: no reason
    assert world.number() == 2


def test_a_label_leads_over_when_its_version_is_ready(world: World) -> None:
    world.publish(2)
    world.publish(3, "programs/decode.onnx")
    world.load(1)
    for asked, label in ((None, "stable"), ("blue", "blue")):
        world.catalog.set_label("moons", label, 1)
        assert world.number(asked) == 1
        world.catalog.set_label("moons", label, 2)
        assert world.number(asked) == 1
    world.load(2)
    assert world.number() == world.number("blue") == 2
    world.load(3)
    for label in ("stable", "blue"):
        world.catalog.set_label("moons", label, 3)
    assert world.number() == world.number("blue") == 2
    world.catalog.set_label("moons", "green", 3)
    with pytest.raises(InvalidModel, match=r"moons/3/programs/decode\.onnx"):
        world.find("green")
    world.catalog.set_label("moons", "stable", 1)  # a rollback
    assert world.number() == 1


def test_a_label_that_was_never_ready_gives_the_reason_then_the_version(world: World) -> None:
    world.load(1)
    world.unload(1)
    world.catalog.set_label("moons", "stable", 1)
    for version in (None, "stable"):
        with pytest.raises(InvalidModel, match="moons/1 was unloaded: load it"):
            world.find(version)
    world.load(1)
    assert world.number() == world.number("stable") == 1


def test_the_same_model_is_given_until_something_changes(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.load(1)
    os.utime(world.root / "moons", (0, 0))  # long ago: settled
    first = world.find()
    (world.root / "moons" / "1" / "manifest.json").rename(world.root / "kept")
    assert world.find() is first
    (world.root / "kept").rename(world.root / "moons" / "1" / "manifest.json")
    world.publish(2)
    assert world.find() is first
    world.load(2)
    assert world.number() == 2
    shutil.rmtree(world.root / "moons" / "2")
    assert world.find() is first


def test_what_is_served_outlives_its_store_and_its_labels(world: World) -> None:
    world.catalog.set_label("moons", "stable", 1)
    world.load(1)
    os.utime(world.root / "moons", (0, 0))
    first = world.find()
    assert world.find("stable") is world.find(1) is first
    (world.root / "moons" / "labels.json").write_text("{")
    os.utime(world.root / "moons")
    assert world.find() is world.find("stable") is world.find(1) is first
    world.root.rename(world.root.with_name("away"))
    assert world.find() is world.find("stable") is world.find(1) is first
    with pytest.raises(NotFound, match="There is no model store"):
        world.find("other")
    world.root.mkdir()  # where it was mounted
    assert world.find() is world.find("stable") is world.find(1) is first
    world.root.rmdir()
    world.root.with_name("away").rename(world.root)
    (world.root / "moons").rename(world.root / "suns")
    with pytest.raises(NotFound, match="There is no model 'moons'"):
        world.find()


def test_the_canary_takes_its_share_of_requests_without_a_version(world: World) -> None:
    ids = [f"{number:08x}" for number in range(4000)]
    world.load(1)
    world.publish(2)
    world.catalog.set_label("moons", "stable", 1)
    world.catalog.set_label("moons", "canary", 2)
    assert {world.number(None, id) for id in ids} == {1}  # it is not ready
    world.load(2)
    chosen = {id: world.number(None, id) for id in ids}
    assert 0.22 < sum(number == 2 for number in chosen.values()) / len(ids) < 0.28  # 4 standard deviations
    assert chosen == {id: world.number(None, id) for id in reversed(ids)}
    other = Resolver(world.catalog, lambda: world.states, canary_share=0.25)  # another process
    assert chosen == {id: other.find("moons", None, id).manifest.version for id in ids}
    assert {world.number("stable", id) for id in ids} == {1}
    assert world.number() == 1
    world.unload(2)
    assert {world.number(None, id) for id in ids} == {1}
    none = Resolver(world.catalog, lambda: world.states)
    assert {none.find("moons", None, id).manifest.version for id in ids} == {1}
