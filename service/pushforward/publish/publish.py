"""Publish a trained field: from a torch module to an immutable, certified version in the store.

    from pushforward.publish import publish

    publish(field, store="model_store", name="moons", calibration=held_out_rows)

Everything happens in a folder beside the models; the last act gives the version its name, so that it is there
whole or not at all, whatever interrupts: see ``place``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from safetensors.numpy import save as save_arrays
from safetensors.torch import save as save_tensors
from torch import nn

from pushforward.errors import InvalidInput, PublishFailed
from pushforward.flows.fields import MLP, Hutchinson, Wrapped
from pushforward.flows.flow import Flow
from pushforward.flows.transforms import Standardize, Transform
from pushforward.loading import default_chunk, load_model, run_chunk, sample_chunk
from pushforward.programs.export import export_programs
from pushforward.publish.card import model_card
from pushforward.publish.certify import Draft, Rows, certify, gather
from pushforward.publish.place import place_at
from pushforward.publish.recognise import recognise
from pushforward.scoring.calibration import Calibration
from pushforward.solvers.solve import log_density
from pushforward.solvers.tableau import METHODS
from pushforward.store.manifest import MANIFEST, FileEntry, Manifest, Solver, check_name, sha256_file

__all__ = ["publish"]

Scalar = str | int | float | bool | None
GOLDEN_ROWS = 32


def publish(
    field: nn.Module,
    *,
    store: Path | str,
    name: str,
    calibration: ArrayLike,
    calibration_context: ArrayLike | None = None,
    transform: Transform | None = None,
    t_base: float = 0.0,
    t_data: float = 1.0,
    features: Sequence[str] | None = None,
    context_features: Sequence[str] | None = None,
    description: str = "",
    data: Mapping[str, Scalar] | None = None,
    metrics: Mapping[str, float] | None = None,
    training: Mapping[str, Scalar] | None = None,
    card: str = "",
    method: str = "dopri5",
    tolerance: float | None = None,
    probes: int | None = None,
    advance: Callable[[str], None] = lambda what: None,
) -> Manifest:
    """Publish a field as the next version of a model.

    Args:
        field: f(t, z) or f(t, z, c): one of ``pushforward.flows``, or any torch module that takes a scalar t
            and z [B, D], as torchdiffeq's fields do.  Perceptrons of one or two hidden layers are recognised
            and get the closed-form divergence; others are differentiated automatically, and must also take t
            [B, 1].
        store: folder of the model store, made if missing; or a URL such as s3://bucket/prefix.
        name: of the model.
        calibration: held-out raw rows x [n, D], which the fit never saw; they make the p-values and the
            certificate.
        calibration_context: their contexts [n, C], for a conditional field.
        transform: raw rows ↔ the field's coordinates; None when the field works on raw rows.
        t_base: time at which z is standard normal.
        t_data: time at which z is the (transformed) data.
        features: names of the columns; x0, x1 … when None.
        context_features: names of the context columns; c0, c1 … when None.
        description: a sentence for people.
        data: where the rows came from (source, licence …).
        metrics: measures of quality.
        training: how it was trained.
        card: further sections for the model card, Markdown.
        method: the Runge–Kutta method (``solvers.tableau.METHODS``).
        tolerance: rtol = atol, and a tenth of logp_atol; None picks the loosest that keeps log p within
            1e-3 nats for 99.9% of the rows.
        probes: estimate the divergence with this many Hutchinson probes instead of computing it; answers are
            marked.
        advance: told what is being done, for a progress display.

    Returns:
        The manifest of the new version.

    Raises:
        InvalidInput: when the arguments do not fit together; says which and how.
        PublishFailed: when the version misses its own checks or cannot be written.
        Conflict: when another publisher took the number, which only can be at a URL: publish again.
    """
    x, c = _checked(calibration, calibration_context)
    features = _names(features, "x", x.shape[1], "features")
    context_features = _names(context_features, "c", 0 if c is None else c.shape[1], "context_features")
    if method not in METHODS or not METHODS[method].adaptive:
        adaptive = ", ".join(m.name for m in METHODS.values() if m.adaptive)
        raise InvalidInput(f"method must be one of {adaptive}, not {method!r}", where="method")
    check_name(name)
    if set(features) & set(context_features):
        raise InvalidInput("context_features must be different from features", where="context_features")
    if transform is not None and transform.dim != x.shape[1]:
        raise InvalidInput(
            f"the transform is made for {transform.dim} features, the rows have {x.shape[1]}",
            where="transform",
        )
    if not (math.isfinite(t_base) and math.isfinite(t_data) and t_base != t_data):
        raise InvalidInput(
            f"t_base and t_data must be different finite times, not {t_base} and {t_data}", where="t_data"
        )
    if tolerance is not None and not tolerance > 0:
        raise InvalidInput(f"tolerance must be positive, not {tolerance}", where="tolerance")
    if probes is not None and probes < 1:
        raise InvalidInput(f"probes must be at least 1, not {probes}", where="probes")
    advance("reading the field")
    exact = recognise(field, x.shape[1], len(context_features))
    chosen = exact if probes is None else Hutchinson(exact, probes)
    identity = Standardize(torch.zeros(x.shape[1]), torch.ones(x.shape[1]))
    flow = Flow(chosen, transform or identity, t_base, t_data).cpu().eval()
    place = place_at(store)
    with place.staging() as staging:
        folder = staging / name / "draft"
        (folder / "programs").mkdir(parents=True)
        files = export_programs(
            flow, METHODS[method], folder / "programs", lambda what: advance(f"program {what}")
        )
        programs = {program: f"programs/{file}" for program, file in files.items()}
        stages, first = METHODS[method].stages, 0.05 * abs(t_data - t_base)
        draft = Draft(folder, programs, flow.t_base, flow.t_data, stages, first, first)
        rows = gather(draft, flow, x, c, advance)
        solver, certificate = certify(draft, rows, method, tolerance, advance)
        advance("calibrating")
        metrics = dict(metrics or {})
        if probes is not None:
            metrics["hutchinson_standard_error"] = _standard_error(
                Flow(exact, flow.transform, t_base, t_data), rows
            )
        served = run_chunk(draft, default_chunk(solver, x, c)).log_density
        if np.isnan(served).any():
            raise PublishFailed(
                f"{int(np.isnan(served).sum())} calibration rows have no log-density: solving them failed."
            )
        contents = {
            "weights.safetensors": _weights(flow),
            "golden.safetensors": _golden(draft, solver, rows),
            "MODEL_CARD.md": model_card(
                name,
                description,
                features,
                context_features,
                solver,
                certificate,
                metrics,
                data or {},
                training or {},
                card,
            ).encode(),
        }
        for file, content in contents.items():
            (folder / file).write_bytes(content)
        Calibration.from_rows(served, x).save(folder / "calibration.safetensors")
        names = sorted([*contents, "calibration.safetensors", *programs.values()])
        entries = {
            f: FileEntry(sha256=sha256_file(folder / f), bytes=(folder / f).stat().st_size) for f in names
        }
        with place.next_number(name) as number:
            manifest = Manifest(
                format_version=1,
                name=name,
                version=number,
                created=datetime.now(UTC).isoformat(timespec="seconds"),
                description=description,
                features=features,
                context_features=context_features,
                t_base=flow.t_base,
                t_data=flow.t_data,
                solver=solver,
                divergence=chosen.exactness,
                programs=programs,
                method_stages=stages,
                files=entries,
                certificate=certificate,
                calibration_rows=len(x),
                metrics=metrics,
                training=dict(training or {}),
                data=dict(data or {}),
            )
            (folder / MANIFEST).write_bytes(manifest.to_bytes())
            folder = folder.rename(folder.with_name(str(number)))
            advance("checking")
            load_model(folder)
            advance("writing")
            place.put(folder)
    return manifest


def _checked(
    calibration: ArrayLike, context: ArrayLike | None
) -> tuple[NDArray[np.float64], NDArray[np.float64] | None]:
    x = np.asarray(calibration, np.float64)
    if x.ndim != 2 or not x.size:
        raise InvalidInput(
            f"calibration must be rows [n, D], not an array of shape {x.shape}", where="calibration"
        )
    c = None if context is None else np.asarray(context, np.float64)
    if c is not None and (c.ndim != 2 or len(c) != len(x) or not c.shape[1]):
        raise InvalidInput(
            f"calibration_context must be [{len(x)}, C], one row for each of calibration, not {c.shape}",
            where="calibration_context",
        )
    for array, where in ((x, "calibration"), (c, "calibration_context")):
        if array is not None and not np.isfinite(array).all():
            row, column = np.argwhere(~np.isfinite(array))[0]
            raise InvalidInput(
                f"{where}[{row}][{column}] is not a finite number", where=f"{where}[{row}][{column}]"
            )
    return x, c


def _names(names: Sequence[str] | None, prefix: str, width: int, where: str) -> list[str]:
    if names is None:
        return [f"{prefix}{i}" for i in range(width)]
    if len(names) != width or len(set(names)) != width:
        raise InvalidInput(
            f"{where} must be {width} different names, one per column, not {list(names)}", where=where
        )
    return list(names)


def _standard_error(exact: Flow, rows: Rows) -> float:
    """Root mean square of estimate − exact log-density, nats: what a Hutchinson estimate is off by."""
    x, c, estimate = rows.first(200)
    value, _ = log_density(exact, torch.from_numpy(x), None if c is None else torch.from_numpy(c))
    return float(np.sqrt(np.nanmean((value.numpy() - estimate) ** 2)))


def _weights(flow: Flow) -> bytes:
    tensors = {name: tensor.detach().clone().contiguous() for name, tensor in flow.state_dict().items()}
    return save_tensors(tensors, {"architecture": json.dumps(architecture(flow.field))})


def architecture(field: nn.Module) -> dict[str, Scalar | list[int]]:
    """What is needed to build the field again before its weights are loaded; of foreign modules, a name."""
    if isinstance(field, MLP):
        return {
            "class": "MLP",
            "dim": field.dim,
            "hidden": list(field.hidden),
            "context_dim": field.context_dim,
            "activation": field.activation,
            "gate": field.gate,
            "time": type(field.time).__name__,
        }
    inner = field.module if isinstance(field, Wrapped) else field
    return {"class": type(inner).__qualname__}


def _golden(draft: Draft, solver: Solver, rows: Rows) -> bytes:
    """Rows with their references x, z and log p, and what the programs made of them: see ``loading``."""
    x, context, reference = rows.first(GOLDEN_ROWS)
    z = np.where(np.isfinite(reference)[:, None], rows.z[:GOLDEN_ROWS], np.nan)  # none outside the support
    arrays = {
        "x": x,
        "z": z,
        "log_density": reference,
        "served": run_chunk(draft, default_chunk(solver, x, context)).log_density,
        "decoded": run_chunk(draft, sample_chunk(solver, z, context)).value,
    }
    return save_arrays(arrays if context is None else {**arrays, "context": context})
