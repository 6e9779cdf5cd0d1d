"""Publishing: what a version contains, what stays when it fails, and arguments that are refused at once."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file
from safetensors.torch import load_file as load_tensors
from tests.problems import Foreign, blobs, foreign_blobs, published, shaken
from tests.shared import python
from torch import nn

from pushforward.errors import InvalidInput, PublishFailed
from pushforward.flows.fields import MLP, Hutchinson, PlainTime, Wrapped
from pushforward.flows.flow import Flow
from pushforward.flows.transforms import Log, Standardize
from pushforward.loading import default_chunk, load_model, run_chunk
from pushforward.publish import publish
from pushforward.publish.certify import TOLERANCES, Draft, certify, gather
from pushforward.publish.recognise import recognise
from pushforward.scoring.calibration import Calibration
from pushforward.solvers.solve import log_density
from pushforward.store.catalog import Catalog
from pushforward.store.manifest import Manifest


def contents(store: Path) -> dict[str, bytes | None]:
    """Every path under a folder, hidden ones too, with the bytes of the files."""
    return {str(p.relative_to(store)): p.read_bytes() if p.is_file() else None for p in store.rglob("*")}


def manifest(version: int) -> Manifest:
    return Manifest.read(published() / "blobs" / str(version) / "manifest.json")


def exact_flow(version: int) -> Flow:
    """The caller's own module with the divergence by autograd, not what was recognised in it."""
    x, _ = blobs(400)
    seed = manifest(version).training["seed"]
    assert isinstance(seed, int)
    scale = Standardize(torch.from_numpy(x.mean(0)), torch.from_numpy(x.std(0)))
    return Flow(Wrapped(foreign_blobs(seed).double(), 2, 1), scale)


# ------------------------------------------------------------------------------------- what is published


def test_two_publishers_at_the_same_time_get_different_versions() -> None:
    store = published()
    assert Catalog(store).versions("blobs") == [1, 2]
    assert {manifest(1).training["seed"], manifest(2).training["seed"]} == {1, 2}
    assert sorted(path.name for path in store.iterdir()) == ["blobs"]
    assert sorted(path.name for path in (store / "blobs").iterdir()) == ["1", "2"]


def test_a_version_says_what_it_is() -> None:
    version = manifest(1)
    assert (version.name, version.version) == ("blobs", 1)
    assert (version.features, version.context_features) == (["a", "b"], ["c"])
    assert version.description == "Two blobs."
    assert version.data == {"source": "generator", "rows": 400}
    assert version.metrics == {"held_out_log_density": -2.5}
    assert version.divergence == "closed_form"
    assert version.exact
    assert version.solver.method == "dopri5"
    assert version.method_stages == 6
    assert version.calibration_rows == 400
    card = (published() / "blobs" / "1" / "MODEL_CARD.md").read_text()
    for expected in ("# blobs", "Two blobs.", "`a`, `b`", "given 1: `c`", "## Limits", "For tests only."):
        assert expected in card


@pytest.mark.parametrize("version", [1, 2])
def test_what_is_served_is_the_callers_module(version: int) -> None:
    model = load_model(published() / "blobs" / str(version))
    x, c = blobs(60)
    answer = run_chunk(model, default_chunk(model.manifest.solver, x, c))
    expected, base = log_density(exact_flow(version), torch.from_numpy(x), torch.from_numpy(c))
    np.testing.assert_allclose(answer.log_density, expected, rtol=0, atol=1e-3)
    np.testing.assert_allclose(answer.value, base, rtol=0, atol=1e-3)


@pytest.mark.parametrize("version", [1, 2])
def test_the_certificate_is_true(version: int) -> None:
    certificate = manifest(version).certificate
    assert certificate.p999 <= 1e-3
    assert certificate.share_within_1e3 >= 0.999
    assert certificate.rows == 1000
    assert "400 held-out rows and 600 of the model's own samples" in certificate.reference
    model = load_model(published() / "blobs" / str(version))
    x, c = blobs(400)
    answer = run_chunk(model, default_chunk(model.manifest.solver, x, c))
    expected, _ = log_density(exact_flow(version), torch.from_numpy(x), torch.from_numpy(c))
    error = np.abs(answer.log_density - expected.numpy())
    # 40 % of the certificate's rows: its largest and its median bound and match theirs
    assert error.max() <= certificate.max + 1e-7
    assert certificate.p50 / 4 < np.median(error) < 4 * certificate.p50
    assert answer.steps.max() <= certificate.steps_max


