"""From a version's folder to a model that may be served: verified, and proven on this machine.

A version is loaded in three steps: every file's hash is compared with the manifest; the programs are given to
ONNX Runtime; and the golden rows are run through the very programs that will serve.  A version that does not
reproduce its reference answers here is refused, and so is one whose rows would depend on their batch.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load as load_safetensors

from pushforward.engine.engine import Engine, Model
from pushforward.engine.request import Answer, Array, Chunk, Kind
from pushforward.errors import InvalidModel
from pushforward.programs.runtime import Program
from pushforward.store.catalog import Catalog
from pushforward.store.manifest import Manifest, Solver

__all__ = ["GOLDEN_TOLERANCE", "LoadedModel", "default_chunk", "load_model", "run_chunk"]

GOLDEN_TOLERANCE = 1e-3  # nats by which an answer may miss its reference further than it did at publishing
BATCH_MULTIPLES = (1, 8, 32)  # paddings that are tried until a row's bits do not depend on its batch


class LoadedModel:
    """A version whose programs are loaded when they are first needed.

    Args:
        manifest: what the version says it is.
        folder: where it lies.
    """

    def __init__(self, manifest: Manifest, folder: Path) -> None:
        self.manifest, self.folder = manifest, folder
        self.t_base, self.t_data = manifest.t_base, manifest.t_data
        self.stages = manifest.method_stages
        self.dt_data_to_base = manifest.solver.dt_data_to_base
        self.dt_base_to_data = manifest.solver.dt_base_to_data
        self._programs: dict[str, Program] = {}
        self._multiple = 1

    def pad(self, multiple: int) -> None:
        """Pad the batches of all its programs to a multiple of this."""
        self._multiple = multiple
        for program in self._programs.values():
            program.multiple = multiple

    @property
    def title(self) -> str:
        """Name and version, for messages."""
        return f"{self.manifest.name}/{self.manifest.version}"

    def program(self, name: str) -> Program:
        """A program of the version, loaded when first asked for."""
        if name not in self._programs:
            path = self.manifest.programs.get(name)
            if path is None:
                has = ", ".join(sorted(self.manifest.programs))
                raise InvalidModel(
                    f"{self.title} has no program {name}; it has {has}.", file=f"{self.title}/{name}"
                )
            self._programs[name] = Program(self.read(path), f"{self.title}/{path}", self._multiple)
        return self._programs[name]

    def read(self, path: str) -> bytes:
        """The bytes of a file of the version, if they still have the hash of the manifest."""
        try:
            data = (self.folder / path).read_bytes()
        except OSError as error:
            file = f"{self.title}/{path}"
            raise InvalidModel(f"{file} cannot be read: {error.strerror}.", file=file) from None
        if hashlib.sha256(data).hexdigest() != self.manifest.files[path].sha256:
            file = f"{self.title}/{path}"
            raise InvalidModel(f"{file} was changed: its SHA-256 is not that of its manifest.", file=file)
        return data

    def tensors(self, path: str) -> dict[str, NDArray[np.float64]]:
        """The arrays of a safetensors file of the version."""
        try:
            return load_safetensors(self.read(path))
        except SafetensorError as error:
            file = f"{self.title}/{path}"
            raise InvalidModel(f"{file} is not a safetensors file: {error}.", file=file) from None


def load_model(folder: Path) -> LoadedModel:
    """Load, verify and prove the version in ``folder``.

    Raises:
        InvalidModel: naming the file that is wrong, or by how much the golden rows miss their reference.
    """
    model = LoadedModel(Catalog.verify(folder), folder)
    golden = model.tensors("golden.safetensors")
    try:
        if not len(golden["x"]) == len(golden["log_density"]) == len(golden["served"]) > 0:
            raise ValueError("x, log_density and served must have as many rows, and at least one")
        answer = _independent(model, golden)
        missed = _distance(answer.log_density, golden["log_density"])
        allowed = _distance(golden["served"], golden["log_density"]) + GOLDEN_TOLERANCE
    except InvalidModel:
        raise
    except Exception as error:  # whatever ONNX Runtime says about shapes and types
        file = f"{model.title}/golden.safetensors"
        raise InvalidModel(f"{file} does not fit the model: {error}.", file=file) from None
    if not (missed <= allowed).all() or not np.isfinite(allowed).all():  # NaN misses
        row = int(np.argmin(missed <= allowed))
        raise InvalidModel(
            f"{model.title} does not reproduce itself on this machine: golden row {row} has log-density "
            f"{answer.log_density[row]:.6g}, its reference is {golden['log_density'][row]:.6g}. "
            "Publish the model again on a machine like this one.",
            file=f"{model.title}/golden.safetensors",
        )
    return model


def _distance(some: Array, others: Array) -> Array:
    """|some − others|, 0 where both are −∞."""
    with np.errstate(invalid="ignore"):
        return np.where(some == others, 0.0, np.abs(some - others))


def run_chunk(model: Model, chunk: Chunk, slots: int = 256) -> Answer:
    """Solve one chunk on an engine of its own."""
    engine = Engine(lambda name, version: model, slots=slots)
    engine.submit(chunk)
    while True:
        for answer in engine.step():
            return answer


def default_chunk(solver: Solver, x: Array, context: Array | None) -> Chunk:
    """The log-density of rows with the defaults of a version."""
    return Chunk(
        id="default",
        model="",
        version=0,
        kind=Kind.ENCODE,
        density=True,
        rows=x,
        context=context,
        rtol=solver.rtol,
        atol=solver.atol,
        logp_atol=solver.logp_atol,
        max_steps=solver.max_steps,
        precision=solver.precision,
    )


def _independent(model: LoadedModel, golden: dict[str, NDArray[np.float64]]) -> Answer:
    """The golden rows' answers, with batches padded as far as it takes to make rows independent."""
    x, context, solver = golden["x"], golden.get("context"), model.manifest.solver
    few = slice(len(x) // 2, len(x) // 2 + 1)
    for multiple in BATCH_MULTIPLES:
        model.pad(multiple)
        together = run_chunk(model, default_chunk(solver, x, context))
        apart = run_chunk(model, default_chunk(solver, x, context), slots=3)
        alone = run_chunk(model, default_chunk(solver, x[few], None if context is None else context[few]))
        if _same(together, apart, slice(None)) and _same(alone, together, few):
            return together
    raise InvalidModel(
        f"{model.title}: here its rows depend on their batch, even padded to {BATCH_MULTIPLES[-1]}. "
        "Layers whose width is a multiple of 16 and whose sums are matrix products avoid that.",
        file=f"{model.title}/{model.manifest.programs['encode']}",
    )


def _same(some: Answer, all_: Answer, rows: slice) -> bool:
    return (
        some.log_density.tobytes() == all_.log_density[rows].tobytes()
        and some.value.tobytes() == all_.value[rows].tobytes()
        and some.steps.tobytes() == all_.steps[rows].tobytes()
    )
