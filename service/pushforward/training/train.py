"""From a table to a published version: read, divide, fit, evaluate, publish, report."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table as RichTable

from pushforward.publish import publish
from pushforward.store.manifest import Manifest, check_name
from pushforward.store.opening import folder_of
from pushforward.tables import read_table
from pushforward.training import card, evaluate
from pushforward.training.data import (
    Array,
    Table,
    build_transform,
    check_varies,
    noise_widths,
    read_columns,
    split,
)
from pushforward.training.fit import fit
from pushforward.training.progress import watch_for
from pushforward.training.recipe import Recipe

__all__ = ["Options", "Source", "run", "train"]


@dataclass(frozen=True)
class Options:
    """What happens to the rows before and besides the fit.

    Attributes:
        whiten: remove correlations before the flow, not only scales: more log-density on small or strongly
            correlated tables; for anomaly scores standardising alone is level or better.
        log: features that are positive and act by factors.
        logit: features between two bounds.
        dequantize: integer features that get uniform noise; the model is then the density of x + u.
        held_out: share of the normal rows that the fit never sees.
        recipe: of the fit.
    """

    whiten: bool = False
    log: Sequence[str] = ()
    logit: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    dequantize: Sequence[str] = ()
    held_out: float = 0.25
    recipe: Recipe = field(default_factory=Recipe)


@dataclass(frozen=True)
class Source:
    """Where the rows come from, for the model card."""

    description: str = ""
    source: str = "not stated"
    licence: str = "not stated"
    notes: str = ""


def run(
    path: Path,
    name: str,
    store: Path | str,
    *,
    cache: Path | None = None,
    label: str | None = None,
    context: Sequence[str] = (),
    columns: Sequence[str] | None = None,
    options: Options | None = None,
    description: str = "",
    resume: bool = False,
    console: Console | None = None,
) -> Manifest:
    """Train on a file and publish the result as the next version of ``name``: ``pushforward train``.

    Args:
        path: CSV, Parquet, npy, or npz with X and, optionally, y, which is the label if no other is named.
        name: of the model.
        store: folder or URL of the model store.
        cache: where checkpoints are kept when the store is at a URL, as ``settings.Settings.cache`` says it.
        label: column that is 1 for anomalies.
        context: columns to condition on.
        columns: the features; all the others when None.
        options: transforms, noise, recipe.
        description: a sentence for the model card.
        resume: continue an interrupted run of the same command.
        console: where progress and report go.

    Raises:
        InvalidInput: the table cannot be trained on; names the column.
        Conflict: the checkpoint to resume belongs to other data or settings.
        TrainingFailed: the fit came to nothing.
        PublishFailed: the version missed its own checks, or could not be written.
        UsageError: the store is at a URL that cannot be opened.
    """
    check_name(name)
    names, values = read_table(path)
    if label is None and path.suffix.lower() == ".npz" and "y" in names:
        label = "y"
    table = read_columns(names, values, label=label, context=context, columns=columns)
    source = Source(description, source=path.name)
    return train(
        table, name, store, options or Options(), source, cache=cache, resume=resume, console=console
    )


def train(
    table: Table,
    name: str,
    store: Path | str,
    options: Options,
    source: Source,
    *,
    cache: Path | None = None,
    resume: bool = False,
    console: Console | None = None,
) -> Manifest:
    """``run`` on a checked table."""
    console = console or Console(stderr=True)
    recipe = options.recipe
    parts = split(table, recipe.seed, held_out=options.held_out)
    check_varies(parts.train, options.dequantize)
    widths = noise_widths(table, options.dequantize)
    noisy = _dequantizer(widths, recipe.seed)
    train_rows, held_out = noisy(parts.train.rows), noisy(parts.held_out.rows)
    transform = build_transform(
        train_rows,
        table.features,
        whiten=options.whiten,
        log=options.log,
        logit=options.logit,
        others=np.concatenate([parts.validation.rows, parts.held_out.rows]),
    )
    checkpoint = folder_of(store, cache) / ".training" / f"{name}.safetensors"
    if checkpoint.exists() and not resume:
        checkpoint.unlink()
    began = time.monotonic()
    try:
        result = fit(
            parts.train.rows,
            parts.validation.rows,
            transform,
            context=parts.train.context,
            validation_context=parts.validation.context,
            recipe=recipe,
            dequantize=widths,
            checkpoint=checkpoint,
            resume=resume,
            watch=watch_for(console),
        )
    except KeyboardInterrupt:
        if checkpoint.exists():
            console.print("Interrupted; nothing was published. The same command with --resume continues.")
        raise
    seconds = time.monotonic() - began
    metrics = evaluate.figures(result.flow, parts, train_rows, held_out, recipe.seed)
    facts = {
        "source": source.source,
        "licence": source.licence,
        "rows": str(len(table)),
        "training_rows": str(len(parts.train)),
        "validation_rows": str(len(parts.validation)),
        "held_out_rows": str(len(parts.held_out)),
        "anomalies": str(len(parts.anomalies)),
    }
    settings = card.scalars(asdict(recipe)) | {
        "best_step": result.best.step,
        "seconds": round(seconds, 1),
        "whiten": options.whiten,
        "log": ", ".join(options.log),
        "logit": ", ".join(options.logit),
        "dequantize": ", ".join(options.dequantize),
    }
    with console.status("publishing") as status:
        manifest = publish(
            result.flow.field,
            store=store,
            name=name,
            calibration=parts.held_out.rows,
            calibration_context=parts.held_out.context,
            transform=transform,
            features=table.features,
            context_features=table.context_features,
            description=source.description,
            data=facts,
            metrics=metrics,
            training=settings,
            card=card.sections(facts, metrics, result.history, source.notes),
            advance=lambda what: status.update(f"publishing: {what}"),
        )
    checkpoint.unlink(missing_ok=True)
    console.print(_report(manifest))
    return manifest


def _dequantizer(widths: Array, seed: int) -> Callable[[Array], Array]:
    """x → x + u with u uniform on (−w/2, w/2), the draws fixed by the seed."""
    rng = np.random.default_rng(seed)
    return lambda rows: rows + widths * (rng.random(rows.shape) - 0.5) if widths.any() else rows


def _report(manifest: Manifest) -> RichTable:
    """What a person wants to see after training."""
    table = RichTable(title=f"{manifest.name} version {manifest.version}", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for key, value in manifest.metrics.items():
        table.add_row(key.replace("_", " "), f"{value:.3f}")
    certificate = manifest.certificate
    table.add_row("error of log p, 99.9 % quantile", f"{certificate.p999:.1e} nats")
    table.add_row("steps per row, mean and maximum", f"{certificate.steps_mean:.1f}, {certificate.steps_max}")
    return table