@pytest.mark.parametrize("version", [1, 2])
def test_the_tolerance_is_the_loosest_that_keeps_the_bound(version: int) -> None:
    model = load_model(published() / "blobs" / str(version))
    solver = model.manifest.solver
    assert solver.rtol == solver.atol == solver.logp_atol / 10 < 1e-3
    # the next looser one, as publishing measures it: with first steps not yet tuned, and tuned
    manifest = model.manifest
    draft = Draft(model.folder, manifest.programs, model.t_base, model.t_data, model.stages, 0.05, 0.05)
    rows = gather(draft, exact_flow(version), *blobs(400), lambda _: None)
    looser = TOLERANCES[TOLERANCES.index(solver.rtol) - 1]
    change = {"rtol": looser, "atol": looser, "logp_atol": 10 * looser}
    untuned = run_chunk(draft, replace(default_chunk(solver, rows.x, rows.context), **change)).log_density
    error = np.quantile(np.abs(untuned - rows.log_density), 0.999, method="higher")
    _, certificate = certify(draft, rows, solver.method, looser, lambda _: None)
    assert error > 5e-4 or certificate.p999 > 1e-3


def test_the_first_steps_are_worth_their_tuning() -> None:
    model = load_model(published() / "blobs" / "1")
    x, c = blobs(100)
    tuned = run_chunk(model, default_chunk(model.manifest.solver, x, c)).steps.mean()
    for share in (0.01, 0.3):
        model.dt_data_to_base = share
        assert run_chunk(model, default_chunk(model.manifest.solver, x, c)).steps.mean() >= tuned - 0.1


def test_the_calibration_holds_the_served_densities_of_all_rows() -> None:
    folder = published() / "blobs" / "1"
    model, calibration = load_model(folder), Calibration.load(folder / "calibration.safetensors")
    x, c = blobs(400)
    served = run_chunk(model, default_chunk(model.manifest.solver, x, c)).log_density
    np.testing.assert_allclose(calibration.log_density, np.sort(served), rtol=0, atol=1e-6)
    np.testing.assert_allclose(calibration.quantiles, np.quantile(x, calibration.quantile_levels, axis=0))


def test_the_golden_rows_are_held_out_rows_with_float64_answers() -> None:
    golden = load_file(published() / "blobs" / "1" / "golden.safetensors")
    x, c = blobs(400)
    rows = {(*a, *b) for a, b in zip(x.tolist(), c.tolist(), strict=True)}
    pairs = zip(golden["x"].tolist(), golden["context"].tolist(), strict=True)
    assert all((*a, *b) in rows for a, b in pairs)
    flow = exact_flow(1)
    expected, _ = log_density(flow, torch.from_numpy(golden["x"]), torch.from_numpy(golden["context"]))
    np.testing.assert_allclose(golden["log_density"], expected, rtol=0, atol=1e-7)


def test_the_weights_rebuild_the_field() -> None:
    path = published() / "blobs" / "1" / "weights.safetensors"
    with safe_open(path, "pt") as file:
        architecture = json.loads(file.metadata()["architecture"])
    assert architecture.pop("class") == "MLP"
    assert architecture.pop("time") == "PlainTime"
    flow = Flow(MLP(**architecture, time=PlainTime()), Standardize(torch.zeros(2), torch.ones(2)))
    flow.load_state_dict(load_tensors(path))
    x, c = (torch.from_numpy(part) for part in blobs(20))
    expected, _ = log_density(exact_flow(1), x, c)
    np.testing.assert_allclose(log_density(flow, x, c)[0], expected, rtol=0, atol=1e-7)


# ------------------------------------------------------- other fields: one publication in this process each

LOGNORMAL = np.exp(np.random.default_rng(3).normal(size=(80, 2)))
LOGNORMAL[::4, 0] *= -1  # outside the support of the logarithm


@pytest.fixture(scope="module")
def unbounded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, nn.Module]:
    """A deep foreign field on half a plane, with rows outside it and a tolerance that was asked for."""
    store, field = tmp_path_factory.mktemp("deep"), shaken(Foreign(2, (16, 16, 16)), 7)
    publish(
        field,
        store=store,
        name="deep",
        calibration=LOGNORMAL,
        transform=Log(2, [0]),
        t_base=1.0,
        t_data=0.0,
        method="bosh3",
        tolerance=1e-2,
    )
    return store, field


