"""A remote store as a folder: manifests and labels are kept up to date, other files come when needed.

    <root>/<name>/<version>/manifest.json, <root>/<name>/labels.json     as in a store; see ``catalog``
    <root>/.seen.json      path → what the last listing said of it, so that only changes are read
    <root>/.fault          why the store could not be read when last tried, for a server's other processes

One process of a server refreshes, with one listing; all of them read the folder as they would read a local
store, and fetch the files of versions that they load. Nothing is taken out of the folder because the store
cannot be reached, or is empty all of a sudden.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
import stat
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import TypeVar

from pushforward import logs
from pushforward.errors import InvalidModel, NotFound, PushforwardError, Unavailable, UsageError
from pushforward.store import cache
from pushforward.store.catalog import LABELS, LABELS_MAX_BYTES, Catalog, ModelVersion
from pushforward.store.manifest import MANIFEST, MAX_BYTES, FileEntry, sha256_file
from pushforward.store.remote import Entry, Remote

__all__ = ["Mirror"]

log = logging.getLogger(__name__)

# Only what looks like this is ever taken from a listing; a name is as ``manifest`` says it.
_KEY = re.compile(r"([a-z0-9][a-z0-9._-]{0,62})/(?:([1-9][0-9]{0,8})/([A-Za-z0-9._/-]{1,310})|labels\.json)")
_AT_ONCE = 8  # requests
_PIECE_BYTES = 16 << 20
_RETRY_S = 5.0
_TICK_S = 1.0  # clocks of file systems are not read as finely as the system's

T = TypeVar("T")
R = TypeVar("R")


class Mirror(Catalog):
    """The models of a store behind a URL.

    Args:
        url: where it is.
        folder: the cache folder of all stores; None for the user's.
        bound: bytes that the files of all versions in the cache may take.

    Raises:
        UsageError: when the cache cannot be written.
    """

    def __init__(self, url: str, folder: Path | None, bound: int) -> None:
        super().__init__(cache.place_of(url, folder))
        self._url, self._bound = url, bound
        self._fault = self.root / ".fault"
        self._faults: dict[str, str] = {}

    @cached_property
    def remote(self) -> Remote:
        """The store itself, which is not even imported before it is needed."""
        return Remote(self._url)

    def open(self) -> None:
        """Bring the folder up to date; what is in it has to do when the store cannot be reached.

        Raises:
            UsageError: for an unknown protocol or a missing package, and when the credentials do not suffice.
            NotFound: when there is no such store, or nothing in it.
            Unavailable: when the store cannot be reached, and nothing is in the cache.
        """
        try:
            self.refresh()
        except Unavailable as error:
            if not self.models():
                raise
            log.warning("store cannot be read", extra=logs.fields(reason=error.message))

    @contextlib.contextmanager
    def followed(self, seconds: float) -> Iterator[None]:
        """Refresh every so many seconds while the block runs, in a thread."""
        stop = threading.Event()

        def follow() -> None:
            while not stop.wait(seconds):
                away = self._fault.exists()
                try:
                    self.refresh()
                except PushforwardError as error:
                    if not away:
                        log.warning("store cannot be read", extra=logs.fields(reason=error.message))
                except Exception:  # whatever it is, it must not end the watch
                    log.exception("looking into the store failed")
                else:
                    if away:
                        log.warning("store can be read again", extra=logs.fields(store=self.remote.shown))

        thread = threading.Thread(target=follow, name="mirror", daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()  # not waited for: it may be waiting for the store

    def refresh(self) -> None:
        """Bring manifests and labels up to date.

        Raises:
            UsageError: when the credentials do not suffice, or the cache cannot be written.
            NotFound: when there is no such store, or nothing in it.
            Unavailable: when the store cannot be reached.
        """
        try:
            try:
                self._refresh()
                self._fault.unlink(missing_ok=True)
            except OSError as error:
                raise UsageError(f"The cache {self.root} cannot be written: {error.strerror}.") from error
        except PushforwardError as error:
            with contextlib.suppress(OSError):
                cache.write(self.root, self._fault, [error.message.encode()])
            raise

    def fetch(self, found: ModelVersion, *paths: str) -> None:
        """Have files of a version in its folder, with the hashes of its manifest.

        Args:
            found: the version.
            paths: which of its files; all of them unless given.

        Raises:
            InvalidModel: naming the first that is missing in the store, or another than was published.
            Unavailable: when the store cannot be read.
        """
        entries = found.manifest.files
        version = f"{found.manifest.name}@{found.manifest.version}"
        with cache.locked(self.root, version):  # who waited here finds everything
            os.utime(self.root / ".locks" / version)
            wanted = {path: entries[path] for path in paths or sorted(entries)}
            missing = {
                path: entry for path, entry in wanted.items() if not _is_whole(found.folder / path, entry)
            }
            if not missing:
                return
            with contextlib.suppress(OSError):
                raise Unavailable(self._fault.read_text(), retry_after=_RETRY_S)
            try:
                cache.make_room(
                    self.root.parent,
                    sum(entry.bytes for entry in missing.values()),
                    self._bound,
                    found.folder,
                )
                for path in missing:
                    if "/" in path:
                        (found.folder / path).parent.mkdir(exist_ok=True)
                self._at_once(lambda item: self._download(found, *item), missing.items())
            except OSError as error:
                raise Unavailable(
                    f"{version.replace('@', '/')} could not be brought into the cache: {error.strerror}."
                ) from error

    # ---------------------------------------------------------------- manifests and labels

    def _refresh(self) -> None:
        began = time.time()
        found = _grouped(self.remote.listing())
        versions = {name: [key for key in entries if key.isdecimal()] for name, entries in found.items()}
        if not any(versions.values()):
            raise NotFound(
                f"There are no models at {self.remote.shown}: name another --store, or publish one there."
            )
        seen = self._seen()
        now = {f"{name}/{key}": _stamp(files) for name, keys in found.items() for key, files in keys.items()}
        changed = [path for path in now if seen.get(path) != now[path] or not self._has(path)]
        changed += [f"{name}/{LABELS}" for name, keys in found.items() if _unknown(keys.get(LABELS))]
        changed = sorted({*changed}, key=lambda path: path.endswith(LABELS))  # after what they point at
        files = [path if path.endswith(LABELS) else f"{path}/{MANIFEST}" for path in changed]
        contents = self._at_once(self._small, files)
        for path, content in zip(changed, contents, strict=True):
            if isinstance(content, PushforwardError):  # the others count; it is tried again
                del now[path]
                self._note(path, content.message)
            elif path.endswith(LABELS):
                self._keep_labels(path, content)
            else:
                self._keep_version(path, content)
        self._forget(now, began)
        if now != seen:
            cache.write(self.root, self.root / ".seen.json", [json.dumps(now).encode()])

    def _small(self, path: str) -> bytes | PushforwardError:
        """A manifest or labels file: a byte more than is allowed at most, so that reading it refuses it."""
        limit = LABELS_MAX_BYTES if path.endswith(LABELS) else MAX_BYTES
        try:
            return self.remote.read(path, 0, limit + 1)
        except PushforwardError as error:
            return error

    def _note(self, path: str, fault: str) -> None:
        """Log why a file cannot be read, once."""
        if self._faults.get(path) != fault:
            log.warning("store cannot be read", extra=logs.fields(file=path, reason=fault))
        self._faults[path] = fault

    def _keep_labels(self, path: str, content: bytes) -> None:
        place = self.root / path
        place.parent.mkdir(exist_ok=True)
        if _content(place) != content:
            cache.write(self.root, place, [content])

    def _keep_version(self, path: str, content: bytes) -> None:
        folder = self.root / path
        if _content(folder / MANIFEST) == content:
            os.utime(folder)  # another file of it has changed: a version that failed is tried again
            return
        if not folder.exists():
            staged = cache.partial(self.root)
            staged.unlink()
            staged.mkdir()
            cache.write(self.root, staged / MANIFEST, [content])
            folder.parent.mkdir(exist_ok=True)
            with contextlib.suppress(OSError):  # another process was faster
                staged.rename(folder)
                return
            shutil.rmtree(staged)
        cache.write(self.root, folder / MANIFEST, [content])

    def _forget(self, now: Mapping[str, str], began: float) -> None:
        """Take away what the store does not have any more, unless it came after the listing was begun."""
        for folder in [*self.root.glob("[a-z0-9]*/[1-9]*"), *self.root.glob(f"[a-z0-9]*/{LABELS}")]:
            path = f"{folder.parent.name}/{folder.name}"
            if path in now or folder.lstat().st_mtime > began - _TICK_S:
                continue
            grave = cache.partial(self.root)
            grave.unlink()
            folder.rename(grave)
            if grave.is_dir():
                shutil.rmtree(grave, ignore_errors=True)
            else:
                grave.unlink()

    def _has(self, path: str) -> bool:
        place = self.root / path
        return place.is_file() if path.endswith(LABELS) else (place / MANIFEST).is_file()

    def _seen(self) -> dict[str, str]:
        try:
            seen = json.loads((self.root / ".seen.json").read_bytes())
        except (OSError, ValueError):
            return {}
        return seen if isinstance(seen, dict) else {}

    @contextlib.contextmanager
    def _changing_labels(self, name: str) -> Iterator[dict[str, int]]:
        """Read, change and replace the labels in the store, if nobody else did meanwhile."""
        self.versions(name)
        path = f"{name}/{LABELS}"
        before = self.remote.entry(path)
        content = b"{}" if before is None else self.remote.read(path, 0, LABELS_MAX_BYTES + 1)
        self._keep_labels(path, content)
        labels = self.labels(name)
        yield labels
        after = (json.dumps(dict(sorted(labels.items())), indent=2) + "\n").encode()
        self.remote.replace(path, after, before)
        self._keep_labels(path, after)

    # ---------------------------------------------------------------- the files of versions

    def _download(self, found: ModelVersion, path: str, entry: FileEntry) -> None:
        name = f"{found.manifest.name}/{found.manifest.version}/{path}"
        try:
            pieces = self._pieces(name, entry.bytes)
            sound = cache.write(self.root, found.folder / path, pieces, entry.sha256)
        except NotFound as error:
            raise InvalidModel(error.message, file=name) from None
        except UsageError as error:
            raise Unavailable(error.message, retry_after=_RETRY_S) from None
        if not sound:
            raise InvalidModel(
                f"{name} in the store was changed: its SHA-256 is not that of its manifest.",
                file=name,
            )

    def _pieces(self, name: str, size: int) -> Iterator[bytes]:
        for start in range(0, size, _PIECE_BYTES):
            end = min(start + _PIECE_BYTES, size)
            yield self.remote.read(name, start, end + (end == size))  # a longer file is another one

    @staticmethod
    def _at_once(do: Callable[[T], R], things: Iterable[T]) -> list[R]:
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            return list(pool.map(do, things))


def _grouped(listing: Mapping[str, Entry]) -> dict[str, dict[str, dict[str, Entry]]]:
    """Model → version or labels.json → path → entry, of what looks like a store; versions with a manifest."""
    found: dict[str, dict[str, dict[str, Entry]]] = {}
    for key, entry in listing.items():
        if match := _KEY.fullmatch(key):
            name, version, path = match.groups()
            found.setdefault(name, {}).setdefault(version or LABELS, {})[path or LABELS] = entry
    return {
        name: {key: files for key, files in keys.items() if key == LABELS or MANIFEST in files}
        for name, keys in found.items()
    }


def _stamp(files: Mapping[str, Entry]) -> str:
    """What changes when one of the files does, as far as the store says so."""
    text = "\n".join(f"{path} {entry.bytes} {entry.stamp}" for path, entry in sorted(files.items()))
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _unknown(labels: Mapping[str, Entry] | None) -> bool:
    """Whether labels have to be read to know whether they have changed, as from a plain web server."""
    return labels is not None and not labels[LABELS].stamp


def _content(path: Path) -> bytes | None:
    with contextlib.suppress(OSError):
        return path.read_bytes()
    return None


def _is_whole(path: Path, entry: FileEntry) -> bool:
    try:
        status = path.lstat()
        return (stat.S_ISREG(status.st_mode), status.st_size) == (True, entry.bytes) and (
            sha256_file(path) == entry.sha256
        )
    except OSError:
        return False
