"""The keys as a server knows them: read again twice a second, and asked for every request."""

from __future__ import annotations

import asyncio
import itertools
import logging
import secrets
import time
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from typing import Protocol

from pushforward.errors import Forbidden, PushforwardError, Unauthorized, Unavailable
from pushforward.keys.key import Key, Scope, opens, split
from pushforward.keys.quota import Quotas
from pushforward.logs import fields

__all__ = ["Keyring", "Keys"]

log = logging.getLogger(__name__)

_LOOK_S = 0.4  # a key that was revoked opens nothing after a second
_KEPT_S = 300.0  # how long keys are believed that cannot be read again: long enough to restart Redis
_HOW = "Send it as Authorization: Bearer pf_…, or as X-API-Key."


class Keys(Protocol):
    """A place where keys are kept.

    Attributes:
        shown: the place, for messages; no secret is in it.
    """

    shown: str

    @property
    def quotas(self) -> Quotas:
        """Counts what the keys ask for."""
        ...

    async def read(self) -> Iterable[Key] | None:
        """All keys; None when they are those of the last call.

        Raises:
            Unavailable: when they cannot be read now.
            UsageError: when there are none, or what is there is not to be trusted.
        """
        ...

    async def add(self, key: Key) -> None:
        """Keep a key. Errors are those of ``read``."""
        ...

    async def remove(self, number: str) -> Key | None:
        """Forget the key with this id; None when there is none. Errors are those of ``read``."""
        ...

    async def close(self) -> None:
        """Let go of the place."""
        ...


class Keyring:
    """Tells who may do what.

    While keys cannot be read, those that were read last are believed for five minutes; then nobody is let in.
    So neither does a broken disk open the door, nor a restart of Redis close it.

    Args:
        keys: where they are kept.
        clock: seconds that never go back.
    """

    def __init__(self, keys: Keys, clock: Callable[[], float] = time.monotonic) -> None:
        self._source = keys
        self._clock = clock
        self._keys: dict[str, Key] = {}
        self._read_at = -float("inf")
        self._fault: str | None = None
        self._watch: asyncio.Task[None] | None = None
        self._closed = False
        run = secrets.token_hex(4)
        self._requests = (f"{run}-{number}" for number in itertools.count())

    async def start(self) -> None:
        """Read the keys, and go on reading them; until they could be read, nobody is let in."""
        await self._look()
        self._watch = asyncio.get_running_loop().create_task(self._look_again())

    async def close(self) -> None:
        """Read no more."""
        self._closed = True
        if self._watch is not None:
            self._watch.cancel()
            await asyncio.wait([self._watch])
        await self._source.close()

    def unavailable(self) -> str | None:
        """Why nobody is let in; None when those who have a key are."""
        if self._clock() - self._read_at > _KEPT_S:
            return "The API keys cannot be read now."
        return None

    def identify(self, token: bytes | None, scope: Scope) -> Key:
        """The key that somebody sent, if it is good for this.

        Args:
            token: what was sent; None for nothing.
            scope: what it is wanted for.

        Raises:
            Unauthorized: when it is no key, or one that is not known (any more).
            Forbidden: when it has not the scope.
            Unavailable: when the keys cannot be read.
        """
        reason = self.unavailable()
        if reason is not None:
            raise Unavailable(reason, retry_after=1)
        if token is None:
            raise Unauthorized(f"This needs an API key. {_HOW}")
        parts = split(token)
        if parts is None:
            raise Unauthorized(f"What was sent is not an API key of this server. {_HOW}")
        key = self._keys.get(parts[0])
        if not opens(key, parts[1]):
            raise Unauthorized("This API key is not known here: it may have been revoked.")
        assert key is not None
        if key.has_expired():
            assert key.expires is not None
            raise Unauthorized(f"This API key expired at {key.expires.isoformat()}.")
        if scope not in key.scopes:
            raise Forbidden(
                f"This API key has not the scope {scope!r}: it has {', '.join(key.scopes)}.", scope=scope
            )
        return key

    @asynccontextmanager
    async def counted(self, key: Key, rows: int, timeout_s: float) -> AsyncIterator[None]:
        """Count rows for a key, in flight for as long as the block runs; see ``Quotas.take``."""
        request = next(self._requests)
        try:
            await self._source.quotas.take(key, rows, request, timeout_s)
        except asyncio.CancelledError:  # perhaps counted, perhaps not
            self._source.quotas.give_back(key, rows, request)
            raise
        try:
            yield
        finally:
            self._source.quotas.give_back(key, rows, request)

    async def _look_again(self) -> None:
        while not self._closed:  # a library under us may swallow the cancellation
            await asyncio.sleep(_LOOK_S)
            await self._look()

    async def _look(self) -> None:
        try:
            self._adopt(await self._source.read())
        except PushforwardError as error:
            self._failed(error.message)
        except Exception as error:  # nothing that happens to a key ends the reading of keys
            self._failed(f"{type(error).__name__}: {error}")

    def _adopt(self, keys: Iterable[Key] | None) -> None:
        self._read_at = self._clock()
        if self._fault is not None:
            log.warning("keys can be read again", extra=fields(keys=self._source.shown))
            self._fault = None
        if keys is not None:
            before, self._keys = self._keys, {key.id: key for key in keys}
            log.info(
                "keys read",
                extra=fields(
                    keys=self._source.shown,
                    known=len(self._keys),
                    added=sorted(self._keys.keys() - before.keys())[:20],
                    removed=sorted(before.keys() - self._keys.keys())[:20],
                ),
            )

    def _failed(self, reason: str) -> None:
        if reason != self._fault:
            log.error(
                "keys cannot be read",
                extra=fields(keys=self._source.shown, reason=reason, known=len(self._keys), kept_s=_KEPT_S),
            )
            self._fault = reason