def test_a_foreign_field_is_published_with_rows_outside_its_support(
    unbounded: tuple[Path, nn.Module],
) -> None:
    store, field = unbounded
    model = load_model(store / "deep" / "1")
    assert model.manifest.divergence == "reverse_mode"
    assert model.manifest.features == ["x0", "x1"]
    answer = run_chunk(model, default_chunk(model.manifest.solver, LOGNORMAL, None))
    assert np.isneginf(answer.log_density[::4]).all()
    flow = Flow(Wrapped(field.double(), 2), Log(2, [0]), 1.0, 0.0)
    expected, _ = log_density(flow, torch.from_numpy(LOGNORMAL))
    inside = np.arange(80) % 4 > 0
    error = np.abs(answer.log_density[inside] - expected.numpy()[inside])
    assert error.max() <= model.manifest.certificate.max + 1e-7
    assert np.isneginf(Calibration.load(model.folder / "calibration.safetensors").log_density[:20]).all()


def test_a_tolerance_that_is_asked_for_is_taken_and_its_error_is_told(
    unbounded: tuple[Path, nn.Module],
) -> None:
    solver = load_model(unbounded[0] / "deep" / "1").manifest.solver
    assert (solver.rtol, solver.atol, solver.logp_atol) == (1e-2, 1e-2, 1e-1)
    certificate = load_model(unbounded[0] / "deep" / "1").manifest.certificate
    assert certificate.p999 > 1e-3
    assert certificate.share_within_1e3 < 0.999


@pytest.fixture(scope="module")
def estimated(tmp_path_factory: pytest.TempPathFactory) -> tuple[Manifest, Path, nn.Module]:
    """A field whose GELU ONNX Runtime knows in float32 only, with its divergence estimated."""
    store, field = tmp_path_factory.mktemp("estimated"), shaken(Foreign(3, (16,), 0, nn.GELU), 8)
    x = np.random.default_rng(0).normal(size=(50, 3))
    return publish(field, store=store, name="rough", calibration=x, method="bosh3", probes=2), store, field


def test_estimates_are_marked_as_such(estimated: tuple[Manifest, Path, nn.Module]) -> None:
    version, store, field = estimated
    assert version.divergence == "hutchinson"
    assert not version.exact
    rows = torch.from_numpy(load_model(store / "rough" / "1").tensors("golden.safetensors")["x"])
    identity = Standardize(torch.zeros(3), torch.ones(3))
    exact, _ = log_density(Flow(Wrapped(field, 3), identity), rows)
    estimate, _ = log_density(Flow(Hutchinson(recognise(field, 3), 2), identity), rows)
    off = float((exact - estimate).square().mean().sqrt())
    assert off > 0.01
    assert version.metrics["hutchinson_standard_error"] == pytest.approx(off, rel=0.5)


def test_estimates_are_still_reproducible(estimated: tuple[Manifest, Path, nn.Module]) -> None:
    model = load_model(estimated[1] / "rough" / "1")
    x = np.random.default_rng(1).normal(size=(20, 3))
    chunk_ = default_chunk(model.manifest.solver, x, None)
    assert run_chunk(model, chunk_).log_density.tobytes() == run_chunk(model, chunk_, 3).log_density.tobytes()


def test_operators_without_float64_are_served_in_float32_only(
    estimated: tuple[Manifest, Path, nn.Module],
) -> None:
    version = estimated[0]
    assert version.solver.precision == "float32"
    assert "step_density_float32" in version.programs
    assert not [name for name in version.programs if name.endswith("float64")]
    listed = {path.name for path in (estimated[1] / "rough" / "1" / "programs").iterdir()}
    assert listed == {path.partition("/")[2] for path in version.programs.values()}


# ------------------------------------------------------------------------------------------ what fails


def test_an_interrupt_leaves_the_store_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "other" / "1").mkdir(parents=True)
    (tmp_path / "other" / "1" / "file").write_text("kept")
    before = contents(tmp_path)

    def advance(what: str) -> None:
        if what == "checking":  # the last thing that is told
            assert len(contents(tmp_path)) > len(before) + 10  # the version is there, to be cleaned up
            raise KeyboardInterrupt

    rows = np.random.default_rng(0).normal(size=(20, 1))
    field = shaken(MLP(1, (16,)), 1)
    with pytest.raises(KeyboardInterrupt):
        publish(field, store=tmp_path, name="new", calibration=rows, method="bosh3", advance=advance)
    assert contents(tmp_path) == before


FULL_DISK = """
import resource, sys
import numpy as np
from pushforward.errors import PublishFailed
from pushforward.publish import publish
from tests.problems import MLP, shaken

def advance(what):
    if what == "program encode":  # from here, no file can grow beyond 1000 bytes
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))

try:
    rows = np.random.default_rng(0).normal(size=(20, 1))
    field = shaken(MLP(1, (16,)), 1)
    publish(field, store=sys.argv[1], name="new", calibration=rows, method="bosh3", advance=advance)
except PublishFailed as error:
    print(error.message)
"""


