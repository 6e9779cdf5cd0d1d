"""Keys in a file: for one server, or several that see the same disk."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

import msgspec

from pushforward.errors import PushforwardError, Unavailable, UsageError
from pushforward.keys.key import Key, decode_all, encode_all
from pushforward.keys.quota import LocalQuotas

__all__ = ["KeyFile"]

_MAX_BYTES = 1 << 24


class KeyFile:
    """Keys in a JSON file that only its owner can read; replaced as a whole.

    Args:
        path: of the file; ``add`` makes it.
    """

    def __init__(self, path: Path) -> None:
        self.shown = str(path)
        self.quotas = LocalQuotas()
        self._path = path
        self._seen: tuple[int, int, int] | None = None

    async def read(self) -> list[Key] | None:
        """See ``Keys``."""
        return await asyncio.to_thread(self._read)

    async def add(self, key: Key) -> None:
        """See ``Keys``."""
        with self._changing(missing_ok=True) as keys:
            keys[key.id] = key

    async def remove(self, number: str) -> Key | None:
        """See ``Keys``."""
        with self._changing() as keys:
            return keys.pop(number, None)

    async def close(self) -> None:
        """See ``Keys``."""

    def _read(self) -> list[Key] | None:
        try:
            with self._path.open("rb") as stream:
                about = os.fstat(stream.fileno())
                seen = about.st_ino, about.st_mtime_ns, about.st_size
                if seen == self._seen:
                    return None
                text = stream.read(_MAX_BYTES + 1)
        except FileNotFoundError:
            raise UsageError(
                f"There are no keys at {self.shown}: make the first with `pushforward keys create`."
            ) from None
        except OSError as error:
            raise Unavailable(f"The keys at {self.shown} cannot be read: {error.strerror}.") from None
        if about.st_mode & stat.S_IWOTH:
            raise UsageError(f"Anyone can write to {self.shown}: chmod it to 0600.")
        try:
            keys = decode_all(text)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise UsageError(f"{self.shown} is not a file of keys: {error}.") from None
        self._seen = seen
        return keys

    @contextlib.contextmanager
    def _changing(self, *, missing_ok: bool = False) -> Iterator[dict[str, Key]]:
        """Read, change and replace the file while no other process does the same."""
        folder = self._path.absolute().parent
        try:
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX)
                self._seen = None
                keys: dict[str, Key] = {}
                if not missing_ok or self._path.exists():
                    keys = {key.id: key for key in self._read() or ()}
                yield keys
                self._replace(encode_all(list(keys.values())))
                os.fsync(descriptor)  # the rename is durable only once its folder is
            finally:
                os.close(descriptor)
        except OSError as error:
            raise PushforwardError(f"The keys at {self.shown} cannot be written: {error.strerror}.") from None

    def _replace(self, text: bytes) -> None:
        descriptor, temporary = tempfile.mkstemp(dir=self._path.absolute().parent, prefix=".keys.")  # 0600
        try:
            with open(descriptor, "wb") as stream:
                stream.write(text)
                stream.flush()
                if self._path.exists() and os.geteuid() == 0:  # root changes it for the server's user
                    about = self._path.stat()
                    os.fchown(descriptor, about.st_uid, about.st_gid)
                os.fsync(descriptor)
            os.replace(temporary, self._path)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
            raise
