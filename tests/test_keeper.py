"""Keeping models: what is loaded, when, and that nothing in use is ever taken away."""

from __future__ import annotations

import gc
import json
import logging
import select
import shutil
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from pushforward.engine.engine import Engine
from pushforward.engine.request import Answer, Chunk, Status
from pushforward.keeper import Keeper
from pushforward.loading import default_chunk, load_model, run_chunk
from pushforward.messages import ModelState
from pushforward.store.catalog import Catalog
from pushforward.store.manifest import Manifest

LIMIT_S = 60  # for what takes a tenth of a second
MOONS, WINE = ("moons", 1), ("wine", 1)


@pytest.fixture
def root(tmp_path: Path, checkout: Path) -> Path:
    """A store with moons 1 and wine 1."""
    for name in ("moons", "wine"):
        shutil.copytree(checkout / "model_store" / name, tmp_path / "store" / name)
    return tmp_path / "store"


def add(root: Path, name: str, version: int, damage: str | None = None) -> Path:
    """Publish a copy of version 1 under another number, as publishing does: with one rename."""
    draft = root / ".publishing" / str(version)
    shutil.copytree(root / name / "1", draft)
    manifest = json.loads((draft / "manifest.json").read_text()) | {"version": version}
    (draft / "manifest.json").write_text(json.dumps(manifest))
    if damage:
        (draft / damage).write_bytes((draft / damage).read_bytes()[:-1])
    return draft.rename(root / name / str(version))


@pytest.fixture
def keep(root: Path) -> Iterator[Callable[..., Keeper]]:
    """Start a keeper over the store; it ends with the test."""
    keepers = []

    def start(versions: str = "latest", load: str = "start", watch_s: float = 0.05, **bound: int) -> Keeper:
        keeper = Keeper(Catalog(root), versions, load, watch_s, **bound)
        keepers.append(keeper)
        keeper.start()
        return keeper

    yield start
    for keeper in keepers:
        keeper.close()


def news(keeper: Keeper) -> list[ModelState]:
    """The next events, waited for."""
    end = time.monotonic() + LIMIT_S
    while time.monotonic() < end:
        select.select([keeper], [], [], LIMIT_S)
        if events := keeper.events():
            return events
    raise AssertionError("there is no news")


def until(keeper: Keeper, name: str, version: int, state: str) -> list[ModelState]:
    """All events up to the one that a version is in a state."""
    events: list[ModelState] = []
    while not any((e.model, e.version, e.state) == (name, version, state) for e in events):
        events += news(keeper)
    return events


def started(keeper: Keeper) -> dict[tuple[str, int], ModelState]:
    """What has become of the versions that the first look found."""
    assert keeper.initial.wait(LIMIT_S)
    return {(event.model, event.version): event for event in keeper.events()}


def ready(states: dict[tuple[str, int], ModelState]) -> set[tuple[str, int]]:
    return {key for key, event in states.items() if event.state == "ready"}


def drops(keeper: Keeper) -> list[tuple[str, int]]:
    """What is to be dropped, waited for; whatever else is news is passed over."""
    end = time.monotonic() + LIMIT_S
    while time.monotonic() < end:
        if keys := keeper.dropping():
            return keys
        select.select([keeper], [], [], LIMIT_S)
        keeper.events()
    raise AssertionError("nothing is to be dropped")


def chunk(root: Path, name: str, version: int, id: str, rows: int = 4) -> Chunk:
    folder = root / name / str(version)
    solver, x = Manifest.read(folder / "manifest.json").solver, load_file(folder / "golden.safetensors")["x"]
    return replace(
        default_chunk(solver, np.resize(x, (rows, x.shape[1])), None), id=id, model=name, version=version
    )


# ------------------------------------------------------------------------------------- what is wanted


@pytest.mark.parametrize(
    ("versions", "expected"),
    [
        ("latest", {("moons", 3), WINE}),
        ("latest:2", {("moons", 2), ("moons", 3), WINE}),
        ("all", {("moons", 1), ("moons", 2), ("moons", 3), WINE}),
        ("moons/1,wine/1", {MOONS, WINE}),
        ("moons/2", {("moons", 2)}),
    ],
)
def test_the_policy_says_what_is_loaded(
    root: Path, keep: Callable[..., Keeper], versions: str, expected: set[tuple[str, int]]
) -> None:
    for number in (2, 3):
        add(root, "moons", number)
    keeper = keep(versions)
    states = started(keeper)
    assert set(states) == ready(states) == expected
    for key in [("moons", 1), ("moons", 2), ("moons", 3), WINE]:
        model = keeper.get(*key)
        assert (None if model is None else (model.manifest.name, model.manifest.version)) == (
            key if key in expected else None
        )


