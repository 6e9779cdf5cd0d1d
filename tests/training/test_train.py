"""From a file to a published version, and from an interrupted run to nothing."""

import io
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console
from sklearn.datasets import load_wine
from tests.s3 import environment, s3

from pushforward.errors import Conflict, InvalidInput
from pushforward.loading import load_model
from pushforward.store.catalog import Catalog
from pushforward.store.opening import opened
from pushforward.training import train as train_module
from pushforward.training.progress import Live, Watch
from pushforward.training.recipe import Recipe
from pushforward.training.train import Options, run

QUICK = Options(recipe=Recipe(hidden=(16,), steps=60, batch=32, warmup=10, average=0.9, checks=4))


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """Alcohol, malic acid and proline of wines; those of the third kind are the anomalies."""
    data = load_wine()
    columns = np.column_stack([data.data[:, [0, 1, 12]], data.target == 2])
    path = tmp_path_factory.mktemp("data") / "wine.csv"
    np.savetxt(path, columns, delimiter=",", header="alcohol,malic_acid,proline,third", comments="", fmt="%g")
    return path


def console():
    return Console(file=io.StringIO(), width=100)


class Interrupt(Watch):
    """Ctrl-C after 40 steps."""

    def step(self, step, loss):
        if step == 40:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def interrupted(table, tmp_path_factory):
    """A store in which a run was interrupted, and what that run said."""
    store, out = tmp_path_factory.mktemp("store"), console()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_module, "watch_for", lambda console: Interrupt())
        with pytest.raises(KeyboardInterrupt):
            run(table, "wine", store, label="third", options=QUICK, console=out)
    assert Catalog(store).models() == []  # nothing is published, not even half
    assert "--resume continues" in " ".join(out.file.getvalue().split())
    return store


def test_other_settings_cannot_resume_a_run(table, interrupted):
    other = replace(QUICK, recipe=replace(QUICK.recipe, noise=0.1))
    with pytest.raises(Conflict, match="belongs to other data or other settings"):
        run(table, "wine", interrupted, label="third", options=other, resume=True, console=console())


@pytest.fixture(scope="module")
def trained(table, interrupted):
    """The store after the run was resumed, the manifest, and what the run said."""
    out = console()
    manifest = run(
        table,
        "wine",
        interrupted,
        label="third",
        options=QUICK,
        description="Wines.",
        resume=True,
        console=out,
    )
    return interrupted, manifest, out.file.getvalue()


def test_resuming_goes_on_where_the_run_was_interrupted(trained):
    _, _, text = trained
    assert "step 15/60" not in text
    assert "step 45/60" in text


def test_a_table_becomes_a_version_that_says_how_good_it_is(trained):
    store, manifest, _ = trained
    catalog = Catalog(store)
    assert catalog.models() == ["wine"]
    assert (manifest.name, manifest.version) == ("wine", 1)
    assert manifest.features == ["alcohol", "malic_acid", "proline"]  # the label is not among them
    assert manifest.data["rows"] == "178"
    assert manifest.data["anomalies"] == "48"
    assert manifest.calibration_rows == 32  # a quarter of the 130 others
    assert manifest.training["hidden"] == "16"
    assert manifest.training["steps"] == 60
    assert manifest.metrics["auroc"] > 0.6
    assert {"held_out_log_density", "gaussian_log_density", "mixture_log_density"} < manifest.metrics.keys()
    card = (store / "wine" / "1" / "MODEL_CARD.md").read_text()
    assert "Against 48 labelled anomalies, which were never trained on" in card
    assert "nats above the Gaussian" in card or "nats below the Gaussian" in card


def test_progress_and_report_are_plain_lines_away_from_a_terminal(trained):
    _, manifest, text = trained
    assert "step 60/60  loss" in text
    assert "steps/s  0 s left" in text
    assert "wine version 1" in text
    assert f"{manifest.metrics['held_out_log_density']:.3f}" in text
    assert "\x1b" not in text


def test_nothing_but_the_version_is_left_in_the_store(trained):
    store, _, _ = trained
    assert [
        path for path in store.rglob("*") if path.is_file() and path.parts[len(store.parts)] != "wine"
    ] == []


def test_an_npz_is_labelled_by_y_and_conditioned_by_column(tmp_path, rng):
    path = tmp_path / "table.npz"
    rows = rng.normal(size=(200, 2))
    np.savez(path, X=np.concatenate([rows, rows[:20] + np.array([8, 0])]), y=np.repeat([0, 1], [200, 20]))
    manifest = run(path, "table", tmp_path / "store", context=["x1"], options=QUICK, console=console())
    assert manifest.features == ["x0"]
    assert manifest.context_features == ["x1"]
    assert manifest.metrics["c2st_accuracy"] > 0.3  # far below ½ it would have seen twins of equal context
    assert manifest.metrics["auroc"] > 0.95


def test_a_bad_name_is_refused_before_any_work(table, tmp_path):
    with pytest.raises(InvalidInput, match="Wine!"):
        run(table, "Wine!", tmp_path / "store", console=console())
    assert not (tmp_path / "store").exists()


def test_a_constant_column_is_refused_by_name(tmp_path):
    path = tmp_path / "table.csv"
    path.write_text("a,b\n" + "".join(f"{i},5\n" for i in range(40)))
    with pytest.raises(InvalidInput, match="Column 'b' is 5 in every training row") as refusal:
        run(path, "table", tmp_path / "store", console=console())
    assert refusal.value.where == "b"


def test_the_bar_of_a_terminal_shows_loss_held_out_log_density_and_rate():
    out = Console(file=io.StringIO(), width=140, force_terminal=True)
    from pushforward.training.progress import Check, watch_for

    watch = watch_for(out)
    assert isinstance(watch, Live)
    with watch:
        watch.start(0, 20, [])
        for step in range(1, 21):
            watch.step(step, 1.25)
        watch.check(Check(20, 1.25, -3.5))
    text = out.file.getvalue()
    assert "20/20" in text
    assert "loss 1.2500" in text
    assert "held-out log-density -3.500" in text
    assert "steps/s" in text


def test_a_store_at_a_url_gets_the_version_and_the_cache_the_checkpoint(table, tmp_path, monkeypatch):
    with s3() as server, environment(server.variables):
        server.create_bucket("trained")
        where = {"store": "s3://trained/models", "cache": tmp_path, "label": "third", "options": QUICK}
        with monkeypatch.context() as patch:
            patch.setattr(train_module, "watch_for", lambda console: Interrupt())
            with pytest.raises(KeyboardInterrupt):
                run(table, "wine", **where, console=console())
        assert server.content("s3://trained", "models") == {}
        assert list(tmp_path.glob("*/.training/wine.safetensors"))
        manifest = run(table, "wine", **where, resume=True, console=console())
        catalog = opened("s3://trained/models", tmp_path, 100)
        found = catalog.resolve("wine")
        assert found.manifest == manifest
        catalog.fetch(found)
        load_model(found.folder)
    assert not list(tmp_path.glob("*/.training/*"))
