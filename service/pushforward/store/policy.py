"""Which versions of a store are to be kept loaded."""

from __future__ import annotations

import logging
from collections.abc import Container

from pushforward import logs
from pushforward.errors import InvalidModel, NotFound
from pushforward.store.catalog import Catalog

__all__ = ["Policy", "Version"]

log = logging.getLogger(__name__)

Version = tuple[str, int]


class Policy:
    """The versions that settings and labels ask for.

    Args:
        catalog: where the versions are.
        versions: as ``settings.Settings.versions`` says it; labelled ones are wanted beside them.
    """

    def __init__(self, catalog: Catalog, versions: str) -> None:
        self._catalog = catalog
        self._listed: dict[str, set[int]] = {}
        self._newest: int | None = None  # how many of each model; None for all
        if "/" in versions:
            self._newest = 0
            for name, _, number in (item.partition("/") for item in versions.split(",")):
                self._listed.setdefault(name, set()).add(int(number))
        elif versions != "all":
            self._newest = int(versions.partition(":")[2] or 1)
        self._labels: dict[str, dict[str, int]] = {}
        self._faults: dict[str, str] = {}

    def models(self) -> list[str]:
        """Names of the models of which something may be wanted; none while there is no store."""
        try:
            names = self._catalog.models()
        except NotFound as error:
            self._note("", error.message)
            return []
        self._note("", "")
        return sorted({*names, *self._listed})

    def wanted(self, name: str, unusable: Container[Version]) -> set[Version]:
        """Those wanted of a model; in place of the newest that are unusable, older ones."""
        try:
            numbers = [number for number in self._catalog.versions(name) if (name, number) not in unusable]
        except NotFound:
            numbers = []
        newest = numbers if self._newest is None else numbers[max(0, len(numbers) - self._newest) :]
        return {(name, n) for n in (*newest, *self._listed.get(name, ()), *self._labelled(name))}

    def _labelled(self, name: str) -> list[int]:
        """The labelled versions of a model, as they were when its labels could last be read."""
        try:
            self._labels[name] = self._catalog.labels(name)
            self._note(name, "")
        except NotFound:
            pass
        except InvalidModel as error:
            self._note(name, error.message)
        return list(self._labels.get(name, {}).values())

    def _note(self, name: str, fault: str) -> None:
        """Log what is wrong with a model or the store, once."""
        if fault and self._faults.get(name) != fault:
            log.warning("store cannot be read", extra=logs.fields(model=name, reason=fault))
        self._faults[name] = fault
