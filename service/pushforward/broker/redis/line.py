"""A connection that is kept, on which commands go out together."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import hiredis
import redis.asyncio as redis
from redis.asyncio.connection import AbstractConnection
from redis.exceptions import ResponseError

__all__ = ["Line"]


class Line:
    """Sends commands on one connection and reads their answers.  One task at a time.

    This is what ``redis.asyncio.Redis.pipeline`` does, without what it does besides for each command: take a
    connection from a pool and ask whether it lives, start a task for the write and a timer for every answer.

    Args:
        client: knows where the server is; nothing else uses it.
        patience_s: a server that does not answer for so long is taken for lost.
    """

    def __init__(self, client: redis.Redis, patience_s: float) -> None:
        self._client = client
        self._connection: AbstractConnection = client.connection_pool.make_connection()  # type: ignore[no-untyped-call]
        self._patience_s = patience_s

    async def send(self, commands: Sequence[tuple[Any, ...]], wait_s: float = 0.0) -> list[Any]:
        """Send commands; their answers, with what was refused as an error in its place.

        Args:
            commands: the words of each: text, bytes and numbers.
            wait_s: how long the server may take beyond its usual time.

        Raises:
            TimeoutError, RedisError, OSError, RuntimeError: when it is lost; the next call seeks it again.
        """
        packed = [hiredis.pack_command(command) for command in commands]
        return await self._connection.retry.call_with_retry(
            lambda: self._exchange(packed, self._patience_s + wait_s),
            lambda error: self._connection.disconnect(),
        )

    async def close(self) -> None:
        """End the connection."""
        await self._connection.disconnect()
        await self._client.aclose()

    async def _exchange(self, packed: list[bytes], patience_s: float) -> list[Any]:
        connection = self._connection
        if connection.is_connected and await connection.can_read():
            await connection.disconnect()  # it has ended, or says what nobody asked
        if not connection.is_connected:
            connection.socket_timeout = self._patience_s
            await connection.connect()  # type: ignore[no-untyped-call]
            connection.socket_timeout = None  # from now on, one timer for all that is sent together
        async with asyncio.timeout(patience_s):
            await connection.send_packed_command(packed)
            answers: list[Any] = []
            for _ in packed:
                try:
                    answers.append(await connection.read_response())
                except ResponseError as error:
                    answers.append(error)
            return answers
