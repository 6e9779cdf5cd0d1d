"""A fixed set of requests, each with the answer it must get: the one it gets alone, from an idle engine."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pushforward.engine.request import ADVICE, Chunk, Kind, Status
from pushforward.loading import LoadedModel, load_model, run_chunk
from pushforward.noise import standard_normal
from pushforward.scoring.calibration import Calibration, flag

STORE = Path(__file__).resolve().parents[2] / "model_store"
SERVED = ("moons", "moons_by_side", "wine", "digits")

Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Template:
    """A request.

    Attributes:
        model: whom it is for.
        operation: the last part of its path.
        body: of the request.
        weight: how often it is sent, beside the others.
        poison: how the rows that fail do so.
        answers: version → what its answer has among others, solved alone and row by row.
    """

    model: str
    operation: str
    body: Mapping[str, Any]
    weight: float = 1.0
    poison: frozenset[Status] = frozenset()
    answers: dict[int, dict[str, Any]] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        """How many rows it has solved."""
        return int(self.body["n"]) if "n" in self.body else len(self.body.get("x") or self.body["z"])

    def right(self, answer: Mapping[str, Any]) -> bool:
        """Whether an answer of the server is, to the bit, the one of the version that it names."""
        expected = self.answers[answer["version"]]
        return all(name in answer and _text(answer[name]) == text for name, text in expected.items())


class Bank:
    """The requests, and the models that answer them alone.

    Args:
        store: a model store; of every model in it, the versions there now are solved.
    """

    def __init__(self, store: Path) -> None:
        self.templates = list(_templates(store))
        self._answers: dict[tuple[str, str], dict[Template, dict[str, str]]] = {}
        self.heavy = [each for each in self.templates if each.operation == "sample" and each.body["n"] >= 300]
        for manifest in store.glob("*/*/manifest.json"):
            self.learn(manifest.parent)

    def learn(self, folder: Path) -> None:
        """Have the answers of a version of a model, whether it is in the store or not yet."""
        manifest = json.loads((folder / "manifest.json").read_text())
        learnt = manifest["name"], json.dumps(manifest["files"])
        if learnt not in self._answers:  # versions of the same files differ in their number alone
            self._answers[learnt] = self._solve(folder)
        for template, answer in self._answers[learnt].items():
            template.answers[manifest["version"]] = answer | {"version": _text(manifest["version"])}

    def _solve(self, folder: Path) -> dict[Template, dict[str, str]]:
        model = load_model(folder)
        calibration = Calibration.load(folder / "calibration.safetensors")
        return {
            template: {key: _text(part) for key, part in _alone(template, model, calibration).items()}
            for template in self.templates
            if template.model == model.manifest.name
        }


def copy_models(store: Path, names: Iterable[str] = SERVED) -> None:
    """A store with bundled models."""
    for name in names:
        shutil.copytree(STORE / name, store / name)


def version_of(model: str, number: int, source: str, folder: Path) -> Path:
    """What ``source`` has learnt, as a further version of another bundled model: it gives other answers."""
    version = folder / model / str(number)
    shutil.copytree(STORE / source / "1", version)
    manifest = version / "manifest.json"  # which no hash covers
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"name": model, "version": number}))
    return version


def _templates(store: Path) -> Iterable[Template]:
    draw = np.random.default_rng(0)
    moons, wine, digits = (_held_out(store, name) for name in ("moons", "wine", "digits"))
    crowd = draw.normal(size=(300, 2)).tolist()
    far, near = [1e300, 0.0], moons[:2]
    yield Template("moons", "log_density", {"x": moons[:1]}, 6)
    yield Template("moons", "log_density", {"x": moons[1:18], "timeout_ms": 120_000}, 3)
    yield Template("moons", "log_density", {"x": crowd})
    yield Template("moons", "log_density", {"x": moons[:5], "precision": "float64"})
    yield Template("moons", "log_density", {"x": moons[3:7], "rtol": 1e-7, "atol": 1e-7, "logp_atol": 1e-6})
    yield Template("moons", "log_density", {"x": [*near, far, *near]}, 2, frozenset({Status.NONFINITE}))
    yield Template(
        "moons", "log_density", {"x": near, "max_steps": 3, "rtol": 1e-6}, 2, frozenset({Status.MAX_STEPS})
    )
    yield Template("moons", "anomaly", {"x": [*near, [3.0, 3.0]], "timeout_ms": 120_000}, 2)
    yield Template("moons", "transport", {"x": moons[:4]})
    yield Template("moons", "transport", {"z": crowd[:40], "return_log_density": True})
    yield Template("moons", "sample", {"n": 1, "seed": 1}, 3)
    yield Template("moons", "sample", {"n": 50, "seed": 2, "return_log_density": True, "temperature": 0.5})
    # the work of a hundred of the others, for clients that do not wait for it
    yield Template("moons", "sample", {"n": 300, "seed": 3, "precision": "float64", "rtol": 1e-9}, 0.1)
    yield Template("moons_by_side", "log_density", {"x": near, "context": [[1.0]]}, 2)
    yield Template("moons_by_side", "log_density", {"x": crowd[:4], "context": [[-1.0], [1.0], [0.0], [1.0]]})
    yield Template("moons_by_side", "sample", {"n": 30, "seed": 4, "context": [[-1.0]]})
    yield Template("wine", "log_density", {"x": wine[:3]}, 3)
    yield Template(
        "wine", "anomaly", {"x": [*wine[3:8], [1e300] * len(wine[0])]}, 2, frozenset({Status.NONFINITE})
    )
    yield Template("wine", "transport", {"z": draw.normal(size=(5, len(wine[0]))).tolist()})
    yield Template("digits", "log_density", {"x": digits[:2]}, 0.3)


def _held_out(store: Path, name: str) -> list[list[float]]:
    return load_model(store / name / "1").tensors("golden.safetensors")["x"].tolist()


def _alone(template: Template, model: LoadedModel, calibration: Calibration) -> dict[str, Any]:
    """What the server's answer must have, each row solved with no other beside it."""
    solver, body = model.manifest.solver, template.body
    if template.operation == "sample":
        noise = standard_normal(body["seed"], 0, body["n"], model.manifest.dim)
        kind, rows = Kind.DECODE, noise * body.get("temperature", 1.0)
    else:
        kind = Kind.ENCODE if "x" in body else Kind.DECODE
        rows = np.array(body["x"] if "x" in body else body["z"])
    context = np.array(body["context"]) if "context" in body else None
    density = template.operation in ("log_density", "anomaly") or body.get("return_log_density", False)
    chunk = Chunk(
        id="alone",
        model=template.model,
        version=model.manifest.version,
        kind=kind,
        density=density,
        rows=rows,
        context=None if context is None else np.broadcast_to(context, (len(rows), context.shape[1])),
        rtol=body.get("rtol", solver.rtol),
        atol=body.get("atol", solver.atol),
        logp_atol=body.get("logp_atol", solver.logp_atol),
        max_steps=body.get("max_steps", solver.max_steps),
        precision=body.get("precision", solver.precision),
    )
    answer = run_chunk(model, chunk, slots=1)
    statuses = [Status(value) for value in answer.status.tolist()]
    assert set(statuses) - {Status.OK} == template.poison, (statuses, template)
    expected: dict[str, Any] = {
        "model": template.model,
        "version": model.manifest.version,
        "status": [status.name.lower() for status in statuses],
        "failures": [
            {"row": row, "status": status.name.lower(), "detail": ADVICE[status], "t": answer.t[row]}
            for row, status in enumerate(statuses)
            if status is not Status.OK
        ],
        "steps": answer.steps.tolist(),
        "nfe": answer.nfe.tolist(),
    }
    if density:
        expected["log_density"] = _numbers(answer.log_density)
    if template.operation in ("sample", "transport"):
        points = zip(answer.value.tolist(), statuses, strict=True)
        expected["x" if kind is Kind.DECODE else "z"] = [p if s is Status.OK else None for p, s in points]
    if template.operation == "anomaly":
        p = calibration.p_values(answer.log_density)
        flags = zip(flag(p, 0.01).tolist(), statuses, strict=True)
        expected |= {"score": _numbers(-answer.log_density), "p_value": _numbers(p)}
        expected["is_anomaly"] = [anomaly if s is Status.OK else None for anomaly, s in flags]
    return expected


def _numbers(values: Floats) -> list[float | None]:
    return [value if np.isfinite(value) else None for value in values.tolist()]


def _text(part: Any) -> str:
    """Equal texts are equal bits: shortest digits that read back as the number, with the sign of a zero."""
    return json.dumps(part, sort_keys=True)
