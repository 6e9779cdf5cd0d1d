"""Keeping a worker's versions in memory: what a policy asks for, and what chunks ask for.

One thread looks into the store and loads, so that the engine's loop goes on stepping meanwhile; the loop
itself only ever meets versions that are verified, proven and warm.  A turn of the worker's loop, when
``fileno`` is readable:

1. ``events``: submit the chunks that waited for a version that is now ready, fail those whose version failed;
2. ``dropping``: for each of these of which the engine has no rows, forget it there and say ``dropped``.  Ask
   again whenever rows have left while some are still on the list.

So a version's life is *loading → ready → draining → unloaded*: a draining one takes no new chunks, keeps its
rows until they are finished, and is revived when it is asked for again.  A version is given back when those
wanted of its model are all ready and two looks in a row found it wanted no more (the server has led its
requests over by then; one that chunks have asked for stays until none has for a minute), when the memory
bound needs its room, or when it is unloaded by hand.

The bound is never exceeded: what is to be loaded waits until enough of the others, those unused for longest
first, have drained.  What had to give way is loaded again when it is asked for, in turn.
"""

from __future__ import annotations

import itertools
import logging
import math
import os
import threading
import time
from pathlib import Path

from pushforward import logs
from pushforward.errors import InvalidModel, NotFound, PushforwardError, Unavailable, brief
from pushforward.loading import LoadedModel, Proof, load_model
from pushforward.messages import ModelState
from pushforward.store.catalog import Catalog
from pushforward.store.policy import Policy, Version

__all__ = ["Keeper"]

log = logging.getLogger(__name__)

Stamp = tuple[tuple[str, int, int], ...]

_KEEP_S = 60.0  # what chunks have asked for and the policy does not want is kept while it is used so often


