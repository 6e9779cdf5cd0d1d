"""Options that several commands have, and how they speak."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from pushforward.settings import PREFIX

__all__ = ["Config", "Store", "Version", "plain", "say", "show"]

Store = Annotated[
    str | None,
    typer.Option(help=f"Folder or URL of the model store ({PREFIX}STORE).", show_default="model_store"),
]
Config = Annotated[Path | None, typer.Option(help=f"File with settings, in TOML ({PREFIX}CONFIG).")]
Version = Annotated[
    str | None, typer.Option(help="Version number or label.", show_default="stable, else the newest")
]


def show(content: Any) -> None:
    """Print to standard output, with rich's markup."""
    from rich.console import Console

    Console(soft_wrap=True, highlight=False).print(content)


def say(text: str) -> None:
    """Print to standard error, with rich's markup."""
    from rich.console import Console

    Console(stderr=True, soft_wrap=True, highlight=False).print(text)


def plain(text: str) -> str:
    """Text in which nothing is markup."""
    from rich.markup import escape

    return escape(text)
