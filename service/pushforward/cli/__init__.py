"""The commands: ``pushforward serve``, ``worker``, ``train``, ``models``, ``keys``, ``score``, ``sample``."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType
from typing import Annotated

import typer

from pushforward import __version__
from pushforward.cli import keys, models, work
from pushforward.cli.common import plain, say, show
from pushforward.errors import PushforwardError, UsageError

__all__ = ["app", "main"]

app = typer.Typer(
    no_args_is_help=True,
    invoke_without_command=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",  # paragraphs are filled to the width of the terminal
)
for command in (work.serve, work.worker, work.train, work.score, work.sample):
    app.command()(command)
app.add_typer(models.app, name="models")
app.add_typer(keys.app, name="keys")


@app.callback()
def pushforward(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", is_eager=True)
    ] = False,
) -> None:
    """Train, publish and serve continuous normalizing flows: samples, log-densities, anomaly scores."""
    if version:
        show(__version__)
        raise typer.Exit


def main() -> None:
    """Run the command line; what goes wrong is one line on standard error and a status that is not 0."""
    told: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        told.append(number)
        signal.raise_signal(signal.SIGINT)  # which everything knows how to leave in order

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs begin without it
    try:
        app()
    except BrokenPipeError:  # whoever read our output has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except PushforwardError as error:
        say(f"[bold red]error:[/] {plain(error.message)}")
        sys.exit(2 if isinstance(error, UsageError) else 1)
    except SystemExit:
        if told:
            sys.exit(128 + told[0])
        raise
