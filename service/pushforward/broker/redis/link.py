"""One connection to Redis for all short calls of a process, sent together when there are several."""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections import deque
from collections.abc import Awaitable, Callable
from importlib.resources import files
from typing import Any

import redis.asyncio as redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import (
    AuthenticationError,
    NoScriptError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisError,
    ResponseError,
)

from pushforward.broker.redis.line import Line
from pushforward.connections import connect, shown
from pushforward.errors import Unavailable
from pushforward.logs import fields

__all__ = ["FAULTS", "PREFIX", "Link", "cancelled", "endlessly", "scripts"]

log = logging.getLogger(__name__)

PREFIX = "{pushforward}:"
# How a connection fails: writing to one that has just been closed is a RuntimeError to uvloop.
FAULTS = (TimeoutError, RedisError, OSError, RuntimeError)
_ANSWER_S = 2.0  # a server that does not answer for so long is taken for lost
_RETRY_S = 0.2  # between two attempts to find it again
_TOGETHER = 256  # calls that are sent at once …
_TOGETHER_BYTES = 4 << 20  # … unless they are long

_Call = tuple[str, tuple[Any, ...], asyncio.Future[Any]]  # the script, its arguments, its answer


def scripts() -> dict[str, str]:
    """The Lua scripts by name, each with ``common.lua`` after its first line."""
    folder = files(__package__) / "scripts"
    common = (folder / "common.lua").read_text()
    found = {}
    for file in folder.iterdir():
        name, _, kind = file.name.partition(".")
        if kind == "lua" and name != "common":
            first, _, rest = file.read_text().partition("\n")
            found[name] = f"{first}\n{common}\n{rest}"
    return found


async def endlessly(work: Callable[[], Awaitable[None]]) -> None:
    """Do work that ends only when it is meant to; what nobody thought of is logged, and it is begun again."""
    while True:
        try:
            return await work()
        except Exception:
            log.exception("queue work failed")
            await asyncio.sleep(_RETRY_S)


async def cancelled(*tasks: asyncio.Task[None]) -> None:
    """Cancel tasks until they have ended: ``asyncio.wait_for`` of Python 3.11 may swallow a cancellation."""
    while waiting := [task for task in tasks if not task.done()]:
        for task in waiting:
            task.cancel()
        await asyncio.wait(waiting, timeout=0.1)


