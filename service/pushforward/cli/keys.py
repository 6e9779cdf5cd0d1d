"""``pushforward keys``: make API keys, list and revoke them."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, TypeVar

import typer

from pushforward.cli.common import Config, plain, say, show
from pushforward.errors import NotFound, UsageError
from pushforward.settings import PREFIX, Settings, load_settings

__all__ = ["app"]

app = typer.Typer(help="Make API keys, list and revoke them.", no_args_is_help=True)

Place = Annotated[
    str | None,
    typer.Option("--keys", help=f"File or redis:// address of the keys ({PREFIX}KEYS).", show_default=False),
]
Answer = TypeVar("Answer")


@app.command()
def create(
    name: Annotated[str, typer.Option(help="Who has it.", show_default=False)] = "",
    scope: Annotated[
        list[str] | None,
        typer.Option(
            metavar="infer|jobs|metrics|admin",
            help="What it may do; may be given several times.",
            show_default="infer",
        ),
    ] = None,
    days: Annotated[
        int | None, typer.Option(help="Days until it expires.", show_default="never", min=1, max=36500)
    ] = None,
    rows_per_second: Annotated[
        float | None, typer.Option(help="Most rows per second.", show_default="any", min=0.001)
    ] = None,
    burst_rows: Annotated[
        int | None,
        typer.Option(help="Most rows at once, after a pause.", show_default="those of 10 s", min=1),
    ] = None,
    rows_in_flight: Annotated[
        int | None, typer.Option(help="Most rows not yet answered.", show_default="any", min=1)
    ] = None,
    keys: Place = None,
    config: Config = None,
) -> None:
    """Make a key and print it, this once: only a hash of it is kept."""
    from pushforward.keys import SCOPES, Keys, new_key

    wanted: list[Any] = scope or ["infer"]
    unknown = [one for one in wanted if one not in SCOPES]
    if unknown:
        raise UsageError(f"--scope {unknown[0]!r} is none: the scopes are {', '.join(SCOPES)}.")
    if burst_rows is not None and rows_per_second is None:
        raise UsageError("--burst-rows says how many of --rows-per-second may be saved up: give that too.")
    if len(name) > 100:
        raise UsageError(f"--name has {len(name)} letters; it may have 100.")
    expires = None
    if days is not None:
        expires = datetime.now(UTC).replace(microsecond=0) + timedelta(days=days)
    key, token = new_key(
        name,
        wanted,
        expires=expires,
        rows_per_second=rows_per_second,
        burst_rows=burst_rows,
        rows_in_flight=rows_in_flight,
    )

    async def add(place: Keys) -> None:
        await place.add(key)

    told = {"key": key.id, "name": key.name, "scopes": key.scopes}
    _carry_out("create key", told, load_settings(keys=keys, config=config), add)
    say(f"Key {key.id}, for {', '.join(key.scopes)}. It is shown this once:")
    typer.echo(token)


@app.command("list")
def list_keys(keys: Place = None, config: Config = None) -> None:
    """List the keys; the secrets are not kept."""
    from rich.table import Column, Table

    from pushforward.keys import Keys

    async def read(place: Keys) -> list[Any]:
        return list(await place.read() or ())

    others = ("name", "scopes", "created", "expires", "rows/s", "burst", "in flight")
    table = Table(Column("id", no_wrap=True, min_width=12), *others, box=None)
    for key in sorted(_with_keys(load_settings(keys=keys, config=config), read), key=lambda key: key.created):
        rate = key.rows_per_second
        table.add_row(
            key.id,
            plain(key.name),
            ", ".join(key.scopes),
            f"{key.created:%Y-%m-%d}",
            "" if key.expires is None else f"{key.expires:%Y-%m-%d}" + " (over)" * key.has_expired(),
            "" if rate is None else f"{rate:g}",
            "" if rate is None else f"{key.burst:g}",
            "" if key.rows_in_flight is None else str(key.rows_in_flight),
        )
    show(table)


@app.command()
def revoke(
    key: Annotated[str, typer.Argument(help="Id of the key; `pushforward keys list` has it.")],
    keys: Place = None,
    config: Config = None,
) -> None:
    """Revoke a key: within a second no server takes it."""
    from pushforward.keys import Keys

    number = key.removeprefix("pf_").partition("_")[0]  # of a whole key, its id

    async def remove(place: Keys) -> str:
        found = await place.remove(number)
        if found is None:
            raise NotFound(f"There is no key with the id {number[:12]!r}; `pushforward keys list` has them.")
        return found.name

    _carry_out("revoke key", {"key": number[:12]}, load_settings(keys=keys, config=config), remove)


def _carry_out(
    action: str, told: dict[str, Any], settings: Settings, change: Callable[[Any], Awaitable[Any]]
) -> None:
    """Change the keys, and leave a line that says who did."""
    from pushforward import logs

    logs.configure(settings.log_level, settings.log_format)
    told |= {"uid": os.getuid(), "host": socket.gethostname()}
    try:
        _with_keys(settings, change)
    except Exception:
        logs.audit(action, **told, outcome="failed")
        raise
    logs.audit(action, **told, outcome="done")


def _with_keys(settings: Settings, use: Callable[[Any], Awaitable[Answer]]) -> Answer:
    from pushforward.keys import open_keys

    where = settings.keys
    if where is None:
        raise UsageError(f"Say where the keys are kept: --keys FILE, --keys redis://… or {PREFIX}KEYS.")

    async def run() -> Answer:
        opened = open_keys(where)
        try:
            return await use(opened)
        finally:
            await opened.close()

    return asyncio.run(run())
