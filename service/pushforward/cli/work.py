"""The commands that do the work: serve, worker, train, score, sample."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, get_origin

import typer

from pushforward.cli.common import Config, Store, Version, say
from pushforward.errors import UsageError
from pushforward.settings import Settings, load_settings

__all__ = ["sample", "score", "serve", "train", "worker"]

Name = Annotated[str, typer.Option("--model", "-m", help="Name of the model.")]
Output = Annotated[
    Path | None,
    typer.Option(
        "--output", "-o", help="File to write: .csv, .parquet or .npy.", show_default="CSV to standard output"
    ),
]
Precision = Annotated[
    str | None, typer.Option(help="Arithmetic: float32 or float64.", show_default="the model's own")
]
Rtol = Annotated[
    float | None, typer.Option(help="Relative tolerance per step.", show_default="the model's own")
]
Atol = Annotated[
    float | None, typer.Option(help="Absolute tolerance per step.", show_default="the model's own")
]


def _with_settings(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command one option for each setting."""
    parameters = []
    for name, field in Settings.model_fields.items():
        kind: Any = field.annotation
        choices = "|".join(kind.__args__) if get_origin(kind) is Literal else None
        option = typer.Option(help=field.description, show_default=str(field.default), metavar=choices)
        parameters.append(
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=None,
                annotation=Annotated[(str if choices else kind) | None, option],
            )
        )
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return command


@_with_settings
def serve(**flags: Any) -> None:
    """Serve the models of a store over HTTP.

    Every option can be set by an environment variable too, --max-rows by PUSHFORWARD_MAX_ROWS and so on, or
    by a line max_rows = … in the file of --config; the option wins, then the variable. The API is described
    at /docs of the running server. SIGTERM or Ctrl-C lets it finish what it has taken, then exit.
    """
    from pushforward import bootstrap

    bootstrap.serve(load_settings(**flags))


@_with_settings
def worker(**flags: Any) -> None:
    """Solve for servers that share a queue: `pushforward serve --broker redis://…`, on any machine.

    Takes the same options as serve, of which those about HTTP do not apply. SIGTERM or Ctrl-C lets it finish
    what it has taken, or hand it back, then exit.
    """
    from pushforward import bootstrap

    bootstrap.work(load_settings(**flags))


def score(
    file: Annotated[Path, typer.Argument(help="Table to score: .csv, .parquet, .npy, or .npz with X.")],
    model: Name,
    version: Version = None,
    store: Store = None,
    config: Config = None,
    output: Output = None,
    alpha: Annotated[
        float, typer.Option(help="Flag a row when its p-value is at most this.", min=0, max=1)
    ] = 0.01,
    two_sided: Annotated[
        bool, typer.Option("--two-sided", help="Rows that are too likely count as well.")
    ] = False,
    fdr: Annotated[
        float | None,
        typer.Option(
            help="Flag by Benjamini-Hochberg over all rows instead, at this false discovery rate.",
            show_default=False,
            min=0,
            max=1,
        ),
    ] = None,
    explain: Annotated[bool, typer.Option("--explain", help="Add an attribution for every feature.")] = False,
    rtol: Rtol = None,
    atol: Atol = None,
    precision: Precision = None,
) -> None:
    """Score the rows of a table: log_density, score, p_value, is_anomaly, status.

    Columns are found by name, and those that the model does not know are passed over. A file without
    names must have the features in the order of the model, followed by its context.
    """
    from pushforward import offline

    asyncio.run(
        offline.score(
            load_settings(store=store, config=config),
            file,
            model,
            version,
            output,
            _options(rtol=rtol, atol=atol, precision=precision),
            alpha=alpha,
            two_sided=two_sided,
            fdr=fdr,
            explain=explain,
        )
    )


def sample(
    model: Name,
    count: Annotated[int, typer.Option("--number", "-n", help="How many samples.", min=1)] = 1,
    seed: Annotated[
        int | None, typer.Option(help="Equal seeds give equal samples.", show_default="a fresh one", min=0)
    ] = None,
    context: Annotated[
        list[str] | None,
        typer.Option(help="For a conditional model: name=value, once for each context column."),
    ] = None,
    temperature: Annotated[
        float, typer.Option(help="Standard deviation of the base noise.", min=0.001, max=10)
    ] = 1.0,
    log_density: Annotated[bool, typer.Option("--log-density", help="Add a column with log p.")] = False,
    version: Version = None,
    store: Store = None,
    config: Config = None,
    output: Output = None,
    rtol: Rtol = None,
    atol: Atol = None,
    precision: Precision = None,
) -> None:
    """Draw samples from a model, a column for each feature."""
    from pushforward import offline
    from pushforward.noise import fresh_seed

    if seed is None:
        seed = fresh_seed()
        say(f"seed {seed}")
    asyncio.run(
        offline.sample(
            load_settings(store=store, config=config),
            count,
            seed,
            model,
            version,
            output,
            _options(rtol=rtol, atol=atol, precision=precision),
            context=dict(_assignment(text) for text in context or ()),
            temperature=temperature,
            density=log_density,
        )
    )


