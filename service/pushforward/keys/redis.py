"""Keys in Redis or Valkey: several servers share them, and what they may ask for.

All of it is under ``{pushforward}:``

    keys              hash: id → record, as JSON
    keys:changed      counter of changes: servers look at it, and read the hash when it moves
    quota:<id>        hash: tokens of a key, and when they were counted
    in-flight:<id>    sorted set: "<rows>:<request>" until when
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable
from importlib.resources import files
from typing import Any, cast

import msgspec
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from pushforward.connections import connect, shown
from pushforward.errors import Unavailable, UsageError
from pushforward.keys.key import Key, decode, encode
from pushforward.keys.quota import LocalQuotas, check_possible, refusal
from pushforward.logs import fields

__all__ = ["RedisKeys"]

log = logging.getLogger(__name__)

_PREFIX = "{pushforward}:"
_KEYS, _CHANGED = _PREFIX + "keys", _PREFIX + "keys:changed"
_ANSWER_S = 1.0  # a server that does not answer for so long is taken for lost
_FAULTS = (RedisError, OSError, TimeoutError)


class RedisKeys:
    """Keys in Redis.

    Args:
        url: see ``connections.connect``.
    """

    def __init__(self, url: str) -> None:
        self.shown = shown(url)
        self._client = connect(
            url, socket_timeout=_ANSWER_S, socket_connect_timeout=_ANSWER_S, retry=Retry(NoBackoff(), 1)
        )
        self.quotas = RedisQuotas(self._client)
        self._seen: bytes | None = None

    async def read(self) -> list[Key] | None:
        """See ``Keys``."""
        try:
            changed = await cast(Awaitable[bytes | None], self._client.get(_CHANGED)) or b"0"
            if changed == self._seen:
                return None
            kept = await cast(Awaitable[dict[bytes, bytes]], self._client.hgetall(_KEYS))
        except _FAULTS as error:
            raise self._lost(error) from None
        try:
            keys = [decode(record) for record in kept.values()]
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise UsageError(f"What is kept at {self.shown} are not keys: {error}.") from None
        self._seen = changed  # if they changed in between, it moves again
        return keys

    async def add(self, key: Key) -> None:
        """See ``Keys``."""
        await self._change("HSET", key.id, encode(key))

    async def remove(self, number: str) -> Key | None:
        """See ``Keys``."""
        try:
            record = await cast(Awaitable[bytes | None], self._client.hget(_KEYS, number))
        except _FAULTS as error:
            raise self._lost(error) from None
        if record is None:
            return None
        await self._change("HDEL", number)
        return decode(record)

    async def close(self) -> None:
        """See ``Keys``."""
        await self._client.aclose()

    async def _change(self, command: str, *arguments: Any) -> None:
        try:
            async with self._client.pipeline(transaction=True) as together:
                together.execute_command(command, _KEYS, *arguments)
                together.incr(_CHANGED)
                await together.execute()
        except _FAULTS as error:
            raise self._lost(error) from None

    def _lost(self, error: BaseException) -> Unavailable:
        return Unavailable(
            f"The keys at {self.shown} cannot be reached: {str(error).rstrip('.') or type(error).__name__}."
        )


class RedisQuotas:
    """Counts for all servers together; within this process alone while Redis cannot be reached.

    Rows of a server that died are in flight until the deadline of their request.

    Args:
        client: of Redis.
    """

    def __init__(self, client: Any) -> None:
        self._client = client
        self._take = client.register_script(files(__package__).joinpath("take.lua").read_text())
        self._alone = LocalQuotas()
        self._counted_alone: set[str] = set()
        self._alone_until = 0.0
        self._returns: set[asyncio.Task[None]] = set()

    async def take(self, key: Key, rows: int, request: str, timeout_s: float) -> None:
        """See ``Quotas``."""
        check_possible(key, rows)
        if time.monotonic() < self._alone_until:
            self._take_alone(key, rows, request)
            return
        names = [f"{_PREFIX}quota:{key.id}", f"{_PREFIX}in-flight:{key.id}"]
        limits = [key.rows_per_second or 0, key.burst, key.rows_in_flight or 0]
        try:
            told = await self._take(keys=names, args=[rows, *limits, f"{rows}:{request}", timeout_s])
        except _FAULTS as error:
            log.warning("quotas are counted by this server alone", extra=fields(reason=str(error)))
            self._alone_until = time.monotonic() + 1
            self._take_alone(key, rows, request)
            return
        if told:
            raise refusal(key, told[0].decode(), rows, int(float(told[1])), float(told[2]))

    def give_back(self, key: Key, rows: int, request: str) -> None:
        """See ``Quotas``."""
        if request in self._counted_alone:
            self._counted_alone.discard(request)
            self._alone.give_back(key, rows, request)
        elif key.rows_in_flight is not None:
            task = asyncio.get_running_loop().create_task(self._return(key, f"{rows}:{request}"))
            self._returns.add(task)
            task.add_done_callback(self._returns.discard)

    def _take_alone(self, key: Key, rows: int, request: str) -> None:
        self._alone.count(key, rows)
        self._counted_alone.add(request)

    async def _return(self, key: Key, member: str) -> None:
        with contextlib.suppress(*_FAULTS):  # they leave by themselves at their deadline
            await self._client.zrem(f"{_PREFIX}in-flight:{key.id}", member)
