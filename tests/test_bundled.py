"""What is promised of every bundled model, held to by the models themselves."""

from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from pushforward.engine.engine import Engine
from pushforward.engine.request import Answer, Chunk, Kind, Status
from pushforward.loading import LoadedModel, default_chunk, load_model, run_chunk
from pushforward.noise import standard_normal
from pushforward.store.catalog import Catalog

STORE = Path(__file__).resolve().parents[1] / "model_store"
NAMES = Catalog(STORE).models()
PLANE = [name for name in NAMES if Catalog(STORE).resolve(name).manifest.dim == 2]


@cache
def model(name: str) -> LoadedModel:
    return load_model(Catalog(STORE).resolve(name).folder)


def context(of: LoadedModel, rows: int) -> np.ndarray | None:
    golden = of.tensors("golden.safetensors").get("context")
    return None if golden is None else golden[np.arange(rows) % len(golden)]


def samples(of: LoadedModel, rows: int, seed: int = 1) -> Answer:
    noise = standard_normal(seed, 0, rows, of.manifest.dim)
    chunk = default_chunk(of.manifest.solver, noise, context(of, rows))
    return run_chunk(of, replace(chunk, kind=Kind.DECODE))


def test_there_are_at_least_eight_and_one_is_conditional() -> None:
    manifests = [model(name).manifest for name in NAMES]
    assert len(manifests) >= 8
    assert any(m.context_dim for m in manifests)
    assert all(m.divergence == "closed_form" for m in manifests)


@pytest.mark.parametrize("name", NAMES)
def test_the_certificate_meets_the_bound(name: str) -> None:
    certificate = model(name).manifest.certificate
    assert certificate.rows >= 1000
    assert certificate.share_within_1e3 >= 0.999


@pytest.mark.parametrize("name", NAMES)
def test_log_density_is_within_a_thousandth_of_a_tight_float64_solve(name: str) -> None:
    """The certificate, measured again on rows that publishing never saw."""
    of = model(name)
    rows = 200
    served = samples(of, rows, seed=2)
    chunk = default_chunk(of.manifest.solver, served.value, context(of, rows))
    tight = replace(chunk, precision="float64", rtol=1e-9, atol=1e-9, logp_atol=1e-9)
    error = np.abs(run_chunk(of, chunk).log_density - run_chunk(of, tight).log_density)
    assert np.quantile(error, 0.99) < 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_a_sample_encodes_and_decodes_to_itself(name: str) -> None:
    of = model(name)
    rows = 50
    drawn = samples(of, rows)
    assert (drawn.status == Status.OK).all()
    chunk = default_chunk(of.manifest.solver, drawn.value, context(of, rows))
    chunk = replace(chunk, precision="float64", rtol=1e-8, atol=1e-8)
    encoded = run_chunk(of, chunk)
    decoded = run_chunk(of, replace(chunk, rows=encoded.value, kind=Kind.DECODE))
    scale = drawn.value.std(0)
    assert np.abs((decoded.value - drawn.value) / np.where(scale > 0, scale, 1)).max() < 1e-4
    assert np.abs(decoded.log_density - encoded.log_density).max() < 1e-4


@pytest.mark.parametrize("name", PLANE)
def test_a_density_on_the_plane_integrates_to_one(name: str) -> None:
    """The trapezium rule over the samples' range and a margin; it converges fast for a smooth density."""
    of = model(name)
    points = 120
    drawn = samples(of, 500).value
    margin = 0.2 * (drawn.max(0) - drawn.min(0))
    low, high = drawn.min(0) - margin, drawn.max(0) + margin
    axes = [np.linspace(a, b, points) for a, b in zip(low, high, strict=True)]
    grid = np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 2)
    given = context(of, 1)
    given = None if given is None else np.broadcast_to(given, (len(grid), given.shape[1]))
    answer = run_chunk(of, default_chunk(of.manifest.solver, grid, given), slots=1024)
    cell = np.prod([axis[1] - axis[0] for axis in axes])
    total = np.exp(np.where(answer.status == Status.OK, answer.log_density, -np.inf)).sum() * cell
    assert total == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("precision", ["float32", "float64"])
@pytest.mark.parametrize(("kind", "density"), [(Kind.ENCODE, True), (Kind.DECODE, False)])
@pytest.mark.parametrize("name", NAMES)
def test_bits_do_not_depend_on_the_company(name: str, kind: Kind, density: bool, precision: str) -> None:
    """Rows alone, and among rows that join at random, blow up, never converge, or are cancelled."""
    of, rows = model(name), 8
    start = samples(of, rows).value if kind is Kind.ENCODE else standard_normal(3, 0, rows, of.manifest.dim)
    chunk = default_chunk(of.manifest.solver, start, context(of, rows))
    chunk = replace(chunk, kind=kind, density=density, precision=precision)

    def part(number: int, first: int, end: int) -> Chunk:
        given = None if chunk.context is None else chunk.context[first:end]
        return replace(chunk, id=str(number), rows=start[first:end], context=given)

    alone = [run_chunk(of, part(row, row, row + 1)) for row in range(rows)]
    rng = np.random.default_rng(0)
    engine = Engine(lambda name, version: of, slots=37)
    given = None if chunk.context is None else chunk.context[:1]
    mates = {
        "poison": replace(chunk, rows=np.full_like(start[:1], np.nan), context=given),
        "endless": replace(chunk, rows=start[:1], context=given, rtol=1e-13, atol=1e-13, max_steps=40),
        "far": replace(chunk, rows=1e6 * np.ones_like(start[:1]), context=given),
        "cancelled": chunk,
    }
    for name_, mate in mates.items():
        engine.submit(replace(mate, id=name_))
    answers: dict[str, Answer] = {}
    for row in rng.permutation(rows):
        engine.submit(part(int(row), int(row), int(row) + 1))
        for _ in range(rng.integers(0, 4)):
            answers |= {answer.id: answer for answer in engine.step()}
        if row == 3:
            engine.cancel("cancelled")
    while engine.busy:
        answers |= {answer.id: answer for answer in engine.step()}
    assert engine.running == engine.waiting == 0
    for row, expected in enumerate(alone):
        got = answers[str(row)]
        assert got.value.tobytes() == expected.value.tobytes()
        assert got.log_density.tobytes() == expected.log_density.tobytes()
        assert got.steps.tobytes() == expected.steps.tobytes()