def test_labelled_versions_are_loaded_beside(root: Path, keep: Callable[..., Keeper]) -> None:
    add(root, "moons", 2)
    add(root, "moons", 3)
    Catalog(root).set_label("moons", "stable", 1)
    keeper = keep()
    assert ready(started(keeper)) == {MOONS, ("moons", 3), WINE}
    Catalog(root).set_label("moons", "canary", 2)
    until(keeper, "moons", 2, "ready")
    Catalog(root).remove_label("moons", "stable")
    assert drops(keeper) == [MOONS]


def test_a_listed_version_that_is_not_there_is_loaded_when_it_comes(
    root: Path, keep: Callable[..., Keeper]
) -> None:
    keeper = keep("moons/2,suns/1")
    states = started(keeper)
    assert "Model moons has no version" in states["moons", 2].reason
    assert "There is no model 'suns'" in states["suns", 1].reason
    add(root, "moons", 2)
    until(keeper, "moons", 2, "ready")


def test_with_first_use_only_what_is_asked_for_is_loaded_and_stays(
    root: Path, keep: Callable[..., Keeper]
) -> None:
    keeper = keep(load="first-use")
    assert started(keeper) == {}
    keeper.want(*MOONS)
    assert [event.state for event in until(keeper, *MOONS, "ready")] == ["loading", "ready"]
    add(root, "moons", 2)
    Catalog(root).set_label("moons", "stable", 2)
    keeper.want(*WINE)  # the thread has been round since
    assert {event.model for event in until(keeper, *WINE, "ready")} == {"wine"}
    assert keeper.get("moons", 2) is None
    assert keeper.get(*MOONS) is not None
    assert keeper.dropping() == []


def test_what_chunks_ask_for_is_loaded_first_and_kept(root: Path, keep: Callable[..., Keeper]) -> None:
    add(root, "moons", 2)
    keeper = Keeper(Catalog(root), watch_s=0.05)
    keeper.want(*MOONS)
    keeper.start()
    try:
        order = [event for event in until(keeper, *WINE, "ready") if event.state == "ready"]
        assert [(event.model, event.version) for event in order] == [MOONS, ("moons", 2), WINE]
        add(root, "moons", 3)
        assert drops(keeper) == [("moons", 2)]
    finally:
        keeper.close()


# ----------------------------------------------------------------------------------------- updates


def test_a_new_version_is_ready_before_the_old_one_goes(root: Path, keep: Callable[..., Keeper]) -> None:
    keeper = keep()
    started(keeper)
    old = keeper.get(*MOONS)
    add(root, "moons", 2)
    events = until(keeper, "moons", 2, "ready")
    assert [event.state for event in events] == ["loading", "ready"]
    assert events[-1].seconds > 0
    assert drops(keeper) == [MOONS]
    assert keeper.get(*MOONS) is None
    assert keeper.get("moons", 2) is not None
    keeper.want(*MOONS)  # a chunk that was on its way: the version is revived, not loaded again
    assert [event.state for event in until(keeper, *MOONS, "ready")] == ["ready"]
    assert keeper.get(*MOONS) is old
    assert keeper.dropping() == []


def test_what_is_dropped_is_unloaded_and_comes_back_when_asked_for(
    root: Path, keep: Callable[..., Keeper]
) -> None:
    keeper = keep()
    started(keeper)
    add(root, "moons", 2)
    assert drops(keeper) == [MOONS]
    keeper.dropped(*MOONS)
    (event,) = (event for event in until(keeper, *MOONS, "unloaded") if event.state == "unloaded")
    assert event.reason == ""
    assert keeper.dropping() == []
    keeper.want(*MOONS)
    assert [event.state for event in until(keeper, *MOONS, "ready")] == ["loading", "ready"]


def test_what_late_chunks_brought_back_goes_again_when_no_more_come(
    root: Path, keep: Callable[..., Keeper], monkeypatch: pytest.MonkeyPatch
) -> None:
    keeper = keep()
    started(keeper)
    add(root, "moons", 2)
    assert drops(keeper) == [MOONS]
    keeper.want(*MOONS)
    assert [event.state for event in until(keeper, *MOONS, "ready")][-1] == "ready"
    time.sleep(0.5)  # some looks
    assert keeper.dropping() == []
    asked = keeper._asked[MOONS]
    assert keeper.get(*MOONS) is not None
    assert keeper._asked[MOONS] > asked
    monkeypatch.setattr("pushforward.keeper._KEEP_S", 0.0)
    assert drops(keeper) == [MOONS]
    assert keeper.get("moons", 2) is not None


