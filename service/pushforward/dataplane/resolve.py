"""Which version answers a request: one that is ready, so that publishing and labelling leave no gap."""

from __future__ import annotations

import asyncio
import hashlib
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from pushforward.errors import InvalidModel, NotFound
from pushforward.messages import ModelState
from pushforward.scoring.calibration import Calibration
from pushforward.store.catalog import Catalog, ModelVersion
from pushforward.store.manifest import Manifest, sha256_file

__all__ = ["CANARY_LABEL", "Model", "Resolver"]

CANARY_LABEL = "canary"
# File systems may not tell two changes apart that are closer than a tick of their clock.
_SETTLED_NS = 100_000_000

Version = tuple[str, int]


@dataclass(frozen=True)
class Model:
    """A version that was found in the store, with what answering needs of it."""

    manifest: Manifest
    folder: Path
    catalog: Catalog
    _reading: asyncio.Lock = field(default_factory=asyncio.Lock, compare=False)

    async def calibration(self) -> Calibration:
        """Held-out log-densities and quantiles, read when they are first needed.

        Raises:
            InvalidModel: when the file is not the one that was published.
            Unavailable: when it must come from a store that cannot be read.
        """
        if "_calibration" not in vars(self):
            async with self._reading:  # one thread at most waits for the store
                return await asyncio.to_thread(lambda: self._calibration)
        return self._calibration

    @cached_property
    def _calibration(self) -> Calibration:
        path = self.folder / "calibration.safetensors"
        self.catalog.fetch(ModelVersion(self.manifest, self.folder), path.name)
        calibration = Calibration.load(path)
        if sha256_file(path) != self.manifest.files[path.name].sha256:
            file = "/".join(path.parts[-3:])
            raise InvalidModel(
                f"{file} has been changed: its SHA-256 is not that of its manifest.", file=file
            )
        return calibration


@dataclass(frozen=True)
class _Choice:
    """What a name and version mean while the model's folder and the states that were seen stay the same."""

    changed: int
    seen: tuple[tuple[Version, ModelState | None], ...]
    model: Model
    canary: Model | None


class Resolver:
    """Finds the version for a request.

    A number means that version.  A label means the version it points at, once that is ready: until then, and
    if it fails, the one that the label led to before.  No version means the label "stable" if it is set, else
    the newest version that is ready; while none is, the newest that did not fail.  So requests are led over
    to a new version when it is ready, and not at all when it is broken.

    Args:
        catalog: where the models are.
        states: what the workers have said of versions.
        canary_share: share of the requests without a version that go to the one labelled "canary", if it is
            ready.
    """

    def __init__(
        self, catalog: Catalog, states: Callable[[], Mapping[Version, ModelState]], canary_share: float = 0.0
    ) -> None:
        self._catalog = catalog
        self._states = states
        self._canary_share = canary_share
        self._choices: dict[tuple[str, str | int | None], _Choice] = {}
        self._served: dict[tuple[str, str | int | None], int] = {}  # the last target that was ready
        self._models: dict[Version, Model] = {}

    def find(self, name: str, version: str | int | None = None, request_id: str = "") -> Model:
        """The version that answers a request.

        Args:
            name: of the model.
            version: a number, a label, or None.
            request_id: decides whether the request goes to the canary: always the same for the same id, and
                never without one.

        Raises:
            NotFound: listing what there is.
            InvalidModel: when the version is broken or was unloaded, and none was served before it.
        """
        key, states = (name, version), self._states()
        changed = _changed(f"{self._catalog.root}/{name}")
        choice = self._choices.get(key)
        if choice is None or choice.changed != changed or any(states.get(k) != s for k, s in choice.seen):
            choice = self._choose(name, version, states, changed)
            if time.time_ns() - changed > _SETTLED_NS:
                self._choices[key] = choice
        if choice.canary is not None and request_id and _uniform(request_id) < self._canary_share:
            return choice.canary
        return choice.model

    def _choose(
        self, name: str, version: str | int | None, states: Mapping[Version, ModelState], changed: int
    ) -> _Choice:
        key = name, version
        before, served = self._choices.get(key), self._served.get(key)
        try:
            numbers = self._catalog.candidates(name, version)
            if _is_number(version):
                return _Choice(changed, (), self._model(name, numbers[0]), None)
            if served is not None and served not in numbers and served in self._catalog.versions(name):
                numbers.append(served)
            canary = self._catalog.labels(name).get(CANARY_LABEL) if version is None else None
        except (NotFound, InvalidModel) as error:
            # Labels that cannot be read and a store that is away do not stop what is being served.
            if before is None or (isinstance(error, NotFound) and not self._away()):
                raise
            return before
        seen = {(name, number): states.get((name, number)) for number in numbers}
        chosen = self._best(seen, served)
        number = chosen.manifest.version
        if _ready(seen[name, number]):
            self._served[key] = number
        trial = None
        if canary is not None:
            state = seen[name, canary] = states.get((name, canary))
            trial = self._model(name, canary) if _ready(state) else None
        return _Choice(changed, tuple(seen.items()), chosen, trial)

    def _best(self, candidates: Mapping[Version, ModelState | None], served: int | None) -> Model:
        """The first that is ready or was served before; else the first that is not known to be broken."""
        first: Model | None = None
        fault: InvalidModel | None = None
        for (name, number), state in candidates.items():
            try:
                if state is not None and state.state in ("failed", "unloaded") and state.reason:
                    raise InvalidModel(state.reason)
                model = self._model(name, number)
            except InvalidModel as error:
                fault = fault or error
                continue
            if _ready(state) or number == served:
                return model
            first = first or model
        if first is None:
            assert fault is not None
            raise fault
        return first

    def _away(self) -> bool:
        """Whether there is no store, or only the empty folder where one was mounted."""
        try:
            return not self._catalog.models()
        except NotFound:
            return True

    def _model(self, name: str, number: int) -> Model:
        if (name, number) not in self._models:
            found = self._catalog.resolve(name, number)
            self._models[name, number] = Model(found.manifest, found.folder, self._catalog)
        return self._models[name, number]


def _ready(state: ModelState | None) -> bool:
    return state is not None and state.state == "ready"


def _is_number(version: str | int | None) -> bool:
    return isinstance(version, int) or (version is not None and version.isdecimal())


def _uniform(request_id: str) -> float:
    """A number in [0, 1) that depends on the id alone."""
    digest = hashlib.blake2b(request_id.encode(errors="surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def _changed(folder: str) -> int:
    """When something was last published or labelled in a model's folder; both rename something there."""
    try:
        return os.stat(folder).st_mtime_ns
    except (OSError, ValueError):  # no such model: resolving the name says so
        return -1
