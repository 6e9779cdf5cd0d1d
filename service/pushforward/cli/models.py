"""``pushforward models``: look at the models of a store, check them, move their labels."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pushforward.cli.common import Config, Store, Version, plain, show
from pushforward.errors import InvalidModel, UsageError
from pushforward.settings import load_settings

if TYPE_CHECKING:
    from pushforward.store.catalog import Catalog

__all__ = ["app"]

app = typer.Typer(help="Look at the models of a store, check them, move their labels.")


@app.callback(invoke_without_command=True)
def models(context: typer.Context, store: Store = None, config: Config = None) -> None:
    """Look at the models of a store, check them, move their labels. Without a command: list them."""
    if context.invoked_subcommand is None:
        list_models(store, config)
    else:  # given before the command, they are meant for the command
        given = {"store": store, "config": config}
        context.default_map = {
            context.invoked_subcommand: {name: value for name, value in given.items() if value is not None}
        }


@app.command("list")
def list_models(store: Store = None, config: Config = None) -> None:
    """List the models, with their versions and labels."""
    from rich.table import Table

    catalog = _catalog(store, config)
    table = Table("model", "versions", "labels", "features", "context", "description", box=None)
    for name in catalog.models():
        versions = ", ".join(map(str, catalog.versions(name)))
        try:
            labels = ", ".join(f"{label} = {version}" for label, version in catalog.labels(name).items())
            manifest = catalog.resolve(name).manifest
        except InvalidModel as error:
            table.add_row(name, versions, "", "", "", plain(error.message))
        else:
            table.add_row(
                name,
                versions,
                labels,
                str(manifest.dim),
                ", ".join(manifest.context_features),
                plain(manifest.description),
            )
    show(table)


@app.command("show")
def show_version(
    model: Annotated[str, typer.Argument(help="Name of the model.")],
    version: Version = None,
    store: Store = None,
    config: Config = None,
) -> None:
    """Print the manifest of a version, as JSON."""
    found = _catalog(store, config).resolve(model, version)
    sys.stdout.write(found.manifest.to_bytes().decode())


@app.command()
def verify(
    model: Annotated[str | None, typer.Argument(help="Name of the model.", show_default="all models")] = None,
    store: Store = None,
    config: Config = None,
) -> None:
    """Check every version: hashes of all files, and the reference answers on this machine."""
    from pushforward.loading import load_model

    catalog = _catalog(store, config)
    faults = 0
    for name in [model] if model is not None else catalog.models():
        for version in catalog.versions(name):
            try:
                found = catalog.resolve(name, version)
                catalog.fetch(found)
                load_model(found.folder)
            except InvalidModel as error:
                faults += 1
                show(f"{name} {version}: [bold red]{plain(error.message)}[/]")
            else:
                show(f"{name} {version}: [green]sound[/]")
    if faults:
        raise typer.Exit(1)


@app.command()
def label(
    model: Annotated[str, typer.Argument(help="Name of the model.")],
    label: Annotated[str, typer.Argument(help='The label, such as "stable".')],
    version: Annotated[int | None, typer.Argument(help="The version it is to point at.", min=1)] = None,
    remove: Annotated[bool, typer.Option("--remove", help="Remove the label instead.")] = False,
    store: Store = None,
    config: Config = None,
) -> None:
    """Point a label at a version, or remove it."""
    if remove == (version is not None):
        raise UsageError("Give the version that the label is to point at, or --remove.")
    catalog = _catalog(store, config)
    if version is None:
        catalog.remove_label(model, label)
    else:
        catalog.set_label(model, label, version)


def _catalog(store: str | None, config: Path | None) -> Catalog:
    from pushforward.store.opening import opened

    settings = load_settings(store=store, config=config)
    return opened(settings.store, settings.cache, settings.cache_mb)
