"""The end of the queue that asks: chunks out, answers in, and what all who ask may hold together.

What was taken in outlives the server.  A chunk is kept here until it is answered, and queued again when the
server has come back without it: chunks are pure functions, so an answer that was lost is made again.  Orders
and cancelled chunks are told until the server has heard of them.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import secrets
import socket
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec
from redis.exceptions import ResponseError

from pushforward.broker.base import full, merge_models
from pushforward.broker.redis.link import FAULTS, PREFIX, Link, cancelled, endlessly
from pushforward.broker.redis.words import Announcement, decode_announcement
from pushforward.errors import PushforwardError, Unavailable, from_code
from pushforward.logs import fields
from pushforward.messages import Failed, Load, ModelState, Result, Unload, Work, decode_from_worker, encode

__all__ = ["SPARE", "Holdings", "RedisBroker"]

log = logging.getLogger(__name__)

_LIFE_MS = 5_000  # an API process that is silent for so long is taken for dead
_WAIT_S = 2.0  # for answers, before asking again
_TELL_S = 0.1  # between two looks whether what is held has changed
_LOOK_S = 0.5  # between two looks at the workers
_AUDIT_S = 1.0  # between two signs of life, and looks for chunks that are no longer there
_GRACE_S = 0.5  # after a deadline, for the worker's own account of it to arrive
_KEEP_S = 60.0  # beyond its deadline, a chunk that was forgotten
_TOGETHER = 1000  # ids that one call names
SPARE = 256  # a process has so small a part of the limits in hand, not to ask for every request


class Holdings(Protocol):
    """What this process holds of the queue; see ``dataplane.admission``."""

    max_rows: int
    max_bytes: int

    @property
    def rows(self) -> int:
        """Rows that wait or run."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes of bodies and rows."""
        ...

    def rates(self) -> tuple[float, float]:
        """Rows and bytes that leave in a second."""
        ...


