"""The operations of the HTTP API: from a checked request, by the data plane, to the content of its answer."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson

from pushforward import inputs
from pushforward.api.schemas import AnomalyRequest, DensityRequest, SampleRequest, TransportRequest
from pushforward.api.wire import Call
from pushforward.dataplane.plane import Dataplane, Model
from pushforward.engine.request import ADVICE, Kind, Status
from pushforward.errors import InvalidInput, InvalidModel, Unavailable
from pushforward.keys import Keyring
from pushforward.messages import Result
from pushforward.noise import fresh_seed

__all__ = ["Routes"]

Floats = npt.NDArray[np.float64]

_STATUS = {status.value: status.name.lower() for status in Status}
_OK = bytes([Status.OK])
_PIECE = 1 << 15  # numbers written as JSON before the event loop gets a turn


class Routes:
    """The operations.

    Args:
        plane: answers them.
        keyring: who may ask; None when anyone may.
    """

    def __init__(self, plane: Dataplane, keyring: Keyring | None = None) -> None:
        self._plane = plane
        self._keyring = keyring

    async def log_density(self, call: Call, query: DensityRequest) -> Any:
        """Log-densities of rows."""
        model = self._model(call)
        result = await self._plane.density(
            model, _rows(model, query), _context(model, query), query, call.ticket
        )
        return _solved(model, result) | _densities(model, result)

    async def anomaly(self, call: Call, query: AnomalyRequest) -> Any:
        """Anomaly scores of rows: score, p-value, flag and attributions."""
        if query.alpha is not None and query.fdr is not None:
            raise InvalidInput(
                "Give alpha or fdr, not both: they are two ways to choose what is flagged.", where="fdr"
            )
        alpha = None if query.fdr is not None else query.alpha or 0.01
        model = self._model(call)
        scores = await self._plane.score(
            model,
            _rows(model, query),
            _context(model, query),
            query,
            call.ticket,
            alpha=alpha or 0.01,
            two_sided=query.two_sided,
            fdr=query.fdr,
            explain=query.explain,
        )
        result = scores.result
        answered = ~np.isnan(scores.p_value)
        flags = scores.is_anomaly.tolist()
        if not answered.all():
            flags = [flag if known else None for flag, known in zip(flags, answered.tolist(), strict=True)]
        content = _solved(model, result) | _densities(model, result)
        content |= {
            "score": -result.log_density,
            "p_value": scores.p_value,
            "is_anomaly": flags,
            "alpha": alpha,
            "fdr": query.fdr,
            "smallest_p_value": scores.smallest_p_value,
        }
        if scores.attributions is not None:
            content |= {
                "features": model.manifest.features,
                "attributions": await _numbers(scores.attributions),
            }
        return content

    async def sample(self, call: Call, query: SampleRequest) -> Any:
        """Samples."""
        model = self._model(call)
        seed = fresh_seed() if query.seed is None else query.seed
        result = await self._plane.sample(
            model,
            query.n,
            seed,
            _context(model, query),
            query,
            call.ticket,
            temperature=query.temperature,
            density=query.return_log_density,
        )
        content = _solved(model, result)
        content |= {"seed": seed, "features": model.manifest.features, "x": await _points(result)}
        if query.return_log_density:
            content["log_density"] = result.log_density
        return content

    async def transport(self, call: Call, query: TransportRequest) -> Any:
        """Points carried from data to base or back, or followed on their way."""
        model = self._model(call)
        given = [name for name in ("x", "rows", "z") if getattr(query, name) is not None]
        if len(given) != 1:
            raise InvalidInput(
                f"Give one of x, rows and z; this gives {' and '.join(given) or 'none of them'}."
            )
        if query.z is not None:
            names = [f"z{number}" for number in range(model.manifest.dim)]
            kind, start = Kind.DECODE, inputs.from_lists(query.z, names, "z")
        else:
            kind, start = Kind.ENCODE, _rows(model, query)
        context = _context(model, query)
        if query.times is not None:
            if query.return_log_density:
                raise InvalidInput(
                    "There is no log-density on the way: leave out times or return_log_density."
                )
            steps = await self._plane.path(model, kind, start, query.times, context, query, call.ticket)
            return await _path(model, query.times, steps)
        result = await self._plane.transport(
            model, kind, start, context, query, call.ticket, density=query.return_log_density
        )
        content = _solved(model, result)
        content["x" if kind is Kind.DECODE else "z"] = await _points(result)
        if query.return_log_density:
            content["log_density"] = result.log_density
        return content

    async def models(self, call: Call, _: None) -> Any:
        """All models of the store."""
        summaries = []
        for name in self._plane.catalog.models():
            try:
                summaries.append(self._summary(self._plane.model(name)))
            except InvalidModel as fault:
                versions = [
                    {"version": number, "labels": [], **self._state(name, number)}
                    for number in self._plane.catalog.versions(name)
                ]
                summaries.append(
                    {
                        "name": name,
                        "version": None,
                        "versions": versions,
                        "features": [],
                        "context_features": [],
                        "description": "",
                        "fault": fault.message,
                    }
                )
        return {"models": summaries}

    async def model(self, call: Call, _: None) -> Any:
        """One version of a model, the default unless one is named."""
        model = self._model(call)
        manifest = model.manifest
        return self._summary(model) | {
            "version": manifest.version,
            "created": manifest.created,
            "exact": manifest.exact,
            "divergence": manifest.divergence,
            "t_base": manifest.t_base,
            "t_data": manifest.t_data,
            "solver": manifest.solver.model_dump(),
            "certificate": manifest.certificate.model_dump(),
            "calibration_rows": manifest.calibration_rows,
            "smallest_p_value": 1 / (manifest.calibration_rows + 1),
            "metrics": manifest.metrics,
            "training": manifest.training,
            "data": manifest.data,
        }

    async def load(self, call: Call, _: None) -> Any:
        """Load a version on every worker and keep it; the answer does not wait for that."""
        return self._changed(call, self._plane.broker.load)

    async def unload(self, call: Call, _: None) -> Any:
        """Finish the rows of a version and forget it until it is loaded again; the answer does not wait."""
        return self._changed(call, self._plane.broker.unload)

    async def live(self, call: Call, _: None) -> Any:
        """Whether this process answers; says nothing about workers or load."""
        return {"status": "live"}

    async def ready(self, call: Call, _: None) -> Any:
        """Whether a request sent now would be taken."""
        reason = self._plane.broker.unavailable()
        if reason is None and self._keyring is not None:
            reason = self._keyring.unavailable()
        if reason is not None:
            raise Unavailable(reason, retry_after=1)
        return {"status": "ready"}

    def _model(self, call: Call) -> Model:
        model = self._plane.model(call.path["model"], call.path.get("version"), call.id)
        call.logged |= {"model": model.manifest.name, "version": model.manifest.version}
        return model

    def _changed(self, call: Call, change: Callable[[str, int], None]) -> dict[str, Any]:
        call.logged["peer"] = call.peer
        manifest = self._model(call).manifest
        change(manifest.name, manifest.version)
        state = self._state(manifest.name, manifest.version)
        return {"model": manifest.name, "version": manifest.version, **state}

    def _state(self, name: str, version: int) -> dict[str, Any]:
        """What the workers say of a version."""
        said = self._plane.broker.models().get((name, version))
        if said is None:
            return {"state": "unloaded", "reason": ""}
        return {"state": said.state, "reason": said.reason}

    def _summary(self, model: Model) -> dict[str, Any]:
        manifest, catalog = model.manifest, self._plane.catalog
        labels = catalog.labels(manifest.name)
        return {
            "name": manifest.name,
            "version": manifest.version,
            "versions": [
                {
                    "version": number,
                    "labels": [label for label, at in labels.items() if at == number],
                    **self._state(manifest.name, number),
                }
                for number in catalog.versions(manifest.name)
            ],
            "features": manifest.features,
            "context_features": manifest.context_features,
            "description": manifest.description,
        }


def _rows(model: Model, query: DensityRequest | AnomalyRequest | TransportRequest) -> Floats:
    if query.x is not None and query.rows is None:
        return inputs.from_lists(query.x, model.manifest.features, "x")
    if query.rows is not None and query.x is None:
        return inputs.from_named(query.rows, model.manifest.features, "rows")
    raise InvalidInput(
        "Give x (rows of numbers) or rows (rows that name their numbers)"
        + (", not both." if query.x is not None else ".")
    )


def _context(
    model: Model, query: DensityRequest | AnomalyRequest | SampleRequest | TransportRequest
) -> Floats | None:
    names, rows = model.manifest.context_features, query.context
    if rows is None or not names:  # the data plane says whether that is right
        return None if rows is None else np.empty((len(rows), 0))
    if len(rows) and isinstance(rows[0], Mapping):
        return inputs.from_named(rows, names, "context")
    return inputs.from_lists(rows, names, "context")  # type: ignore[arg-type]


def _solved(model: Model, result: Result) -> dict[str, Any]:
    return {
        "model": model.manifest.name,
        "version": model.manifest.version,
        "status": [_STATUS[value] for value in result.status.tolist()],
        "failures": _failures(result),
        "steps": result.steps,
        "nfe": result.nfe,
    }


def _all_ok(result: Result) -> bool:
    return not result.status.tobytes().strip(_OK)


def _failures(result: Result) -> list[dict[str, Any]]:
    if _all_ok(result):
        return []
    return [
        {"row": row, "status": _STATUS[value], "detail": ADVICE[Status(value)], "t": float(result.t[row])}
        for row, value in enumerate(result.status.tolist())
        if value != Status.OK
    ]


def _densities(model: Model, result: Result) -> dict[str, Any]:
    return {
        "exact": model.manifest.exact,
        "log_density": result.log_density,  # orjson writes NaN and −∞ as null
        "error_estimate": result.error_estimate
        if _all_ok(result)
        else np.where(result.status == Status.OK, result.error_estimate, np.nan),
    }


async def _points(result: Result) -> Any:
    """Points as rows of numbers, with null for a row that has none."""
    if _all_ok(result):
        return await _numbers(result.value)
    ok = (result.status == Status.OK).tolist()
    return [row if good else None for row, good in zip(result.value, ok, strict=True)]


async def _numbers(values: Floats) -> Floats | orjson.Fragment:
    """An array, written as JSON piece by piece when it is so large that other requests would notice."""
    if values.size <= _PIECE:
        return np.ascontiguousarray(values)
    rows = max(1, _PIECE * len(values) // values.size)
    pieces = []
    for first in range(0, len(values), rows):
        piece = np.ascontiguousarray(values[first : first + rows])
        pieces.append(orjson.dumps(piece, option=orjson.OPT_SERIALIZE_NUMPY)[1:-1])
        await asyncio.sleep(0)
    return orjson.Fragment(b"[" + b",".join(pieces) + b"]")


async def _path(model: Model, times: Sequence[float], results: Sequence[Result]) -> dict[str, Any]:
    points = np.stack([result.value for result in results], axis=1)
    status = np.stack([result.status for result in results], axis=1)
    path: Any = None
    if (status == Status.OK).all():
        path = await _numbers(points)
    else:
        path = [
            [point if value == Status.OK else None for point, value in zip(*row, strict=True)]
            for row in zip(points, status.tolist(), strict=True)
        ]
    return {
        "model": model.manifest.name,
        "version": model.manifest.version,
        "times": times,
        "path": path,
        "status": [[_STATUS[value] for value in row] for row in status.tolist()],
        "failures": [
            {"time": number} | failure
            for number, result in enumerate(results)
            for failure in _failures(result)
        ],
    }