class Keeper:
    """The versions that a worker has loaded.  All methods return at once, except ``close``.

    Args:
        catalog: where the versions are.
        versions: which to keep beside labelled ones, as ``settings.Settings.versions`` says it.
        load: ``start`` loads them and follows the store; ``first-use`` loads only what is asked for.
        watch_s: seconds between two looks into the store; 0 for one look only.
        memory_mb: megabytes of programs to keep at most; None for no bound.
        device: where the programs run.

    Attributes:
        initial: set when everything that the first look found has been tried.
    """

    def __init__(
        self,
        catalog: Catalog,
        versions: str = "latest",
        load: str = "start",
        watch_s: float = 2.0,
        memory_mb: int | None = None,
        device: str = "cpu",
    ) -> None:
        self.initial = threading.Event()
        self._catalog = catalog
        self._device = device
        self._policy = Policy(catalog, versions) if load == "start" else None
        self._watch_s = watch_s or math.inf
        self._bound = math.inf if memory_mb is None else memory_mb * 1_000_000
        self._thread = threading.Thread(target=self._run, name="keeper", daemon=True)
        self._closed = False

        # Guards everything below, and is held for moments only: never while anything is read or loaded.
        self._changed = threading.Condition()
        self._loaded: dict[Version, LoadedModel] = {}
        self._draining: dict[Version, LoadedModel] = {}
        self._used: dict[Version, int] = {}
        self._clock = itertools.count()
        self._demanded: dict[Version, None] = {}  # to load, in order, before …
        self._backlog: dict[Version, None] = {}  # … what the policy wants
        self._loading: Version | None = None
        self._need = 0  # bytes that the version being loaded waits for
        self._asked: dict[Version, float] = {}  # by chunks, and when they last did: kept for a while
        self._pinned: set[Version] = set()  # by hand: kept
        self._barred: set[Version] = set()  # by hand: not loaded
        self._evicted: set[Version] = set()  # for want of room: not loaded again unless asked for
        self._failed: dict[Version, tuple[Stamp, str, str]] = {}
        self._logged: dict[Version, tuple[Stamp, str]] = {}
        self._news: list[ModelState] = []
        self._read, self._write = os.pipe()
        self._readable = False

        self._spare: set[Version] = set()  # loaded, but wanted no more when last looked

    # ---------------------------------------------------------------- what the worker's loop calls

    def start(self) -> None:
        """Begin to load and to watch."""
        self._thread.start()

    def close(self) -> None:
        """End the thread; waits for the version that is being loaded."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join()
        self._readable = False
        os.close(self._read)
        os.close(self._write)

    def fileno(self) -> int:
        """A descriptor that is readable when ``events`` or ``dropping`` have something to say."""
        return self._read

    def events(self) -> list[ModelState]:
        """What has become of versions since last asked.

        ``failed`` and ``unloaded`` with a reason mean that the version is not to be had; ``unloaded`` without
        one, that it is loaded again when it is asked for.
        """
        with self._changed:
            if self._readable:
                os.read(self._read, 1)
                self._readable = False
            news, self._news = self._news, []
        return news

    def get(self, name: str, version: int) -> LoadedModel | None:
        """A version that is ready; None when it must be asked for with ``want``.

        One that is unloaded by hand goes on for as long as it is there: its requests have chunks to come.
        """
        key = name, version
        model = self._loaded.get(key) or (self._draining.get(key) if key in self._barred else None)
        if model is not None:
            self._used[key] = next(self._clock)
            if key in self._asked:
                self._asked[key] = time.monotonic()
        return model

    def held(self, name: str, version: int) -> LoadedModel:
        """A version that ``get`` has found in this turn of the loop, which may be draining by now."""
        with self._changed:
            return self._loaded.get((name, version)) or self._draining[name, version]

    def proof(self) -> Proof | None:
        """That of the version asked for it least often; None when nothing is loaded. No use of a version."""
        with self._changed:
            model = min(self._loaded.values(), key=lambda model: model.proofs, default=None)
        if model is None:
            return None
        model.proofs += 1
        return model.proof

    def want(self, name: str, version: int) -> None:
        """Have a version loaded for a chunk, before all others; an event says ``ready`` or ``failed``."""
        key = name, version
        with self._changed:
            if key in self._barred:
                self._tell(key, "failed", _unloaded(key), code=NotFound.code)
                return
            self._asked[key] = time.monotonic()
            if key in self._loaded:
                self._tell(key, "ready")
            elif key in self._draining and not self._need:
                self._revive(key)
            else:
                self._demanded[key] = None
                self._changed.notify_all()

    def load(self, name: str, version: int) -> None:
        """Load a version and keep it whatever the policy, even if it failed or was unloaded before."""
        key = name, version
        with self._changed:
            self._barred.discard(key)
            self._failed.pop(key, None)
            self._pinned.add(key)
            self.want(name, version)

    def unload(self, name: str, version: int) -> None:
        """Let a version's rows finish and forget it, until ``load``."""
        key = name, version
        with self._changed:
            self._barred.add(key)
            self._pinned.discard(key)
            self._asked.pop(key, None)
            self._backlog.pop(key, None)
            if key in self._demanded and key != self._loading:
                del self._demanded[key]
                self._tell(key, "failed", _unloaded(key), code=NotFound.code)  # to those who wait for it
            if key in self._loaded:
                self._drain(key)
            elif key not in self._draining and key != self._loading:
                self._tell(key, "unloaded", _unloaded(key))
            self._changed.notify_all()

    def dropping(self) -> list[Version]:
        """Versions that are draining: to be ``dropped`` once the engine has no rows of them."""
        with self._changed:
            fresh = {(event.model, event.version) for event in self._news if event.state == "ready"}
            for key in sorted(self._loaded, key=self._used.__getitem__) if self._need else ():
                if _bytes(self._loaded) + self._need <= self._bound:
                    break
                if key not in fresh:  # else chunks that have waited for it would go on waiting
                    self._drain(key)
                    self._evicted.add(key)
            return list(self._draining)

    def dropped(self, name: str, version: int) -> None:
        """Give back the memory of a draining version: the engine has no rows of it."""
        key = name, version
        with self._changed:
            if self._draining.pop(key, None) is not None:
                del self._used[key]
                self._tell(key, "unloaded", _unloaded(key) if key in self._barred else "")
                self._changed.notify_all()

    # ---------------------------------------------------------------- the thread

    def _run(self) -> None:
        due = 0.0
        while not self._closed:
            key = self._next(due)
            try:
                if key is not None:
                    self._load(key)
                elif not self._closed:
                    self._look()
            except Exception:  # whatever it is, it must not end the watch
                log.exception("looking after models failed")
            if key is None:
                due = time.monotonic() + self._watch_s

    def _next(self, due: float) -> Version | None:
        """The version to load now; None when it is time to look into the store."""
        with self._changed:
            while not self._closed:
                queue = self._demanded or self._backlog
                wait = due - time.monotonic()
                if queue:
                    key = next(iter(queue))
                    del queue[key]
                    if key in self._draining:
                        self._revive(key)
                    elif key not in self._loaded:
                        self._loading = key
                        return key
                elif wait <= 0:
                    break
                else:
                    self.initial.set()
                    self._changed.wait(min(wait, threading.TIMEOUT_MAX))
        return None

    def _load(self, key: Version) -> None:
        name, version = key
        started = time.monotonic()
        stamp = _stamp(self._catalog.root / name / str(version))
        model, reason, code, again = None, "", InvalidModel.code, self._failed.get(key)
        if again is not None and again[0] == stamp and again[2] != Unavailable.code:
            reason, code = again[1:]
        else:
            self._tell(key, "loading")
            try:
                found = self._catalog.resolve(name, version)
                if self._room(key, found.manifest.program_bytes):
                    self._catalog.fetch(found)
                    model = load_model(found.folder, self._device)
            except PushforwardError as error:
                reason, code = error.message, error.code
            except Exception as error:  # such as a disk that fails
                log.exception("loading failed", extra=logs.fields(model=name, version=version))
                reason = f"{name}/{version} could not be loaded: {brief(error)}."
        seconds = round(time.monotonic() - started, 3)
        with self._changed:
            self._loading = None
            if key in self._barred:
                self._demanded.pop(key, None)
                self._tell(key, "failed", _unloaded(key), code=NotFound.code)  # to those who wait for it
                self._tell(key, "unloaded", _unloaded(key))
            elif reason:
                self._failed[key] = stamp, reason, code
                self._demanded.pop(key, None)
                self._tell(key, "failed", reason, code=code)
            elif model is None:
                self._tell(key, "unloaded")
            else:
                self._failed.pop(key, None)
                self._logged.pop(key, None)
                self._evicted.discard(key)
                self._demanded.pop(key, None)
                self._loaded[key] = model
                self._used[key] = next(self._clock)
                self._tell(key, "ready", seconds=seconds)
        if model is not None:
            log.debug("model loaded", extra=logs.fields(model=name, version=version, load_s=seconds))
        elif reason and (again is None or again[0] != stamp):
            if self._logged.get(key) != (stamp, reason):
                self._logged[key] = stamp, reason
                log.error(
                    "model cannot be served", extra=logs.fields(model=name, version=version, reason=reason)
                )
            if self._policy is not None:
                self._look_at(name)  # an older one may have to stand in

    def _room(self, key: Version, size: int) -> bool:
        """Wait until there is room for a version; False when it is not to be loaded after all.

        Raises:
            InvalidModel: when there can never be.
        """
        if size > self._bound:
            raise InvalidModel(
                f"{key[0]}/{key[1]} needs {size / 1e6:.1f} MB for its programs, more than the "
                f"{self._bound / 1e6:.0f} MB that all versions may take: raise model_memory_mb."
            )
        with self._changed:

            def fits() -> bool:
                return _bytes(self._loaded) + _bytes(self._draining) + size <= self._bound

            if not fits() and not self.initial.is_set() and key not in self._asked:
                self._evicted.add(key)  # at the start, none of those wanted makes way for another
                return False
            if not fits():
                self._need = size
                self._wake()
                self._changed.wait_for(lambda: fits() or self._closed or key in self._barred)
                self._need = 0
            return fits()

    def _look(self) -> None:
        """Look into the store: what is new, what is wanted no more."""
        for key, (stamp, _, code) in list(self._failed.items()):
            # a store that was away may be back, which changes no file
            if code == Unavailable.code or _stamp(self._catalog.root / key[0] / str(key[1])) != stamp:
                self._failed.pop(key, None)
        spare: set[Version] = set()
        for name in self._policy.models() if self._policy else ():
            spare |= self._look_at(name)
        with self._changed:
            for key in spare & self._spare & self._loaded.keys() - self._kept():
                self._asked.pop(key, None)
                self._drain(key)
        self._spare = spare

    def _look_at(self, name: str) -> set[Version]:
        """Queue what is wanted of a model; returns what is loaded of it and wanted no more."""
        assert self._policy is not None
        with self._changed:
            unusable = {*self._failed, *self._barred}
        wanted = self._policy.wanted(name, unusable) - unusable
        with self._changed:
            wanted |= {key for key in self._pinned - unusable if key[0] == name}
            for key in sorted(wanted - self._loaded.keys() - self._evicted - self._barred):
                self._backlog[key] = None
            if not wanted or not wanted <= self._loaded.keys():
                return set()  # nothing goes before what takes its place is there
            return {key for key in self._loaded if key[0] == name} - wanted - self._kept()

    # ---------------------------------------------------------------- what both call

    def _kept(self) -> set[Version]:
        """Versions that are kept although the policy does not want them."""
        long_ago = time.monotonic() - _KEEP_S
        return self._pinned | {key for key, asked in self._asked.items() if asked > long_ago}

    def _drain(self, key: Version) -> None:
        self._draining[key] = self._loaded.pop(key)
        self._wake()

    def _revive(self, key: Version) -> None:
        self._loaded[key] = self._draining.pop(key)
        self._evicted.discard(key)
        self._tell(key, "ready")

    def _tell(self, key: Version, state: str, reason: str = "", seconds: float = 0.0, code: str = "") -> None:
        with self._changed:
            self._news.append(ModelState(*key, state, reason, seconds, code))
            self._wake()

    def _wake(self) -> None:
        with self._changed:
            if not self._readable and not self._closed:
                os.write(self._write, b"\0")
                self._readable = True


def _bytes(models: dict[Version, LoadedModel]) -> int:
    return sum(model.manifest.program_bytes for model in models.values())


def _unloaded(key: Version) -> str:
    return f"{key[0]}/{key[1]} was unloaded: load it to have it served again."


def _stamp(folder: Path) -> Stamp:
    """What changes when any file of a version does."""
    stamps = []
    for place, _, files in os.walk(folder):
        for path in (place, *(os.path.join(place, file) for file in files)):
            try:
                status = os.lstat(path)
            except OSError:
                continue
            stamps.append((path, status.st_mtime_ns, status.st_size))
    return tuple(sorted(stamps))
