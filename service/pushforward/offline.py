"""Scoring and sampling without a server: the same engine in a worker process, tables in and out in pieces."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from pushforward.bootstrap import offline
from pushforward.dataplane import Dataplane, Model, Options
from pushforward.engine.request import Status
from pushforward.errors import InvalidInput
from pushforward.inputs import from_named
from pushforward.scoring.calibration import benjamini_hochberg
from pushforward.settings import Settings
from pushforward.store.catalog import Catalog, ModelVersion
from pushforward.store.manifest import Manifest
from pushforward.store.opening import opened
from pushforward.tables import Source, writing

__all__ = ["sample", "score"]

Array = NDArray[Any]
Floats = NDArray[np.float64]

_PIECE_ROWS = 8192  # samples between two writes
_NAMES = {status.value: status.name.lower() for status in Status}
_STATUS = np.array([_NAMES.get(value, "") for value in range(max(_NAMES) + 1)])


async def score(
    settings: Settings,
    path: Path,
    name: str,
    version: str | None,
    output: Path | None,
    options: Options,
    *,
    alpha: float,
    two_sided: bool,
    fdr: float | None,
    explain: bool,
) -> None:
    """Score the rows of a file and write log_density, score, p_value, is_anomaly and status for each.

    Args:
        settings: the store, and how many rows travel together.
        path: a table; columns are found by name, or by position in a file without names.
        name: of the model.
        version: number or label; None for the default.
        output: file to write; None for CSV to standard output.
        options: how to integrate.
        alpha: a row is an anomaly when its p-value is at most this.
        two_sided: whether rows that are too likely count as unusual as well.
        fdr: flag by Benjamini–Hochberg over all rows instead, at this false discovery rate; nothing is
            written before all are scored.
        explain: whether to add an attribution for every feature.

    Raises:
        InvalidInput: for a column that is missing or not numeric, or a value that is missing.
        NotFound: for an unknown model or version.
    """
    catalog = opened(settings.store, settings.cache, settings.cache_mb)
    found = catalog.resolve(name, version)
    source = Source.open(path)
    columns = _columns(source, found.manifest)

    async def scored(plane: Dataplane, model: Model, first: int, rows: Floats) -> dict[str, Array]:
        _check(rows, columns, path, first)
        x, context = np.split(rows, [model.manifest.dim], axis=1)
        scores = await plane.score(
            model,
            x,
            context if context.size else None,
            options,
            alpha=alpha,
            two_sided=two_sided,
            explain=explain,
        )
        answer = {
            "log_density": scores.result.log_density,
            "score": -scores.result.log_density,
            "p_value": scores.p_value,
            "is_anomaly": scores.is_anomaly,
            "status": _STATUS[scores.result.status],
        }
        if scores.attributions is not None:
            for feature, attribution in zip(model.manifest.features, scores.attributions.T, strict=True):
                answer[f"attribution_{feature}"] = attribution
        return answer

    async with _plane(settings, catalog, found) as (plane, model):

        def calls() -> Iterator[Coroutine[Any, Any, dict[str, Array]]]:
            first = 0
            for rows in source.batches(columns):
                if len(rows):
                    yield scored(plane, model, first, rows)
                first += len(rows)
            if first == 0:
                raise InvalidInput(f"{path.name} has no rows to score.")

        def flagged(columns: dict[str, Array]) -> dict[str, Array]:
            assert fdr is not None
            return columns | {"is_anomaly": benjamini_hochberg(columns["p_value"], fdr)}

        await _write(calls(), output, "scoring", source.rows, None if fdr is None else flagged)


async def sample(
    settings: Settings,
    count: int,
    seed: int,
    name: str,
    version: str | None,
    output: Path | None,
    options: Options,
    *,
    context: dict[str, float],
    temperature: float,
    density: bool,
) -> None:
    """Write samples of a model, a column for each feature.

    Args:
        settings: as for ``score``.
        count: how many.
        seed: equal seeds give equal samples.
        name: of the model.
        version: number or label; None for the default.
        output: as for ``score``.
        options: how to integrate.
        context: name → value for a conditional model, the same for all samples.
        temperature: standard deviation of the base noise.
        density: whether to add a column log_density.

    Raises:
        InvalidInput: for a context that does not fit the model.
        NotFound: for an unknown model or version.
    """
    catalog = opened(settings.store, settings.cache, settings.cache_mb)
    found = catalog.resolve(name, version)
    names = found.manifest.context_features
    given = from_named([context], names, "context") if names or context else None

    async def sampled(plane: Dataplane, model: Model, first: int) -> dict[str, Array]:
        result = await plane.sample(
            model,
            min(_PIECE_ROWS, count - first),
            seed,
            given,
            options,
            temperature=temperature,
            density=density,
            first=first,
        )
        answer: dict[str, Array] = dict(zip(model.manifest.features, result.value.T, strict=True))
        return answer | {"log_density": result.log_density} if density else answer

    async with _plane(settings, catalog, found) as (plane, model):
        calls = (sampled(plane, model, first) for first in range(0, count, _PIECE_ROWS))
        await _write(calls, output, "sampling", count)


@asynccontextmanager
async def _plane(
    settings: Settings, catalog: Catalog, found: ModelVersion
) -> AsyncIterator[tuple[Dataplane, Model]]:
    name, version = found.manifest.name, found.manifest.version
    async with offline(settings, catalog) as plane:
        yield plane, plane.model(name, version)


async def _write(
    calls: Iterable[Coroutine[Any, Any, dict[str, Array]]],
    output: Path | None,
    verb: str,
    total: int,
    together: Callable[[dict[str, Array]], dict[str, Array]] | None = None,
) -> None:
    """Write the answers in order; while one is awaited, the next is already under way.

    Args:
        calls: give the columns of a piece each.
        output: file to write; None for CSV to standard output.
        verb: for the progress bar.
        total: rows.
        together: what is to be done with the columns of all pieces before they are written.
    """
    bar = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with (
        writing(output) as write,
        Progress(*bar, console=console, disable=not console.is_terminal) as progress,
    ):
        task = progress.add_task(verb, total=total)
        pieces: list[dict[str, Array]] = []

        def done(columns: dict[str, Array]) -> None:
            if together is None:
                write(columns)
            else:
                pieces.append(columns)
            progress.advance(task, len(next(iter(columns.values()))))

        ahead: asyncio.Task[dict[str, Array]] | None = None
        behind: asyncio.Task[dict[str, Array]] | None = None
        try:
            for call in calls:
                behind, ahead = ahead, asyncio.create_task(call)
                await asyncio.sleep(0)  # it starts
                if behind is not None:
                    done(await behind)
            if ahead is not None:
                done(await ahead)
        finally:
            for left in (behind, ahead):
                if left is not None:
                    left.cancel()
        if together is not None:
            write(together({name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}))


def _columns(source: Source, manifest: Manifest) -> list[str]:
    """The columns of a table that a model takes: its features, then its context."""
    wanted = [*manifest.features, *manifest.context_features]
    if source.named:
        missing = [name for name in wanted if name not in source.names]
        if missing:
            raise InvalidInput(
                f"{source.path.name} has no column {missing[0]!r}, which model {manifest.name} needs; "
                f"it has {', '.join(map(repr, source.names[:20]))}.",
                where=missing[0],
                detail={"missing": missing},
            )
        return wanted
    columns = [name for name in source.names if name != "y"]
    if len(columns) != len(wanted):
        raise InvalidInput(
            f"{source.path.name} has {len(columns)} columns without names; "
            f"model {manifest.name} takes {len(wanted)}: {', '.join(map(repr, wanted[:20]))}."
        )
    return columns


def _check(rows: Floats, columns: Sequence[str], path: Path, first: int) -> None:
    bad = np.argwhere(~np.isfinite(rows))
    if len(bad):
        row, column = (int(i) for i in bad[0])
        what = "no value" if np.isnan(rows[row, column]) else "an infinite value"
        raise InvalidInput(
            f"{path.name}: column {columns[column]!r} has {what} in row {first + row + 1}; "
            "fill it in, or leave the row out.",
            where=columns[column],
        )