def train(
    file: Annotated[Path, typer.Argument(help="Table: .csv, .parquet, .npy, or .npz with X and perhaps y.")],
    name: Annotated[str, typer.Option(help="Name of the model; its next version is published.")],
    store: Store = None,
    config: Config = None,
    label: Annotated[
        str | None,
        typer.Option(help="Column that is 1 for anomalies: left out of training, and used for the report."),
    ] = None,
    context: Annotated[
        str | None, typer.Option(help="Columns to condition on, separated by commas.", show_default="none")
    ] = None,
    columns: Annotated[
        str | None,
        typer.Option(help="Columns to model, separated by commas.", show_default="all others"),
    ] = None,
    whiten: Annotated[
        bool, typer.Option("--whiten", help="Remove correlations first: for densities rather than scores.")
    ] = False,
    log: Annotated[str | None, typer.Option(help="Positive columns to take the logarithm of.")] = None,
    dequantize: Annotated[str | None, typer.Option(help="Integer columns to spread evenly.")] = None,
    objective: Annotated[
        str | None,
        typer.Option(
            metavar="flow_matching|maximum_likelihood", show_default="flow_matching", help="What to minimise."
        ),
    ] = None,
    hidden: Annotated[
        str | None,
        typer.Option(help="Widths of the hidden layers, multiples of 16.", show_default="256,256"),
    ] = None,
    pairing: Annotated[
        str | None,
        typer.Option(
            metavar="independent|optimal_transport",
            show_default="independent",
            help="How flow matching pairs noise with rows.",
        ),
    ] = None,
    noise: Annotated[
        float | None, typer.Option(help="Smoothing, in standard deviations.", show_default="0.05")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Steps of the optimiser.", show_default="4000")] = None,
    seed: Annotated[
        int | None, typer.Option(help="Equal seeds train equal models.", show_default="0")
    ] = None,
    description: Annotated[str, typer.Option(help="A sentence for the model card.", show_default=False)] = "",
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue an interrupted run of this command.")
    ] = False,
) -> None:
    """Train a model on a table and publish it.

    Splits the rows, standardises, trains with a progress bar, calibrates on held-out rows, measures the error
    of the log-density, and publishes the next version of the model. Needs the extra "train" (torch).
    """
    settings = load_settings(store=store, config=config)
    try:
        from pushforward.training.recipe import Recipe
        from pushforward.training.train import Options, run
    except ModuleNotFoundError as error:
        raise UsageError(f"Training needs {error.name}: pip install 'pushforward[train]'.") from None
    recipe: dict[str, Any] = {
        "hidden": None if hidden is None else _widths(hidden),
        "objective": objective,
        "pairing": pairing,
        "noise": noise,
        "steps": steps,
        "seed": seed,
    }
    options = Options(
        whiten=whiten,
        log=_names(log) or (),
        dequantize=_names(dequantize) or (),
        recipe=Recipe(**{key: value for key, value in recipe.items() if value is not None}),
    )
    run(
        file,
        name,
        settings.store,
        cache=settings.cache,
        label=label,
        context=_names(context) or (),
        columns=_names(columns),
        options=options,
        description=description,
        resume=resume,
    )


def _options(**values: Any) -> Any:
    """Options of the integration, from flags."""
    from pydantic import ValidationError

    from pushforward.dataplane import Options

    try:
        return Options(**values)
    except ValidationError as error:
        fault = error.errors()[0]
        name = str(fault["loc"][0])
        raise UsageError(f"--{name}: the value {values[name]!r} is not allowed. {fault['msg']}.") from None


def _assignment(text: str) -> tuple[str, float]:
    name, equals, value = text.rpartition("=")
    try:
        return name, float(value if equals else "")
    except ValueError:
        raise UsageError(f"--context {text!r} must be name=value, with a number for the value.") from None


def _widths(text: str) -> tuple[int, ...]:
    try:
        widths = tuple(int(part) for part in text.split(","))
    except ValueError:
        widths = ()
    if not widths or any(width < 1 or width % 16 for width in widths):
        raise UsageError(f"--hidden {text!r} must be multiples of 16, separated by commas, such as 128,128.")
    return widths


def _names(text: str | None) -> list[str] | None:
    return None if text is None else [name.strip() for name in text.split(",") if name.strip()]
