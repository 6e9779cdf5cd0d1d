"""From a version's folder to a model that may be served: verified, and proven on this machine.

A version is loaded in three steps: every file's hash is compared with the manifest; the programs are given to
ONNX Runtime; and the golden rows are run through the very programs that will serve, from the data to the base
and back.  A version that does not reproduce its reference answers here is refused, and so is one whose rows
would depend on their batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load as load_safetensors

from pushforward.engine.engine import Engine, Model
from pushforward.engine.request import Answer, Array, Chunk, Kind
from pushforward.errors import InvalidModel, brief
from pushforward.programs.runtime import Program
from pushforward.store.catalog import Catalog
from pushforward.store.manifest import Manifest, Solver

__all__ = [
    "GOLDEN_TOLERANCE",
    "LoadedModel",
    "Proof",
    "default_chunk",
    "load_model",
    "run_chunk",
    "sample_chunk",
]

# What an answer may miss its reference by beyond what it missed at publishing.
GOLDEN_TOLERANCE = 1e-3  # nats, for a log-density
SAMPLE_TOLERANCE = 5e-3  # for a feature of a sample; in units of its standard deviation over the golden rows
STAGE_TOLERANCE = 1e-3  # for f(t, z) as the start programs compute it, in units of its largest value
# Paddings that are tried until a row's bits do not depend on its batch.  A GPU's kernels change with the size
# of the batch, so there it has one size only, as long as slots and chunks are no larger.
BATCH_MULTIPLES = {"cpu": (1, 8, 32), "cuda": (256,)}


@dataclass(frozen=True, eq=False)
class Proof:
    """A golden row and what it gave when its version was loaded: it must give the same bits ever after."""

    chunk: Chunk
    answer: Answer

    def holds(self, answer: Answer) -> bool:
        """Whether an answer to the chunk is the one it gave then, to the bit."""
        return _same(answer, self.answer, slice(None))


class LoadedModel:
    """A version whose programs are loaded when they are first needed.

    Args:
        manifest: what the version says it is.
        folder: where it lies.
        device: where its programs run.

    Attributes:
        proof: shows later that the version still is what it was; ``load_model`` sets it.
        proofs: how often it was asked for.
    """

    proof: Proof
    proofs = 0

    def __init__(self, manifest: Manifest, folder: Path, device: str = "cpu") -> None:
        self.manifest, self.folder, self.device = manifest, folder, device
        self.t_base, self.t_data = manifest.t_base, manifest.t_data
        self.stages = manifest.method_stages
        self.dt_data_to_base = manifest.solver.dt_data_to_base
        self.dt_base_to_data = manifest.solver.dt_base_to_data
        self._programs: dict[str, Program] = {}
        self._held: dict[str, bytes] = {}
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
            data = self._held[path] if path in self._held else self.read(path)
            self._programs[name] = Program(data, f"{self.title}/{path}", self._multiple, self.device)
            self._held.pop(path, None)
        return self._programs[name]

    def hold(self) -> None:
        """Read the programs that were not needed yet, so that the store is not needed any more."""
        paths = [path for name, path in self.manifest.programs.items() if name not in self._programs]
        self._held = {path: self.read(path) for path in paths}

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


def load_model(folder: Path, device: str = "cpu") -> LoadedModel:
    """Load, verify and prove the version in ``folder`` on a device.

    Raises:
        InvalidModel: naming the file that is wrong, or by how much the golden rows miss their reference.
    """
    model = LoadedModel(Catalog.verify(folder), folder, device)
    file = f"{model.title}/golden.safetensors"
    golden = model.tensors("golden.safetensors")
    try:
        _prove(model, golden)
    except InvalidModel:
        raise
    except Exception as error:  # whatever ONNX Runtime says about shapes and types
        raise InvalidModel(f"{file} does not fit the model: {brief(error)}.", file=file) from None
    model.hold()
    return model


def _prove(model: LoadedModel, golden: dict[str, Array]) -> None:
    """Run the golden rows both ways and compare.

    Raises:
        InvalidModel: when an answer misses its reference.
        Exception: when the rows do not fit the model.
    """
    x, z, context, expected = golden["x"], golden["z"], golden.get("context"), golden["log_density"]
    if not len(x) == len(z) == len(golden["decoded"]) == len(expected) == len(golden["served"]) > 0:
        raise ValueError("x, z, decoded, log_density and served must have as many rows, and at least one")
    inside = np.isfinite(z).all(1)
    if not inside.any() or (inside != np.isfinite(expected)).any():
        raise ValueError("z must be finite where log_density is, and that somewhere")
    there = default_chunk(model.manifest.solver, x, context)
    back = sample_chunk(model.manifest.solver, z[inside], None if context is None else context[inside])
    density, sample = _independent(model, [there, back])

    missed = _distance(density.log_density, expected)
    allowed = _distance(golden["served"], expected) + GOLDEN_TOLERANCE
    if (row := _beyond(missed, allowed)) is not None:
        raise _unlike_itself(
            model, row, f"log-density {density.log_density[row]:.6g}", f"{expected[row]:.6g}"
        )
    numbers, x, decoded = np.flatnonzero(inside), x[inside], golden["decoded"][inside]
    spread = x.std(0)
    allowed = _distance(decoded, x) + SAMPLE_TOLERANCE * np.where(spread > 0, spread, 1.0)
    if (row := _beyond(_distance(sample.value, x), allowed)) is not None:
        column = int(np.argmin(_distance(sample.value[row], x[row]) <= allowed[row]))
        raise _unlike_itself(
            model,
            int(numbers[row]),
            f"{sample.value[row, column]:.6g} as feature {column} of its sample",
            f"{x[row, column]:.6g}",
        )
    # A wrong first stage shows in no answer: the first step is rejected until it is too short to matter.
    one, other = (_first_stage(model, kind, back) for kind in ("density", "sample"))
    if (row := _beyond(_distance(one, other), STAGE_TOLERANCE * np.abs(one).max(initial=1e-6))) is not None:
        raise _unlike_itself(model, int(numbers[row]), f"first stage {other[row]}", f"{one[row]}")
    model.proof = _proof(model, there, numbers[:1])


def _proof(model: LoadedModel, golden: Chunk, row: NDArray[np.intp]) -> Proof:
    context = None if golden.context is None else golden.context[row]
    manifest = model.manifest
    chunk = replace(
        golden, model=manifest.name, version=manifest.version, rows=golden.rows[row], context=context
    )
    return Proof(chunk, run_chunk(model, chunk))


def _first_stage(model: LoadedModel, kind: str, chunk: Chunk) -> Array:
    """f(t, z) of rows at the base as the start program of densities or of samples computes it, [n, D]."""
    t = np.full((len(chunk.rows), 1), model.t_base)
    context = [] if chunk.context is None else [chunk.context]
    (state,) = model.program(f"start_{kind}_{chunk.precision}")(t, chunk.rows, *context)
    dim = chunk.rows.shape[1]
    return state[:, dim : 2 * dim].astype(np.float64)


def _beyond(missed: Array, allowed: Array | np.floating) -> int | None:
    """The first row where ``missed`` exceeds ``allowed``; NaN exceeds all, and infinity allows nothing."""
    bad = ~(missed <= allowed) | ~np.isfinite(allowed)
    rows = np.flatnonzero(bad.any(1) if bad.ndim == 2 else bad)
    return int(rows[0]) if rows.size else None


def _unlike_itself(model: LoadedModel, row: int, found: str, expected: str) -> InvalidModel:
    return InvalidModel(
        f"{model.title} does not reproduce itself on this machine: golden row {row} has {found}, "
        f"its reference is {expected}. Publish the model again on a machine like this one.",
        file=f"{model.title}/golden.safetensors",
    )


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


def sample_chunk(solver: Solver, z: Array, context: Array | None) -> Chunk:
    """The samples at base points with the defaults of a version, without their log-densities."""
    return replace(default_chunk(solver, z, context), kind=Kind.DECODE, density=False)


def _independent(model: LoadedModel, chunks: Sequence[Chunk]) -> list[Answer]:
    """The chunks' answers, with batches padded as far as it takes to make rows independent."""
    multiples = BATCH_MULTIPLES[model.device.partition(":")[0]]
    for multiple in multiples:
        model.pad(multiple)
        answers = [run_chunk(model, chunk) for chunk in chunks]
        if all(_alike(model, chunk, answer) for chunk, answer in zip(chunks, answers, strict=True)):
            return answers
    raise InvalidModel(
        f"{model.title}: here its rows depend on their batch, even padded to {multiples[-1]}. "
        "Layers whose width is a multiple of 16 and whose sums are matrix products avoid that.",
        file=f"{model.title}/{model.manifest.programs['encode']}",
    )


def _alike(model: LoadedModel, chunk: Chunk, together: Answer) -> bool:
    """Whether the rows' answers have the same bits in small batches, and one of them alone."""
    one = slice(len(chunk.rows) // 2, len(chunk.rows) // 2 + 1)
    context = None if chunk.context is None else chunk.context[one]
    apart = run_chunk(model, chunk, slots=3)
    alone = run_chunk(model, replace(chunk, rows=chunk.rows[one], context=context))
    return _same(together, apart, slice(None)) and _same(alone, together, one)


def _same(some: Answer, all_: Answer, rows: slice) -> bool:
    return (
        some.log_density.tobytes() == all_.log_density[rows].tobytes()
        and some.value.tobytes() == all_.value[rows].tobytes()
        and some.steps.tobytes() == all_.steps[rows].tobytes()
    )