@pytest.mark.parametrize("damage", ["programs/decode.onnx", "golden.safetensors", "manifest.json"])
def test_a_broken_version_fails_with_its_reason_and_the_old_one_stays(
    root: Path, keep: Callable[..., Keeper], damage: str
) -> None:
    keeper = keep()
    started(keeper)
    old = keeper.get(*MOONS)
    broken = add(root, "moons", 2, damage)
    assert f"moons/2/{damage}" in until(keeper, "moons", 2, "failed")[-1].reason
    keeper.want("moons", 2)  # it is not tried again as it is …
    (event,) = news(keeper)
    assert (event.state, f"moons/2/{damage}" in event.reason) == ("failed", True)
    assert keeper.get(*MOONS) is old
    shutil.rmtree(broken)  # … but when it is mended
    add(root, "moons", 2)
    until(keeper, "moons", 2, "ready")


def test_an_older_version_stands_in_for_a_broken_one_at_the_start(
    root: Path, keep: Callable[..., Keeper]
) -> None:
    add(root, "moons", 2, "programs/decode.onnx")
    add(root, "moons", 3, "golden.safetensors")
    states = started(keep())
    assert ready(states) == {MOONS, WINE}
    assert {states["moons", number].state for number in (2, 3)} == {"failed"}


def test_a_failed_version_is_tried_again_when_loading_is_asked_for(
    root: Path, keep: Callable[..., Keeper]
) -> None:
    broken = add(root, "moons", 2, "programs/decode.onnx")
    keeper = keep(watch_s=0)
    assert started(keeper)["moons", 2].state == "failed"
    keeper.load("moons", 2)
    assert [event.state for event in until(keeper, "moons", 2, "failed")] == ["loading", "failed"]
    shutil.copy(root / "moons" / "1" / "programs" / "decode.onnx", broken / "programs")
    keeper.want("moons", 2)
    until(keeper, "moons", 2, "ready")


@pytest.mark.parametrize("file", ["labels.json", "1/manifest.json"])
def test_what_is_broken_in_one_model_does_not_hide_the_others(
    root: Path, keep: Callable[..., Keeper], file: str
) -> None:
    (root / "moons" / file).write_text("{")
    keeper = keep()
    states = started(keeper)
    assert states[WINE].state == "ready"
    assert states[MOONS].state == ("ready" if file == "labels.json" else "failed")
    add(root, "wine", 2)
    until(keeper, "wine", 2, "ready")


def test_broken_labels_leave_labelled_versions_loaded(root: Path, keep: Callable[..., Keeper]) -> None:
    add(root, "moons", 2)
    Catalog(root).set_label("moons", "stable", 1)
    keeper = keep()
    started(keeper)
    (root / "moons" / "labels.json").write_text("{")
    add(root, "moons", 3)
    until(keeper, "moons", 3, "ready")
    assert drops(keeper) == [("moons", 2)]


def test_a_store_that_vanishes_touches_nothing_that_is_loaded(
    root: Path, keep: Callable[..., Keeper], caplog: pytest.LogCaptureFixture
) -> None:
    keeper = keep()
    started(keeper)
    rows = chunk(root, *WINE, "rows")
    noticed = threading.Event()
    watching = logging.getLogger("pushforward.store.policy")
    handler = logging.Handler()
    handler.emit = lambda record: noticed.set()  # type: ignore[method-assign]
    watching.addHandler(handler)
    try:
        root.rename(root.with_name("away"))
        assert noticed.wait(LIMIT_S)
    finally:
        watching.removeHandler(handler)
    model = keeper.get(*WINE)
    assert model is not None
    assert keeper.dropping() == []
    answer = run_chunk(model, replace(rows, precision="float64"))  # programs that nobody had asked for
    assert answer.status.tolist() == [Status.OK] * 4
    root.with_name("away").rename(root)
    add(root, "wine", 2)
    until(keeper, "wine", 2, "ready")


# --------------------------------------------------------------------------------- loading by hand


def test_what_is_unloaded_stays_away_until_it_is_loaded(root: Path, keep: Callable[..., Keeper]) -> None:
    keeper = keep()
    started(keeper)
    keeper.unload(*MOONS)
    assert drops(keeper) == [MOONS]
    assert keeper.get(*MOONS) is not None  # for requests of which chunks are still to come
    keeper.dropped(*MOONS)
    assert keeper.get(*MOONS) is None
    assert "moons/1 was unloaded" in until(keeper, *MOONS, "unloaded")[-1].reason
    add(root, "wine", 2)
    assert not [e for e in until(keeper, "wine", 2, "ready") if e.model == "moons"]  # not by the policy,
    keeper.want(*MOONS)  # nor by chunks,
    assert "moons/1 was unloaded" in until(keeper, *MOONS, "failed")[-1].reason
    keeper.load(*MOONS)  # but so
    until(keeper, *MOONS, "ready")
    assert keeper.get(*MOONS) is not None


