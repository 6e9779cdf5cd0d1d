"""From the setting ``store`` to a catalog."""

from __future__ import annotations

from pathlib import Path

from pushforward.store.cache import place_of
from pushforward.store.catalog import Catalog
from pushforward.store.mirror import Mirror
from pushforward.store.remote import is_url

__all__ = ["catalog_of", "folder_of", "opened"]


def catalog_of(store: str, cache: Path | None, cache_mb: int) -> Catalog:
    """The catalog of a store, which nobody has looked for yet.

    Args:
        store: a folder, or a URL.
        cache: as ``settings.Settings.cache`` says it.
        cache_mb: as ``settings.Settings.cache_mb`` says it.

    Raises:
        UsageError: when the cache cannot be written.
    """
    return Mirror(store, cache, cache_mb * 1_000_000) if is_url(store) else Catalog(Path(store))


def opened(store: str, cache: Path | None, cache_mb: int) -> Catalog:
    """The catalog of a store that is there. Raises as ``Catalog.open`` and ``Mirror.open``."""
    catalog = catalog_of(store, cache, cache_mb)
    catalog.open()
    return catalog


def folder_of(store: Path | str, cache: Path | None) -> Path:
    """The folder of a store, or of the copies of one at a URL. Raises as ``catalog_of``."""
    return place_of(store, cache) if isinstance(store, str) and is_url(store) else Path(store)