class RedisBroker:
    """Has chunks solved by workers anywhere.

    Args:
        url: see ``connections``.
        holdings: what this process holds; the queue's limits are for all processes together.

    Attributes:
        rows: that all processes held together when the server was last told.
        nbytes: likewise.
    """

    def __init__(self, url: str, holdings: Holdings) -> None:
        self.id = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
        self._link = Link(url)
        self._replies = self._link.line()
        self._holdings = holdings
        self._told: tuple[int, int] | None = None
        self._granted = _Grant(0, 0, 0.0)
        self._waiting: dict[str, _Chunk] = {}
        self._workers: list[Announcement] = []
        self._read: frozenset[str] = frozenset()
        self._looked = 0.0
        self._models: dict[tuple[str, int], ModelState] = {}
        self._orders: dict[tuple[str, int], Load | Unload] = {}
        self._untold: set[tuple[str, int]] = set()  # those that the server has not heard of, or has lost
        self._left: set[str] = set()  # chunks that nobody waits for, which it has not heard of either
        self._tasks: list[asyncio.Task[None]] = []
        self._calls: set[asyncio.Task[None]] = set()
        self._draining = False
        self.rows = self.nbytes = 0

    @property
    def workers(self) -> int:
        """How many workers would take a chunk now."""
        return sum(worker.unavailable is None for worker in self._workers)

    @property
    def in_flight(self) -> int:
        """Chunks that have not been answered."""
        return len(self._waiting)

    async def start(self) -> None:
        """Seek the server, and follow it from now on."""
        await self._link.start()
        work = (self._keep_told, self._keep_looking, self._keep_reading, self._keep_auditing)
        self._tasks = [asyncio.create_task(endlessly(each)) for each in (*work, self._keep_deadlines)]

    async def admit(self, rows: int, nbytes: int) -> None:
        """See ``Broker.admit``: these are the queue's limits, over all processes that ask."""
        own = self._holdings
        if self._link.unavailable is None and self._granted.covers(own.rows, own.nbytes):
            return
        granted, *of_all = await self._reserve(own.rows - rows, own.nbytes - nbytes, rows, nbytes)
        if granted:
            return
        limits = own.max_rows, own.max_bytes
        for reason, asked, held, limit, rate in zip(
            ("rows", "bytes"), (rows, nbytes), of_all[:2], limits, map(float, of_all[2:]), strict=True
        ):
            if held + asked > limit:
                raise full(reason, asked, held, limit, (held + asked - limit) / rate if rate else 0.0)

    async def submit(self, work: Work) -> Result:
        """See ``Broker.submit``; a chunk waits for a server that is lost."""
        chunk = self._waiting[work.id] = _Chunk(work, asyncio.get_running_loop().create_future())
        try:
            await self._queue(chunk)
            return await chunk.answer
        finally:
            del self._waiting[work.id]
            if not chunk.answered:
                self._left.add(work.id)
                self._background(self._forget)

    def unavailable(self) -> str | None:
        """Why work sent now would have to wait; None when it would not."""
        if self._draining:
            return "The server is shutting down."
        if self._link.unavailable is not None:
            return self._link.unavailable
        if not self._looked:
            return "The queue has not been looked at yet."
        if not self._workers:
            return "There are no workers: start some with `pushforward worker`."
        if not self.workers:
            return self._workers[0].unavailable
        return None

    def models(self) -> Mapping[tuple[str, int], ModelState]:
        """See ``Broker.models``."""
        return self._models

    def load(self, model: str, version: int) -> None:
        """See ``Broker.load``."""
        self._order(Load(model, version))

    def unload(self, model: str, version: int) -> None:
        """See ``Broker.unload``."""
        self._order(Unload(model, version))

    def drain(self) -> None:
        """See ``Broker.drain``."""
        self._draining = True

    async def close(self) -> None:
        """Leave; chunks still in flight fail with ``Unavailable`` and are taken off the queue."""
        self.drain()
        for chunk in self._waiting.values():
            chunk.fail(Unavailable("The server is shutting down."))
        await asyncio.sleep(0)  # for those who wait to take them off
        await asyncio.gather(*self._calls)
        await cancelled(*self._tasks)
        await self._link.close()
        await self._replies.close()

    # ------------------------------------------------------------------------------ chunks out, answers in

    async def _queue(self, chunk: _Chunk) -> None:
        work, left_ms = chunk.work, ""
        keep_s = _KEEP_S
        if work.deadline is not None:
            left_s = work.deadline - time.time()
            left_ms, keep_s = str(max(1, round(1000 * left_s))), keep_s + max(left_s, 0)
        else:
            keep_s = 86_400.0
        kind, version = "bulk" if work.bulk else "interactive", f"{work.model}/{work.version}"
        stream = f"{kind}:{version if version in self._read else 'any'}"
        try:
            chunk.sent = time.monotonic()
            await self._link.call(
                "submit",
                work.id,
                stream,
                kind,
                len(work.rows),
                self.id,
                left_ms,
                round(1000 * keep_s),
                encode(work),
            )
        except Unavailable as error:
            if self._link.unavailable is None:  # it answers, and refuses
                chunk.fail(error)

    async def _forget(self) -> None:
        """Take the chunks off the queue that nobody waits for."""
        while self._left:
            left = set(itertools.islice(self._left, _TOGETHER))
            self._left -= left
            try:
                await self._link.call("cancel", *left)
            except Unavailable:
                self._left |= left
                raise

    async def _keep_reading(self) -> None:
        """Read answers, and forget each once it has been read."""
        stream, read = f"{PREFIX}reply:{self.id}", [b"0-1"]
        while True:
            await self._link.found()
            try:
                forget = "XDEL", stream, *read
                wait = "XREAD", "COUNT", 1000, "BLOCK", round(1000 * _WAIT_S), "STREAMS", stream, "0"
                forgot, found = await self._replies.send([forget, wait], _WAIT_S)
                for answer in (forgot, found):
                    if isinstance(answer, ResponseError):
                        raise answer
            except FAULTS:
                await asyncio.sleep(_TELL_S)
                continue
            read = [b"0-1"]  # no entry has this number
            for _, entries in found or ():
                for entry, told in entries:
                    read.append(entry)
                    self._hear(dict(zip(told[::2], told[1::2], strict=True)))

    def _hear(self, told: Mapping[bytes, bytes]) -> None:
        chunk = self._waiting.get(told[b"id"].decode())
        if chunk is None:
            return
        if b"spent" in told:
            chunk.fail(_convicted(int(told[b"spent"]), len(chunk.work.rows)), answered=True)
            return
        try:
            message = decode_from_worker(told[b"body"])
        except msgspec.DecodeError as error:
            chunk.fail(PushforwardError(f"A worker's answer cannot be read: {error}."), answered=True)
            return
        if isinstance(message, Result):
            waited = time.monotonic() - chunk.sent - message.solve_s
            chunk.succeed(msgspec.structs.replace(message, queue_s=max(message.queue_s, waited)))
        elif isinstance(message, Failed):
            fault: Exception = from_code(message.code, message.message, message.detail)
            chunk.fail(TimeoutError() if message.code == "deadline-exceeded" else fault, answered=True)

    async def _keep_deadlines(self) -> None:
        while True:
            await asyncio.sleep(_GRACE_S / 2)
            latest = time.time() - _GRACE_S
            for chunk in list(self._waiting.values()):
                if chunk.work.deadline is not None and chunk.work.deadline < latest:
                    chunk.fail(TimeoutError())

    async def _keep_auditing(self) -> None:
        """Queue chunks again that are not there any more: the server lost them, or their answer."""
        while True:
            await asyncio.sleep(_AUDIT_S)
            await self._link.found()
            settled = time.monotonic() - _AUDIT_S
            ids = [id for id, chunk in self._waiting.items() if chunk.sent < settled]
            try:
                await self._tell()  # chunks of a process that says nothing are not solved
                await self._forget()
                for first in range(0, len(ids), _TOGETHER):
                    await self._audit(ids[first : first + _TOGETHER])
            except Unavailable:  # when it is found again, all is looked at
                continue

    async def _audit(self, ids: list[str]) -> None:
        missing = await self._link.call("audit", len(self._read), *self._read, *ids)
        await asyncio.sleep(_TELL_S)  # for answers that are on their way
        for id in missing:
            chunk = self._waiting.get(id.decode())
            if chunk is not None and not chunk.answer.done():
                log.warning("chunk queued again", extra=fields(chunk=chunk.work.id))
                await self._queue(chunk)

    # ------------------------------------------------------------------------------ what is held, and who is

    async def _tell(self) -> None:
        """Say what this process holds, and have some more in hand while there is plenty."""
        own = self._holdings
        await self._reserve(own.rows, own.nbytes, own.max_rows // SPARE, own.max_bytes // SPARE)

    async def _reserve(self, rows: int, nbytes: int, more_rows: int, more_bytes: int) -> Any:
        """Say what this process has been granted, and have more granted if there is room."""
        own = self._holdings
        holds = own.rows, own.nbytes
        alive = time.monotonic() + _LIFE_MS / 2000
        # Until the answer is here, no more than what the server counts in any case.
        before = self._granted
        mine = self._granted = _Grant(min(before.rows, rows), min(before.nbytes, nbytes), before.until)
        answer = await self._link.call(
            "reserve",
            self.id,
            rows,
            nbytes,
            more_rows,
            more_bytes,
            own.max_rows,
            own.max_bytes,
            *own.rates(),
            _LIFE_MS,
        )
        if self._granted is mine:  # nothing was said since
            more = answer[0]
            self._granted = _Grant(rows + more * more_rows, nbytes + more * more_bytes, alive)
        self._told = holds
        self.rows, self.nbytes = answer[1:3]
        return answer

    async def _keep_told(self) -> None:
        while True:
            if self._told != (self._holdings.rows, self._holdings.nbytes):
                await self._link.found()
                with contextlib.suppress(Unavailable):
                    await self._tell()
            await asyncio.sleep(_TELL_S)

    async def _keep_looking(self) -> None:
        while True:
            await self._link.found()
            try:
                said, orders = await self._link.call("look")
            except Unavailable:
                await asyncio.sleep(_TELL_S)
                continue
            self._workers = [decode_announcement(each) for each in said]
            self._looked = time.monotonic()
            self._read = frozenset(version for worker in self._workers for version in worker.reads)
            told: dict[tuple[str, int], Load | Unload] = {}
            for version, order in zip(orders[::2], orders[1::2], strict=True):
                name, _, number = version.decode().rpartition("/")
                made = Load if order.startswith(b"load:") else Unload
                told[name, int(number)] = made(name, int(number))
            self._untold |= self._orders.keys() - told.keys()
            self._orders |= {key: order for key, order in told.items() if key not in self._untold}
            self._merge_models()
            with contextlib.suppress(Unavailable):
                await self._tell_orders()
            await asyncio.sleep(_LOOK_S)

    def _order(self, order: Load | Unload) -> None:
        self._orders[order.model, order.version] = order
        self._untold.add((order.model, order.version))
        self._merge_models()
        self._background(self._tell_orders)

    async def _tell_orders(self) -> None:
        """Give the orders that the server does not know."""
        for key in list(self._untold):
            order = self._orders[key]
            word = "load" if isinstance(order, Load) else "unload"
            await self._link.call("order", f"{order.model}/{order.version}", word)
            if self._orders[key] is order:
                self._untold.discard(key)

    def _merge_models(self) -> None:
        said = [{(one.model, one.version): one for one in worker.models} for worker in self._workers]
        self._models = merge_models(self._models, said, self._orders.values())

    def _background(self, tell: Callable[[], Awaitable[None]]) -> None:
        """Tell the server something now, or when it is looked at next; nobody waits for it."""

        async def call() -> None:
            try:
                await tell()
            except Unavailable as error:
                log.warning("queue was not told", extra=fields(what=tell.__name__, reason=error.message))

        task = asyncio.create_task(call())
        self._calls.add(task)
        task.add_done_callback(self._calls.discard)


@dataclass(frozen=True, eq=False)
class _Grant:
    """What the server counts as held by this process, and until when it does so for sure."""

    rows: int
    nbytes: int
    until: float

    def covers(self, rows: int, nbytes: int) -> bool:
        """Whether so much may be held without asking."""
        return rows <= self.rows and nbytes <= self.nbytes and time.monotonic() < self.until


class _Chunk:
    """A chunk that waits for its answer."""

    __slots__ = ("answer", "answered", "sent", "work")

    def __init__(self, work: Work, answer: asyncio.Future[Result]) -> None:
        self.work = work
        self.answer = answer
        self.answered = False  # whether the queue knows it no more
        self.sent = 0.0  # when it was queued last, on a clock that never goes back

    def succeed(self, result: Result) -> None:
        self.answered = True
        if not self.answer.done():
            self.answer.set_result(result)

    def fail(self, error: Exception, answered: bool = False) -> None:
        self.answered = answered
        if not self.answer.done():
            self.answer.set_exception(error)


def _convicted(attempts: int, rows: int) -> PushforwardError:
    return PushforwardError(
        f"Workers were lost {attempts} times while they held these rows, the last time with nothing else; "
        "they are not tried again.",
        detail={"attempts": attempts, "rows": rows},
    )
