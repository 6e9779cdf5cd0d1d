"""A model store behind a URL: listings, pieces of files, and writes that can lose a race but never overwrite.

Whatever fsspec speaks can be a store: ``s3://bucket/prefix``, ``gs://…``, ``az://…``, ``file:///…``, and
``http(s)://…`` to read. Credentials and endpoints come from where the backend itself looks for them. What a
listing says is not trusted: callers take from it only the paths that they know.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn
from urllib.parse import urlsplit, urlunsplit

from pushforward import logs
from pushforward.errors import Conflict, NotFound, PublishFailed, PushforwardError, Unavailable, UsageError

__all__ = ["Entry", "Remote", "is_url"]

log = logging.getLogger(__name__)

# What backends call the time or the generation of a file.
_STAMPS = ("ETag", "etag", "generation", "mtime", "LastModified", "last_modified", "updated", "created")
# A store that hangs must not keep a thread for minutes: s3fs tries five times by itself.
_OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "s3": {"config_kwargs": {"read_timeout": 5, "retries": {"mode": "standard", "total_max_attempts": 2}}}
}


def is_url(store: str) -> bool:
    """Whether a store is named by a URL, rather than by the path of a folder.

    >>> is_url("s3://bucket/models"), is_url("model_store")
    (True, False)
    """
    return "://" in store


@dataclass(frozen=True)
class Entry:
    """A file of a listing."""

    bytes: int | None
    """Its size, if the backend says so."""
    stamp: str
    """What changes when it does; empty if the backend says nothing of the kind."""
    etag: str | None = None
    """What a conditional write can name, on S3."""


class Remote:
    """The files under a URL. Paths are relative to it.

    Args:
        url: where the store is; nothing is sent yet.

    Raises:
        UsageError: for an unknown protocol, or one whose package is missing.
    """

    def __init__(self, url: str) -> None:
        self.shown = _shown(url)
        try:
            import fsspec
        except ModuleNotFoundError:
            raise UsageError(
                f"A store at a URL ({self.shown}) needs fsspec and the package of its protocol: "
                "pip install 'pushforward[s3]' for s3://, or fsspec with gcsfs for gs://, adlfs for az://, "
                "aiohttp for http://."
            ) from None
        protocol = url.partition("://")[0]
        options = {} if protocol in fsspec.config.conf else dict(_OPTIONS.get(protocol, {}))
        logging.getLogger("aiobotocore.credentials").setLevel(logging.WARNING)
        try:
            self._fs, base = fsspec.url_to_fs(
                url, use_listings_cache=False, skip_instance_cache=True, **options
            )
        except ImportError as error:
            extra = " (pip install 'pushforward[s3]')" if protocol == "s3" else ""
            raise UsageError(f"The store {self.shown} cannot be opened: {error}{extra}.") from None
        except Exception as error:  # whatever a backend makes of a URL that is none
            raise UsageError(f"The store {self.shown} cannot be opened: {error}.") from None
        self._base = base.rstrip("/")
        self._protocol = protocol
        if not self._base:
            raise UsageError(f"The store {self.shown} names no place: s3://bucket/prefix would be one.")

    def listing(self, under: str = "") -> dict[str, Entry]:
        """Every file below a path: one (paginated) request where the backend lists keys.

        Raises:
            UsageError: when the credentials are missing or not enough.
            NotFound: when the bucket is not there.
            Unavailable: when the store cannot be reached.
        """
        prefix = f"{self._base}/"
        try:
            found = self._fs.find(f"{prefix}{under}".rstrip("/"), detail=True)
        except Exception as error:
            self._raise(error, "cannot be listed")
        return {
            path[len(prefix) :]: _entry(facts) for path, facts in found.items() if path.startswith(prefix)
        }

    def entry(self, path: str) -> Entry | None:
        """What a listing would say of one file; None when it is not there. Raises as ``listing``."""
        try:
            return _entry(self._fs.info(f"{self._base}/{path}"))
        except FileNotFoundError:
            return None
        except Exception as error:
            self._raise(error, f"does not tell of {path}")

    def read(self, path: str, start: int, end: int) -> bytes:
        """Bytes ``start`` to ``end`` of a file, or as many as there are.

        Raises:
            NotFound: when it is not there.
            UsageError: when the credentials are missing or not enough.
            Unavailable: when the store cannot be reached.
        """
        try:
            data: bytes = self._fs.cat_file(f"{self._base}/{path}", start=start, end=end)
        except FileNotFoundError:
            raise NotFound(f"{path} is missing in {self.shown}.") from None
        except OSError as error:
            if _code(error) in _NOTHING_THERE:
                return b""
            self._raise(error, f"cannot read {path}")
        except Exception as error:
            self._raise(error, f"cannot read {path}")
        return data[: end - start]  # a web server may answer a range with everything

    def create(self, path: str, content: bytes) -> None:
        """Write a file that must not be there yet.

        Raises:
            Conflict: when it is.
            PublishFailed: when it cannot be written.
        """
        self._write(path, content, "create")

    def replace(self, path: str, content: bytes, seen: Entry | None) -> None:
        """Write a file whose last state was ``seen``, None for not there.

        S3 writes only if that still holds; other backends, only if there was nothing before.

        Raises:
            Conflict: when it has changed since.
            PublishFailed: when it cannot be written.
        """
        if seen is None:
            self.create(path, content)
        elif seen.etag and self._protocol in ("s3", "s3a"):
            self._write(path, content, "overwrite", IfMatch=seen.etag)
        else:
            self._write(path, content, "overwrite")

    def remove(self, paths: Iterable[str]) -> None:
        """Delete files, if that is possible."""
        try:
            for path in paths:
                self._fs.rm_file(f"{self._base}/{path}")
        except Exception as error:  # no right to, or the store is away: the caller has said what matters
            log.warning("unfinished files are left over", extra=logs.fields(file=path, reason=str(error)))

    def _write(self, path: str, content: bytes, mode: str, **condition: str) -> None:
        place = f"{self._base}/{path}"
        try:
            if self._protocol in ("file", "local"):  # fsspec's own create looks first and writes then
                self._fs.makedirs(place.rpartition("/")[0], exist_ok=True)
                with self._fs.open(place, "xb" if mode == "create" else "wb") as stream:
                    stream.write(content)
            else:
                self._fs.pipe_file(place, content, mode=mode, **condition)
        except Exception as error:
            if isinstance(error, FileExistsError) or _code(error) in _LOST:
                raise Conflict(f"{path} in {self.shown} was written by someone else meanwhile.") from None
            if isinstance(error, NotImplementedError):
                raise PublishFailed(f"{self.shown} can only be read.") from None
            reason = self._explained(error, "cannot be written").message
            raise PublishFailed(reason) from error

    def _raise(self, error: Exception, what: str) -> NoReturn:
        raise self._explained(error, what) from error

    def _explained(self, error: Exception, what: str) -> PushforwardError:
        told = str(error).rstrip(".") or type(error).__name__
        if isinstance(error, PermissionError):
            return UsageError(
                f"The store {self.shown} {what}: {told}. The credentials must allow to list the bucket "
                "and to read what is under the prefix, and for publishing to write there."
            )
        if "Credential" in type(error).__name__:  # botocore's, which is not always there to be named
            return UsageError(
                f"The store {self.shown} {what}: {told}. Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
                "AWS_PROFILE, or give the machine a role."
            )
        if isinstance(error, FileNotFoundError):
            return NotFound(f"There is no model store at {self.shown}: {told}.")
        return Unavailable(f"The store {self.shown} {what}: {told}.")


# What S3 says of a range that begins at the end of an object.
_NOTHING_THERE = ("InvalidRange", "416")
# S3 says the second while two conditional writes of one key are under way.
_LOST = ("PreconditionFailed", "ConditionalRequestConflict", "412", "409")


def _code(error: BaseException) -> str:
    """The code of the S3 error that another was made from."""
    response = getattr(error.__cause__, "response", None) or {}
    return str(response.get("Error", {}).get("Code", ""))


def _entry(facts: Mapping[str, Any]) -> Entry:
    stamps = [f"{facts[name]}" for name in _STAMPS if facts.get(name) is not None]
    return Entry(facts.get("size"), "|".join(stamps), facts.get("ETag"))


def _shown(url: str) -> str:
    """The URL without what must stay secret."""
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))