def test_a_version_that_drains_by_hand_can_be_loaded_again_at_once(
    root: Path, keep: Callable[..., Keeper]
) -> None:
    keeper = keep()
    started(keeper)
    model = keeper.get(*MOONS)
    keeper.unload(*MOONS)
    keeper.want(*MOONS)
    assert news(keeper)[-1].state == "failed"
    keeper.load(*MOONS)
    assert news(keeper)[-1].state == "ready"
    assert keeper.get(*MOONS) is model


def test_unloading_what_is_being_loaded_tells_those_who_wait(root: Path, keep: Callable[..., Keeper]) -> None:
    keeper = keep(load="first-use")
    keeper.want(*WINE)
    keeper.want(*MOONS)
    keeper.unload(*WINE)
    keeper.unload(*MOONS)
    events: list[ModelState] = []
    while [event.state for event in events].count("unloaded") < 2:
        events += news(keeper)
    assert [event.state for event in events].count("failed") == 2
    assert not [event for event in events if event.state == "ready"]
    assert {event.reason for event in events if event.state != "loading"} == {
        f"{name}/1 was unloaded: load it to have it served again." for name in ("wine", "moons")
    }


def test_what_is_loaded_by_hand_is_kept_whatever_the_policy(root: Path, keep: Callable[..., Keeper]) -> None:
    add(root, "moons", 2)
    keeper = keep()
    started(keeper)
    keeper.load(*MOONS)
    until(keeper, *MOONS, "ready")
    add(root, "moons", 3)
    assert drops(keeper) == [("moons", 2)]


# ------------------------------------------------------------------------------------------- memory


class Loop:
    """The turns of a worker's loop, with a real engine."""

    def __init__(self, keeper: Keeper) -> None:
        self.keeper = keeper
        self.engine = Engine(keeper.get)  # type: ignore[arg-type]  # asked only for what is ready
        self.waiting: dict[tuple[str, int], list[Chunk]] = {}
        self.rows: dict[str, tuple[str, int]] = {}
        self.answers: dict[str, Answer] = {}
        self.failed: dict[str, str] = {}
        self.most = 0

    def submit(self, chunk: Chunk) -> None:
        key = chunk.model, chunk.version
        if self.keeper.get(*key) is None:
            self.waiting.setdefault(key, []).append(chunk)
            self.keeper.want(*key)
        else:
            self.rows[chunk.id] = key
            self.engine.submit(chunk)

    def turn(self) -> None:
        if not self.engine.busy:
            assert select.select([self.keeper], [], [], LIMIT_S)[0], "nothing happens any more"
        for event in self.keeper.events():
            key = event.model, event.version
            if event.state in ("ready", "failed"):
                for chunk in self.waiting.pop(key, []):
                    if event.state == "ready":
                        self.submit(chunk)
                    else:
                        self.failed[chunk.id] = event.reason
        for answer in self.engine.step():
            self.answers[answer.id] = answer
            del self.rows[answer.id]
        for key in self.keeper.dropping():
            if key not in self.rows.values():
                self.engine.forget(*key)
                self.keeper.dropped(*key)


@pytest.mark.parametrize("memory_mb", [2, 4])
def test_everything_is_answered_within_the_memory_bound(
    root: Path, keep: Callable[..., Keeper], memory_mb: int
) -> None:
    """Five versions of 1.6 to 1.8 MB that take turns where there is room for one or two."""
    versions = [MOONS, WINE, *((name, 2) for name in ("moons", "wine")), ("moons", 3)]
    for name, version in versions[2:]:
        add(root, name, version)
    sizes = {
        key: Manifest.read(root / key[0] / str(key[1]) / "manifest.json").program_bytes for key in versions
    }
    assert sum(sizes.values()) > 4e6
    keeper = keep(memory_mb=memory_mb)
    assert keeper.initial.wait(LIMIT_S)
    loop = Loop(keeper)
    for number in range(20):
        key = versions[number % 5]
        loop.submit(chunk(root, *key, str(number)))
        if number % 3 == 2:
            loop.turn()
        kept = {*(key for key in versions if keeper.get(*key)), *keeper.dropping()}
        assert sum(sizes[key] for key in kept) <= memory_mb * 1e6
    while len(loop.answers) + len(loop.failed) < 20:
        loop.turn()
    assert not loop.failed
    for number in range(20):
        alone = run_chunk(
            load_model(root.joinpath(*map(str, versions[number % 5]))),
            chunk(root, *versions[number % 5], str(number)),
        )
        assert loop.answers[str(number)].log_density.tobytes() == alone.log_density.tobytes()


