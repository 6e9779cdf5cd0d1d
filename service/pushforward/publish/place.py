"""Where a version is published: a folder, or a store behind a URL."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Protocol

from pushforward.errors import Conflict, NotFound, PublishFailed
from pushforward.store.manifest import MANIFEST
from pushforward.store.remote import Remote, is_url

__all__ = ["Place", "place_at"]


class Place(Protocol):
    """A store that versions are added to.  Whatever cannot be written is ``PublishFailed``."""

    def staging(self) -> AbstractContextManager[Path]:
        """A folder to make the version in, which is gone afterwards."""

    def next_number(self, name: str) -> AbstractContextManager[int]:
        """The number of the next version of a model."""

    def put(self, folder: Path) -> None:
        """Give ``…/<name>/<number>``, which is complete, its place in the store.

        Raises:
            Conflict: when another publisher took the number.
        """


def place_at(store: Path | str) -> Place:
    """The place that a folder or URL names.

    Raises:
        UsageError: for a URL that nothing here can open.
    """
    return _Elsewhere(Remote(store)) if isinstance(store, str) and is_url(store) else _Folder(Path(store))


class _Folder:
    """A local store: a version is made in a hidden folder, and renamed."""

    def __init__(self, root: Path) -> None:
        self._root = root

    @contextmanager
    def staging(self) -> Iterator[Path]:
        try:
            self._root.mkdir(parents=True, exist_ok=True)
            folder = Path(tempfile.mkdtemp(prefix=".publishing-", dir=self._root))
        except OSError as error:
            raise PublishFailed(
                f"The store {self._root.name} cannot be written: {error.strerror}."
            ) from error
        with _gone_afterwards(folder):
            yield folder

    @contextmanager
    def next_number(self, name: str) -> Iterator[int]:
        """One publisher at a time per model, so that version numbers do not collide."""
        folder = self._root / name
        made = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield _next(path.name for path in folder.iterdir())
        except BaseException:
            if made and not any(folder.iterdir()):
                folder.rmdir()
            raise
        finally:
            os.close(descriptor)

    def put(self, folder: Path) -> None:
        _sync(folder)
        target = self._root / folder.parent.name
        folder.rename(target / folder.name)
        _sync(target, recurse=False)


class _Elsewhere:
    """A store behind a URL: the first file claims the number, and the manifest makes it count.

    Every file is written only if it is not there yet, so of two publishers one loses at the first file,
    before it has touched anything of the other's.  A number whose publisher was killed is not used again.
    """

    def __init__(self, remote: Remote) -> None:
        self._remote = remote

    @contextmanager
    def staging(self) -> Iterator[Path]:
        folder = Path(tempfile.mkdtemp(prefix="pushforward-publishing-"))
        with _gone_afterwards(folder):
            yield folder

    @contextmanager
    def next_number(self, name: str) -> Iterator[int]:
        try:
            taken = self._remote.listing(name)
        except NotFound as error:  # no bucket
            raise PublishFailed(error.message) from None
        yield _next(path.split("/")[1] for path in taken)

    def put(self, folder: Path) -> None:
        version = f"{folder.parent.name}/{folder.name}"
        claim, *files = sorted(
            path.relative_to(folder).as_posix()
            for path in folder.rglob("*")
            if path.is_file() and path.name != MANIFEST
        )
        try:
            self._remote.create(f"{version}/{claim}", (folder / claim).read_bytes())
        except Conflict:
            raise Conflict(
                f"{version} is taken: another publisher was faster. Nothing of it was touched; "
                "publish again, and the version gets the next number."
            ) from None
        written = [f"{version}/{claim}"]
        try:
            for file in files:
                self._create(f"{version}/{file}", (folder / file).read_bytes())
                written.append(f"{version}/{file}")
        except BaseException:
            self._remote.remove(written)
            raise
        try:
            self._create(f"{version}/{MANIFEST}", (folder / MANIFEST).read_bytes())
        except PublishFailed as error:  # it may have arrived all the same, so nothing is taken away
            raise PublishFailed(f"Whether {version} was published is not known: {error.message}") from error

    def _create(self, path: str, content: bytes) -> None:
        """Write a file of a number that is ours; it may be there from an attempt whose answer was lost."""
        try:
            self._remote.create(path, content)
        except Conflict:
            if self._remote.read(path, 0, len(content) + 1) != content:
                raise


def _next(taken: Iterable[str]) -> int:
    return 1 + max((int(name) for name in taken if name.isdecimal() and name.isascii()), default=0)


@contextmanager
def _gone_afterwards(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise PublishFailed(
            f"The version could not be written: {error.strerror}. "
            "Nothing was published; the store is as it was."
        ) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _sync(folder: Path, recurse: bool = True) -> None:
    """Have the disk keep what was written before it is named."""
    for path in [*(folder.rglob("*") if recurse else ()), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
