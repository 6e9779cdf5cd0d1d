"""A folder of files that can be had again: written whole or not at all, shared by processes, bounded.

<cache>/<store>/<name>/<version>/…     the layout of a model store
<cache>/<store>/.locks/<name>@<version>   held while a version is fetched; its time is that of the last use
<cache>/<store>/.partial/…             unfinished files
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from pushforward.errors import UsageError
from pushforward.store.manifest import MANIFEST

__all__ = ["locked", "make_room", "partial", "place_of", "write"]

# The same bucket behind another endpoint is another store.
_ENDPOINTS = ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "FSSPEC_S3_ENDPOINT_URL", "FSSPEC_S3")

_ABANDONED_S = 86_400


def place_of(url: str, cache: Path | None) -> Path:
    """The folder for a store, made if missing.

    Args:
        url: of the store.
        cache: folder of all stores; None for ``pushforward`` in the user's cache folder.

    Raises:
        UsageError: when it cannot be written.
    """
    if cache is None:
        home = os.environ.get("XDG_CACHE_HOME", "")  # by its rules, nothing but an absolute path counts
        cache = (Path(home) if os.path.isabs(home) else Path.home() / ".cache") / "pushforward"
    key = "\n".join([url, *(os.environ.get(name, "") for name in _ENDPOINTS)])
    readable = re.sub(r"[^a-z0-9]+", "-", url.partition("?")[0].rpartition("@")[2].lower()).strip("-")[-60:]
    folder = cache.absolute() / f"{readable}-{hashlib.sha256(key.encode()).hexdigest()[:12]}"
    try:
        for part in (".partial", ".locks"):
            (folder / part).mkdir(mode=0o700, parents=True, exist_ok=True)
        partial(folder).unlink()
        for left in (folder / ".partial").iterdir():  # of processes that were killed
            if left.lstat().st_mtime < time.time() - _ABANDONED_S:
                shutil.rmtree(left) if left.is_dir() else left.unlink()
    except OSError as error:
        raise UsageError(
            f"The cache folder {cache} cannot be written ({error.strerror}): "
            "name another with --cache or PUSHFORWARD_CACHE."
        ) from None
    return folder


def partial(root: Path) -> Path:
    """A fresh file for unfinished content, on the file system of the cache."""
    descriptor, name = tempfile.mkstemp(dir=root / ".partial")
    os.close(descriptor)
    return Path(name)


def write(root: Path, path: Path, pieces: Iterable[bytes], sha256: str | None = None) -> bool:
    """Write a file of a cache, so that it is there whole or not at all, whatever interrupts.

    Args:
        root: of the cache of the store.
        path: of the file, in a folder that exists.
        pieces: its content.
        sha256: what the content must hash to, if that is known.

    Returns:
        Whether it does; otherwise nothing is changed.

    Raises:
        OSError: when the disk does not take it.
    """
    temporary, digest = partial(root), hashlib.sha256()
    try:
        with temporary.open("wb") as stream:
            for piece in pieces:
                digest.update(piece)
                stream.write(piece)
            stream.flush()
            os.fsync(stream.fileno())
        if sha256 is not None and digest.hexdigest() != sha256:
            return False
        os.replace(temporary, path)
        return True
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(root: Path, version: str, wait: bool = True) -> Iterator[bool]:
    """Hold the lock of a version, across processes; tells whether it is held.

    Args:
        root: of the cache of the store.
        version: ``<name>@<number>``.
        wait: until it is free.
    """
    descriptor = os.open(root / ".locks" / version, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
        else:
            yield True
    finally:
        os.close(descriptor)


def make_room(cache: Path, need: int, bound: int, keep: Path) -> None:
    """Give up the files of versions that were not used for longest, until there is room for more.

    Manifests stay: they are what a version is known by. What is needed is never refused, even if it is more
    than the bound.

    Args:
        cache: folder of all stores.
        need: bytes that are to be written.
        bound: bytes that all files may take.
        keep: folder of the version that they are for.
    """
    versions = [
        (_last_used(folder), sum(size for _, size in files), folder, [path for path, _ in files])
        for folder in cache.glob("*/[a-z0-9]*/[1-9]*")
        if (files := _files(folder))
    ]
    total = need + sum(size for _, size, *_ in versions)
    for _, size, folder, paths in sorted(versions):
        if total <= bound:
            return
        with locked(folder.parents[1], f"{folder.parent.name}@{folder.name}", wait=False) as held:
            if held and folder != keep:
                for path in paths:
                    path.unlink(missing_ok=True)
                total -= size


def _last_used(folder: Path) -> float:
    with contextlib.suppress(OSError):
        return (folder.parents[1] / ".locks" / f"{folder.parent.name}@{folder.name}").stat().st_mtime
    return 0.0


def _files(folder: Path) -> list[tuple[Path, int]]:
    """The files of a version that can be had again, with their sizes."""
    found = []
    for place, _, names in os.walk(folder):
        for name in names:
            path = Path(place, name)
            with contextlib.suppress(OSError):
                if name != MANIFEST:
                    found.append((path, path.lstat().st_size))
    return found