def test_what_was_unused_for_longest_gives_way(root: Path, keep: Callable[..., Keeper]) -> None:
    add(root, "moons", 2)
    keeper = keep("moons/1,wine/1", memory_mb=4)
    started(keeper)
    assert keeper.get(*MOONS) is not None  # so wine is what was not used
    keeper.want("moons", 2)
    assert drops(keeper) == [WINE]
    assert keeper.get(*WINE) is None
    assert keeper.get("moons", 2) is None  # it waits for the room
    keeper.dropped(*WINE)
    events = until(keeper, "moons", 2, "ready")
    assert [(e.model, e.state, e.reason) for e in events if e.model == "wine"] == [("wine", "unloaded", "")]


def test_versions_prove_themselves_in_turn_and_that_is_no_use_of_them(
    root: Path, keep: Callable[..., Keeper]
) -> None:
    keeper = keep()
    started(keeper)
    before = dict(keeper._used)
    proofs = [keeper.proof() for _ in range(4)]
    assert {(proof.chunk.model, proof.chunk.version) for proof in proofs[:2]} == {MOONS, WINE}
    assert proofs[2:] == proofs[:2]
    assert keeper._used == before
    for proof in proofs[:2]:
        model = keeper.held(proof.chunk.model, proof.chunk.version)
        assert proof.holds(run_chunk(model, proof.chunk, slots=5))
        assert not proof.holds(run_chunk(model, replace(proof.chunk, rows=proof.chunk.rows + 1e-6)))


def test_a_version_larger_than_the_bound_is_refused_with_the_reason(
    root: Path, keep: Callable[..., Keeper]
) -> None:
    states = started(keep(memory_mb=1))
    assert {event.state for event in states.values()} == {"failed"}
    assert "more than the 1 MB that all versions may take: raise model_memory_mb" in states[WINE].reason


def test_rows_in_flight_are_finished_before_their_version_goes(
    root: Path, keep: Callable[..., Keeper]
) -> None:
    keeper = keep()
    started(keeper)
    loop = Loop(keeper)
    tight = dict.fromkeys(("rtol", "atol", "logp_atol"), 1e-12)
    slow = replace(chunk(root, *WINE, "slow", 64), precision="float64", **tight)
    loop.submit(slow)
    keeper.unload(*WINE)
    loop.turn()
    assert keeper.dropping() == [WINE]
    loop.submit(chunk(root, *WINE, "late"))  # of a request that was taken before
    while "slow" not in loop.answers:
        loop.turn()
    assert keeper.dropping() == []  # dropped in the very turn in which its last row left
    assert loop.answers["slow"].status.tolist() == [Status.OK] * 64
    assert set(loop.answers["late"].status.tolist()) == {Status.OK}
    loop.submit(chunk(root, *WINE, "later"))
    while "later" not in loop.failed:
        loop.turn()
    assert "wine/1 was unloaded" in loop.failed["later"]


def test_an_unloaded_model_is_freed_without_the_garbage_collector(
    root: Path, keep: Callable[..., Keeper]
) -> None:
    keeper = keep(load="first-use")
    keeper.want(*WINE)
    until(keeper, *WINE, "ready")
    model = keeper.get(*WINE)
    assert model is not None
    references = [weakref.ref(model), *(weakref.ref(model.program(name)) for name in model.manifest.programs)]
    del model
    gc.disable()
    try:
        keeper.unload(*WINE)
        for key in keeper.dropping():
            keeper.dropped(*key)
        assert [reference() for reference in references] == [None] * len(references)
    finally:
        gc.enable()


def test_loading_and_unloading_does_not_grow(root: Path, keep: Callable[..., Keeper]) -> None:
    keeper = keep(load="first-use")

    def cycles(count: int) -> float:
        for _ in range(count):
            keeper.load(*MOONS)
            until(keeper, *MOONS, "ready")
            keeper.unload(*MOONS)
            for key in keeper.dropping():
                keeper.dropped(*key)
            until(keeper, *MOONS, "unloaded")
        gc.collect()
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 1e6

    before = cycles(10)
    assert cycles(30) - before < 6  # MB; one moons left behind in each would be 150
