"""The end of the queue that solves: chunks are pulled when there is room for them.

A local broker solves them, and sees to it that they make progress or are run again in another process; so a
lease is renewed as long as this process's own loop turns.  When it does not, its chunks go to another worker,
under the next fence, and what this one still says of them is discarded.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import logging
import os
import secrets
import socket
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import msgspec
from redis.exceptions import ResponseError

from pushforward.broker.base import ATTEMPTS
from pushforward.broker.local import LocalBroker
from pushforward.broker.redis.link import FAULTS, PREFIX, Link, cancelled, endlessly
from pushforward.broker.redis.words import Announcement, encode_announcement
from pushforward.errors import DeadlineExceeded, PushforwardError, Unavailable
from pushforward.logs import fields
from pushforward.messages import Failed, Result, Work, decode_to_worker, encode
from pushforward.metrics import EngineCollector

__all__ = ["Puller"]

log = logging.getLogger(__name__)

_WAIT_S = 1.0  # for chunks, before looking for other streams
_RETRY_S = 0.1
_LOOK_S = 0.1  # between two looks whether there is something to say


@dataclass(eq=False)
class _Held:
    """A chunk that this worker has leased."""

    fence: int
    work: Work
    task: asyncio.Task[None] | None = None


class Puller:
    """Pulls chunks for the workers of a local broker, and sends their answers back.

    Args:
        url: see ``connections``.
        local: solves them; started and closed by whoever made it.
        rows: interactive rows, and as many bulk rows, that are held at once.
        lease_s: seconds after which chunks of a worker that does not renew them are given to another.
        collector: is told how many were.
    """

    def __init__(
        self, url: str, local: LocalBroker, rows: int, lease_s: float, collector: EngineCollector
    ) -> None:
        self.id = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
        self._link = Link(url)
        # Who waits for bulk chunks on it would not see that there is room for interactive ones again.
        self._readers = {bulk: self._link.line() for bulk in (False, True)}
        self._listener = self._link.client(3600.0)
        self._local = local
        self._rows = rows
        self._lease_s = lease_s
        self._collector = collector
        self._held: dict[str, _Held] = {}
        self._settled = asyncio.Event()
        self._reads: list[str] = []  # versions whose streams are read
        self._pulls: dict[bool, list[str]] = {}  # streams that are being read now, by class
        self._seen: dict[bytes, bytes] = {}  # orders that were carried out
        self._turns = {bulk: itertools.count() for bulk in (False, True)}
        self._alone = False  # whether to become empty for a quarantined chunk
        self._draining = False
        self._tasks: list[asyncio.Task[None]] = []

    def unavailable(self) -> str | None:
        """Why this worker would not take a chunk now; None when it would."""
        if self._draining:
            return "The worker is shutting down."
        return self._link.unavailable or self._local.unavailable()

    @property
    def holds(self) -> int:
        """Chunks that it has leased."""
        return len(self._held)

    async def start(self) -> None:
        """Seek the server, and begin to pull."""
        await self._link.start()
        work: list[Callable[[], Awaitable[None]]]
        work = [functools.partial(self._keep_pulling, bulk) for bulk in self._readers]
        work += [self._keep_beating, self._keep_reaping, self._keep_listening]
        self._tasks = [asyncio.create_task(endlessly(each)) for each in work]

    async def drain(self, patience_s: float) -> None:
        """Take nothing more, finish what is held as far as time allows, hand back the rest, and leave."""
        self._draining = True
        end = time.monotonic() + patience_s
        pulling, others = self._tasks[:2], self._tasks[2:]
        await cancelled(*pulling)  # with chunks, perhaps, that it will never hear of
        with contextlib.suppress(Unavailable):
            if self._held:
                await self._link.call("release", self.id, *self._held)
            await self._beat()
        while self._held and time.monotonic() < end:
            self._settled.clear()
            try:
                await asyncio.wait_for(self._settled.wait(), end - time.monotonic())
            except TimeoutError:
                break
        rest = [held.task for held in self._held.values() if held.task is not None]
        await cancelled(*others, *rest)
        try:
            await self._link.call("release", self.id)
        except Unavailable:  # their leases run out
            log.warning("chunks not handed back", extra=fields(chunks=len(rest)))
        await self._link.close()
        for reader in self._readers.values():
            await reader.close()
        await self._listener.aclose()

    # ------------------------------------------------------------------------------ pulling

    async def _keep_pulling(self, bulk: bool) -> None:
        """Read chunks of a class whenever there is room for some."""
        while True:
            await self._link.found()
            room = self._rows - sum(
                len(held.work.rows) for held in self._held.values() if held.work.bulk is bulk
            )
            streams = self._streams(bulk) if room > 0 else []
            if not streams:
                self._settled.clear()
                await self._settled.wait()
                continue
            self._pulls[bulk] = streams
            try:
                read = await self._wait_for(bulk, streams)
                rooms = (0, room) if bulk else (room, 0)
                taken = await self._link.call("take", self.id, *rooms, len(read) // 3, *read, *streams)
                for id, fence, left, body in taken:
                    self._begin(id.decode(), int(fence), left.decode(), body)
            except Unavailable:
                await asyncio.sleep(_RETRY_S)
            finally:
                del self._pulls[bulk]
                if self._alone:  # the other may be waiting for this one to end
                    self._settled.set()

    def _streams(self, bulk: bool) -> list[str]:
        """What to read now, first things first; models take turns."""
        if self._local.unavailable() is not None:
            return []
        if self._alone:
            return [] if bulk or self._held or True in self._pulls else ["alone"]
        if self._pulls.get(False) == ["alone"]:
            return []
        self._reads = [
            f"{name}/{version}"
            for (name, version), news in self._local.models().items()
            if news.state == "ready"
        ]
        first = next(self._turns[bulk]) % max(1, len(self._reads))
        versions = [*self._reads[first:], *self._reads[:first], "any"]
        streams = [f"{'bulk' if bulk else 'interactive'}:{version}" for version in versions]
        return streams if bulk else ["again", *streams]

    async def _wait_for(self, bulk: bool, streams: list[str]) -> list[str | bytes]:
        """Wait until one of the streams has a chunk; what was read, as (stream, entry, id) in one list."""
        names = [f"{PREFIX}{stream}" for stream in streams]
        group = "GROUP", "workers", self.id
        wait = "COUNT", 1, "BLOCK", round(1000 * _WAIT_S)
        command = "XREADGROUP", *group, *wait, "STREAMS", *names, *[">"] * len(names)
        try:
            (found,) = await self._readers[bulk].send([command], _WAIT_S)
        except FAULTS:
            raise Unavailable("The queue is lost.") from None
        if isinstance(found, ResponseError):
            if not str(found).startswith("NOGROUP"):
                raise Unavailable(str(found))
            await self._link.call("make", *streams)
            return []
        return [
            part
            for stream, entries in found or ()
            for entry, (_, id) in entries
            for part in (stream.decode().removeprefix(PREFIX), entry, id)
        ]

    def _begin(self, id: str, fence: int, left_ms: str, body: bytes) -> None:
        try:
            work = decode_to_worker(body)
            assert isinstance(work, Work)
        except msgspec.DecodeError:  # another worker may understand it, when this lease has run out
            log.exception("chunk cannot be read", extra=fields(chunk=id))
            return
        # A deadline travels as what is left of it: clocks differ between machines.
        deadline = time.time() + float(left_ms) / 1000 if left_ms else None
        # The same chunk may come back while its last attempt is still being cancelled here.
        work = msgspec.structs.replace(work, id=f"{id}#{fence}", deadline=deadline)
        if id in self._held:
            self._drop(id)
        held = self._held[id] = _Held(fence, work)
        if fence == ATTEMPTS:
            self._collector.quarantined += 1
            log.warning("chunk in quarantine", extra=fields(chunk=id))
        held.task = asyncio.create_task(self._solve(id, held))

    async def _solve(self, id: str, held: _Held) -> None:
        reason = ""
        try:
            try:
                answer: Result | Failed = msgspec.structs.replace(await self._local.submit(held.work), id=id)
            except TimeoutError:
                answer = Failed(id, DeadlineExceeded.code, "", {})
            except Unavailable:  # this worker is leaving; the chunk is handed back
                return
            except PushforwardError as error:
                answer = Failed(id, error.code, error.message, error.detail)
                reason = error.message if type(error) is PushforwardError else ""
            body = encode(msgspec.structs.replace(answer, fence=held.fence))
            while True:
                try:
                    if not await self._link.call("finish", self.id, id, held.fence, body, reason):
                        log.info("answer discarded", extra=fields(chunk=id, fence=held.fence))
                    break
                except Unavailable:
                    await asyncio.sleep(_RETRY_S)
                    await self._link.found()
        finally:
            if self._held.get(id) is held:
                del self._held[id]
            self._settled.set()

    def _drop(self, id: str) -> None:
        """Stop solving a chunk that is another's now, or nobody's."""
        held = self._held.pop(id, None)
        if held is not None and held.task is not None:
            held.task.cancel()

    # ------------------------------------------------------------------------------ leases

    async def _keep_beating(self) -> None:
        """Renew the leases in good time, and say at once what has changed."""
        due, said = 0.0, None
        while True:
            await self._link.found()
            state = self.unavailable(), self._local.models()
            if state != said or time.monotonic() >= due:
                due, said = time.monotonic() + min(1.0, self._lease_s / 5), state
                with contextlib.suppress(Unavailable):
                    await self._beat()
            await asyncio.sleep(_LOOK_S)

    async def _beat(self) -> None:
        """Renew the leases, say what this worker has, and carry out orders."""
        said = Announcement(
            self.id,
            self.unavailable(),
            [] if self._draining else self._reads,
            list(self._local.models().values()),
        )
        lost, orders, alone = await self._link.call(
            "beat",
            self.id,
            round(1000 * self._lease_s),
            encode_announcement(said),
            int(said.unavailable is None),
            *(part for id, held in self._held.items() for part in (id, held.fence)),
        )
        for id in lost:
            self._drop(id.decode())
        self._alone = bool(alone)
        self._settled.set()
        for version, order in zip(orders[::2], orders[1::2], strict=True):
            if self._seen.get(version) != order:
                self._seen[version] = order
                name, _, number = version.decode().rpartition("/")
                carry_out = self._local.load if order.startswith(b"load:") else self._local.unload
                carry_out(name, int(number))

    async def _keep_reaping(self) -> None:
        """Give chunks of workers that were lost to others; not until all had time to renew theirs."""
        while True:
            await self._link.found()
            found = self._link.times_found
            await asyncio.sleep(self._lease_s)
            while self._link.times_found == found and self._link.unavailable is None:
                try:
                    again, alone, spent = await self._link.call(
                        "reap", self.id, round(1000 * self._lease_s), ATTEMPTS
                    )
                except Unavailable:
                    break
                self._collector.redeliveries += again + alone
                if again or alone or spent:
                    log.error("leases ran out", extra=fields(again=again, quarantined=alone, given_up=spent))
                await asyncio.sleep(min(1.0, self._lease_s / 5))

    async def _keep_listening(self) -> None:
        """Hear of cancelled chunks at once; whatever is missed here, the next beat finds."""
        while True:
            await self._link.found()
            try:
                async with self._listener.pubsub() as channel:
                    await channel.subscribe(f"{PREFIX}cancelled:{self.id}")
                    async for message in channel.listen():
                        if message["type"] == "message":
                            self._drop(message["data"].decode())
            except FAULTS:
                await asyncio.sleep(_RETRY_S)