def test_a_full_disk_leaves_the_store_as_it_was_and_says_so(tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("kept")
    process = python(FULL_DISK, str(tmp_path))
    printed, errors = process.communicate()
    assert process.returncode == 0, errors
    assert printed == (
        "The version could not be written: File too large. Nothing was published; the store is as it was.\n"
    )
    assert contents(tmp_path) == {"kept": b"kept"}


def test_a_store_that_is_a_file_is_no_store(tmp_path: Path) -> None:
    (tmp_path / "store").write_text("not a folder")
    with pytest.raises(PublishFailed, match="The store store cannot be written"):
        publish(MLP(1, (16,)), store=tmp_path / "store", name="new", calibration=np.zeros((5, 1)))


class Cliff(nn.Module):
    """Not a number beyond t = 0.7, where points to recognise it by may lie; finite before."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Parameter(torch.ones(()))

    def forward(self, t: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        return self.one * z * torch.sqrt(0.7 - t)


def test_a_field_that_is_not_finite_on_the_interval_is_refused(tmp_path: Path) -> None:
    with pytest.raises((InvalidInput, PublishFailed), match="finite"):
        publish(Cliff(), store=tmp_path, name="cliff", calibration=np.ones((5, 1)), method="bosh3")
    assert contents(tmp_path) == {}


ROWS = np.random.default_rng(0).normal(size=(6, 2))
BAD: dict[str, tuple[dict[str, Any], str, str]] = {
    "one row as a vector": ({"calibration": ROWS[0]}, "calibration", r"rows \[n, D\], not .* shape \(2,\)"),
    "no rows": ({"calibration": ROWS[:0]}, "calibration", r"rows \[n, D\]"),
    "no columns": ({"calibration": ROWS[:, :0]}, "calibration", r"rows \[n, D\]"),
    "NaN row": ({"calibration": np.where(ROWS[4, 1] == ROWS, np.nan, ROWS)}, r"calibration[4][1]", "finite"),
    "too few contexts": (
        {"calibration_context": ROWS[:3]},
        "calibration_context",
        r"\[6, C\], one row for each",
    ),
    "infinite context": (
        {"calibration_context": np.full((6, 1), np.inf)},
        "calibration_context[0][0]",
        "finite",
    ),
    "context for a field without": (
        {"calibration_context": ROWS},
        "field",
        "made for 2 features and 0 context",
    ),
    "wrong width": ({"calibration": np.ones((5, 3))}, "field", "made for 2 features .* the rows have 3"),
    "too many names": ({"features": ["a", "b", "c"]}, "features", "must be 2 different names"),
    "equal names": ({"features": ["a", "a"]}, "features", "must be 2 different names"),
    "context name of a feature": (
        {
            "field": MLP(2, (16,), 1),
            "calibration_context": ROWS[:, :1],
            "features": ["a", "b"],
            "context_features": ["b"],
        },
        "context_features",
        "different",
    ),
    "unknown method": ({"method": "dopri6"}, "method", "one of dopri5, tsit5, bosh3, dopri8, not 'dopri6'"),
    "fixed-step method": ({"method": "rk4"}, "method", "one of dopri5"),
    "name with a slash": ({"name": "../up"}, "name", "is not a model name"),
    "upper-case name": ({"name": "Moons"}, "name", "is not a model name"),
    "no interval": ({"t_base": 1.0, "t_data": 1.0}, "t_data", "different"),
    "endless interval": ({"t_data": math.inf}, "t_data", "finite"),
    "transform of another width": ({"transform": Log(3, [0])}, "transform", "3 features, the rows have 2"),
    "no probes": ({"probes": 0}, "probes", "at least 1"),
    "tolerance of nothing": ({"tolerance": 0.0}, "tolerance", "positive"),
    "negative tolerance": ({"tolerance": -1e-3}, "tolerance", "positive"),
    "NaN tolerance": ({"tolerance": math.nan}, "tolerance", "positive"),
}


@pytest.mark.parametrize("name", BAD)
def test_arguments_that_do_not_fit_are_refused_before_any_work(name: str, tmp_path: Path) -> None:
    change, where, message = BAD[name]

    def advance(what: str) -> None:
        assert not what.startswith(("program", "reference", "tolerance")), "minutes of work were begun"

    arguments = {
        "field": MLP(2, (16,)),
        "store": tmp_path,
        "name": "new",
        "calibration": ROWS,
        "advance": advance,
    }
    with pytest.raises(InvalidInput, match=message) as raised:
        publish(**(arguments | change))
    assert raised.value.where == where
    assert contents(tmp_path) == {}
