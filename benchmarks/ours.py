"""Pushforward's side: the benchmark networks published, loaded and solved as a server does it."""

from __future__ import annotations

import atexit
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import numpy as np

from networks import Network
from networks import load as load_network
from pushforward.engine.engine import Engine
from pushforward.engine.request import Answer, Chunk, Kind
from pushforward.loading import LoadedModel, load_model
from pushforward.publish import publish


@cache
def store() -> Path:
    """A store that lives as long as this process."""
    folder = tempfile.TemporaryDirectory(prefix="pushforward-benchmark-")
    atexit.register(folder.cleanup)
    return Path(folder.name)


def name(dim: int) -> str:
    """What the network of a dimension is called in the store."""
    return f"benchmark-{dim}"


@cache
def published(dim: int) -> Path:
    """The folder of the network's version, published at first use, with the defaults that the rivals have."""
    network = load_network(dim)
    manifest = publish(
        network.field(), store=store(), name=name(dim), calibration=network.rows, tolerance=1e-5
    )
    return store() / manifest.name / str(manifest.version)


@cache
def model(dim: int) -> LoadedModel:
    """The network as a worker loads it."""
    return load_model(published(dim))


def logp_ratio(dim: int) -> float:
    """logp_atol per atol, as publishing chose it; requests at other tolerances keep it."""
    solver = model(dim).manifest.solver
    return solver.logp_atol / solver.atol


def chunk(rows: np.ndarray, tolerance: float, logp_atol: float, density: bool = True) -> Chunk:
    """Rows to integrate from the data to the base."""
    return Chunk(
        id="",
        model="",
        version=1,
        kind=Kind.ENCODE,
        density=density,
        rows=np.asarray(rows, np.float64),
        rtol=tolerance,
        atol=tolerance,
        logp_atol=logp_atol,
        max_steps=10_000,
    )


class Solver:
    """Solves rows on an engine that stays, one chunk at a time."""

    def __init__(self, network: Network, slots: int = 256) -> None:
        loaded = model(network.dim)
        self.engine = Engine(lambda name, version: loaded, slots=slots)
        self.ratio = logp_ratio(network.dim)

    def answer(self, chunk: Chunk) -> Answer:
        """Run the loop until the chunk is done."""
        self.engine.submit(chunk)
        while True:
            for answer in self.engine.step():
                return answer

    def __call__(self, rows: np.ndarray, tolerance: float) -> np.ndarray:
        """log p [n] of rows [n, D]."""
        return self.answer(chunk(rows, tolerance, tolerance * self.ratio)).log_density


@contextmanager
def onnx_seconds(loaded: LoadedModel) -> Iterator[list[float]]:
    """Measures the seconds spent inside ONNX Runtime by the programs of a model; the list holds their sum."""
    total = [0.0]

    class Timed:
        def __init__(self, session: object) -> None:
            self.run_session = session.run  # type: ignore[attr-defined]

        def run(self, outputs: object, feeds: object) -> object:
            start = time.perf_counter()
            result = self.run_session(outputs, feeds)
            total[0] += time.perf_counter() - start
            return result

    programs = [loaded.program(name) for name in loaded.manifest.programs]
    sessions = [program._session for program in programs]
    for program, session in zip(programs, sessions, strict=True):
        program._session = Timed(session)
    try:
        yield total
    finally:
        for program, session in zip(programs, sessions, strict=True):
            program._session = session