class Link:
    """Calls scripts.  Calls reach the server in the order in which they were made.

    When the server is lost, calls fail at once until it is found again, which is tried all the time.

    Args:
        url: see ``connections.connect``.

    Attributes:
        times_found: how often the server was found.
    """

    def __init__(self, url: str) -> None:
        self.shown = shown(url)
        self._url = url
        self._scripts = scripts()
        self._hashes = {name: hashlib.sha1(text.encode()).hexdigest() for name, text in self._scripts.items()}
        self._line = self.line()
        self._calls: deque[_Call] = deque()
        self._sender: asyncio.Task[None] | None = None
        self._seeker: asyncio.Task[None] | None = None
        self._up = asyncio.Event()
        self._fault = "it has not been reached yet"
        self.times_found = 0

    @property
    def unavailable(self) -> str | None:
        """Why calls fail; None when they should not."""
        return None if self._up.is_set() else f"The queue at {self.shown} cannot be reached: {self._fault}."

    async def start(self) -> None:
        """Begin to seek the server."""
        self._seek()

    def client(self, wait_s: float) -> redis.Redis:
        """Another connection, for commands that wait for so long; close it with ``aclose``."""
        return connect(
            self._url,
            protocol=2,
            # A connection that was cut is made again at once.  Scripts may be sent twice: at worst, chunks
            # that were taken wait until their lease has run out.
            retry=Retry(NoBackoff(), 1, supported_errors=(redis.ConnectionError, RuntimeError)),  # type: ignore[arg-type]
            socket_timeout=wait_s + _ANSWER_S,
            socket_connect_timeout=_ANSWER_S,
        )

    def line(self) -> Line:
        """Another connection, for commands that go out together; close it with ``close``."""
        return Line(self.client(0.0), _ANSWER_S)

    async def found(self) -> None:
        """Wait until the server answers."""
        await self._up.wait()

    async def call(self, script: str, *arguments: Any) -> Any:
        """Call a script once.

        Raises:
            Unavailable: when the server is lost or refuses; the call may have been carried out all the same.
        """
        reason = self.unavailable
        if reason is not None:
            raise Unavailable(reason, retry_after=1)
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._calls.append((script, arguments, answer))
        if self._sender is None:
            self._sender = asyncio.create_task(self._send())
        return await answer

    async def close(self) -> None:
        """Send what is waiting, and end the connection."""
        if self._sender is not None:
            await asyncio.wait([self._sender], timeout=_ANSWER_S)
        if self._seeker is not None:
            await cancelled(self._seeker)
        self._up.clear()
        self._fail_all("it is closed")
        await self._line.close()

    async def _send(self) -> None:
        try:
            while self._calls:
                calls: list[_Call] = []
                size = 0
                while self._calls and len(calls) < _TOGETHER and size < _TOGETHER_BYTES:
                    calls.append(self._calls.popleft())
                    size += sum(len(part) for part in calls[-1][1] if isinstance(part, bytes))
                await self._send_together(calls)
        finally:
            self._sender = None

    async def _send_together(self, calls: list[_Call]) -> None:
        try:
            commands = [
                ("EVALSHA", self._hashes[script], 1, PREFIX, *arguments) for script, arguments, _ in calls
            ]
            answers = await self._line.send(commands)
            if any(isinstance(answer, NoScriptError) for answer in answers):
                await self._load()
                answers = [
                    (await self._line.send([command]))[0] if isinstance(answer, NoScriptError) else answer
                    for command, answer in zip(commands, answers, strict=True)
                ]
        except FAULTS as error:
            answers = [error] * len(calls)
            self._lose(error)
        else:
            for answer in answers:  # it is a replica now
                if isinstance(answer, ReadOnlyError):
                    self._lose(answer)
        for (script, _, future), answer in zip(calls, answers, strict=True):
            if future.done():
                continue
            if isinstance(answer, Exception):
                future.set_exception(self._refusal(script, answer))
            else:
                future.set_result(answer)

    def _refusal(self, script: str, error: Exception) -> Unavailable:
        if isinstance(error, OutOfMemoryError):
            return Unavailable(
                f"The queue at {self.shown} has no memory left: try again later, or raise its maxmemory.",
                retry_after=1,
                detail={"reason": "memory"},
            )
        if isinstance(error, ResponseError):
            log.error("queue refused a call", extra=fields(script=script, reason=str(error)))
        return Unavailable(f"The queue at {self.shown} failed: {_said(error)}.", retry_after=1)

    def _lose(self, error: Exception) -> None:
        if self._up.is_set():
            self._up.clear()
            log.error("queue lost", extra=fields(queue=self.shown, reason=_said(error)))
        self._fail_all(_said(error))
        self._seek()

    def _fail_all(self, fault: str) -> None:
        self._fault = fault
        while self._calls:
            _, _, future = self._calls.popleft()
            if not future.done():
                future.set_exception(Unavailable(str(self.unavailable), retry_after=1))

    def _seek(self) -> None:
        if self._seeker is None or self._seeker.done():
            self._seeker = asyncio.create_task(self._until_found())

    async def _until_found(self) -> None:
        while True:
            try:
                await self._load()
            except FAULTS as error:
                fault = _said(error)
                if fault != self._fault:
                    log.warning("queue not found", extra=fields(queue=self.shown, reason=fault))
                self._fault = fault
                await asyncio.sleep(_RETRY_S)
            else:
                self.times_found += 1
                self._up.set()
                log.info("queue found", extra=fields(queue=self.shown))
                return

    async def _load(self) -> None:
        commands: list[tuple[Any, ...]] = [("SCRIPT", "LOAD", text) for text in self._scripts.values()]
        commands.append(("EVALSHA", self._hashes["cancel"], 1, PREFIX))  # it can be written, too
        for answer in await self._line.send(commands):
            if isinstance(answer, ResponseError):
                raise answer


def _said(error: Exception) -> str:
    if isinstance(error, AuthenticationError):
        return "it does not accept the password"
    if isinstance(error, ReadOnlyError):
        return "it is a replica, which cannot be written"
    if isinstance(error, TimeoutError) or "imeout" in type(error).__name__:
        return "it does not answer"
    return str(error).rstrip(".") or type(error).__name__
