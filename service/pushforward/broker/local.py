"""A worker process on this machine, at the other end of a Unix socket pair.

The process is started, watched, and replaced when it dies; chunks it had not answered are handed to its
successor. When this process dies the worker reads the end of its socket and ends too.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import msgspec

import pushforward
from pushforward.errors import PushforwardError, Unavailable, from_code
from pushforward.logs import fields
from pushforward.messages import (
    Cancel,
    Failed,
    FrameReader,
    FromWorker,
    Ready,
    Result,
    Setup,
    ToWorker,
    Work,
    decode_from_worker,
    frame,
)

__all__ = ["LocalBroker"]

log = logging.getLogger(__name__)

ATTEMPTS = 2  # a chunk that takes two workers down is not given a third
_MAX_DELAY_S = 5.0
_EXIT_TIMEOUT_S = 5.0
_GRACE_S = 1.0  # after a deadline, for the worker's own account of it to arrive
_LOOK_S = 0.25  # between two looks for deadlines that the worker has let pass


@dataclass
class _Pending:
    work: Work
    answer: asyncio.Future[Result]
    attempts: int = 0


class _Link(asyncio.Protocol):
    """The parent's end of the socket: cuts what arrives into messages."""

    def __init__(self, on_message: Callable[[FromWorker], None]) -> None:
        self._on_message = on_message
        self._frames = FrameReader()
        self._transport: asyncio.Transport | None = None
        self.lost = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is no subclass of it

    def data_received(self, data: bytes) -> None:
        for body in self._frames.feed(data):
            self._on_message(decode_from_worker(body))

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        if not self.lost.done():
            self.lost.set_result(None)

    def send(self, message: ToWorker) -> None:
        if self._transport is not None:
            self._transport.write(frame(message))

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()


class LocalBroker:
    """Solves chunks in one worker process.

    Args:
        setup: what the worker is to be.
    """

    def __init__(self, setup: Setup) -> None:
        self._setup = msgspec.json.encode(setup).decode()
        self._pending: dict[str, _Pending] = {}
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None
        self._link: _Link | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._failures = 0
        self.ready = asyncio.Event()

    @property
    def worker(self) -> int | None:
        """Process id of the worker; None while there is none."""
        return None if self._process is None else self._process.pid

    @property
    def in_flight(self) -> int:
        """Chunks that have not been answered."""
        return len(self._pending)

    def spawn(self) -> None:
        """Start the worker process; possible before there is an event loop, so that it can load meanwhile."""
        ours, theirs = socket.socketpair()
        root = str(Path(pushforward.__file__).parent.parent)
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH")))),
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
        }
        with theirs:
            # -P: a file of the current folder must not pass for a module.
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "pushforward.worker", str(theirs.fileno()), self._setup],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env=environment,
            )
        self._socket = ours
        log.debug("worker started", extra=fields(worker=self._process.pid))

    async def start(self) -> None:
        """Connect to the worker, starting it if ``spawn`` has not, and watch it from now on."""
        self._tasks = [asyncio.create_task(self._supervise()), asyncio.create_task(self._keep_deadlines())]

    async def submit(self, work: Work) -> Result:
        """Have a chunk solved; see ``Broker.submit``."""
        answer: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        pending = self._pending[work.id] = _Pending(work, answer)
        self._hand_out(pending)
        try:
            return await answer
        except asyncio.CancelledError:
            if self._link is not None:
                self._link.send(Cancel(work.id))
            raise
        finally:
            self._pending.pop(work.id, None)

    def unavailable(self) -> str | None:
        """Why work sent now would have to wait; None when it would not."""
        if self.ready.is_set():
            return None
        return "The worker is starting." if self._failures == 0 else "The worker died and is being replaced."

    async def close(self) -> None:
        """End the worker: its socket is closed, which it takes for its order to leave."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._link is not None:
            self._link.close()
        elif self._socket is not None:
            self._socket.close()
        await self._reap()
        for pending in self._pending.values():
            if not pending.answer.done():
                pending.answer.set_exception(Unavailable("The server is shutting down."))

    async def _supervise(self) -> None:
        while True:
            if self._failures > 1:  # the last ones died before they were ready, or did not start: do not spin
                await asyncio.sleep(min(_MAX_DELAY_S, 0.1 * 2**self._failures))
            if self._process is None:
                try:
                    self.spawn()
                except OSError:
                    self._failures += 1
                    log.exception("worker cannot be started")
                    continue
            pid = self.worker
            await (await self._connect()).lost
            self._link = None
            code = await self._reap()
            self._failures = 1 if self.ready.is_set() else self._failures + 1
            self.ready.clear()
            unanswered = len(self._pending)
            log.error("worker died", extra=fields(worker=pid, exit=code, unanswered=unanswered))
            self._fail_spent(code)

    async def _keep_deadlines(self) -> None:
        """Give up chunks whose worker is silent about a deadline that has passed."""
        while True:
            await asyncio.sleep(_LOOK_S)
            latest = time.time() - _GRACE_S
            for pending in self._pending.values():
                deadline = pending.work.deadline
                if deadline is not None and deadline < latest and not pending.answer.done():
                    pending.answer.set_exception(TimeoutError())

    async def _connect(self) -> _Link:
        sock, self._socket = self._socket, None
        assert sock is not None
        sock.setblocking(False)
        loop = asyncio.get_running_loop()
        _, link = await loop.create_unix_connection(lambda: _Link(self._receive), sock=sock)
        self._link = link
        for pending in self._pending.values():
            self._hand_out(pending)
        return link

    def _hand_out(self, pending: _Pending) -> None:
        if self._link is not None:  # else it goes when there is a worker
            pending.attempts += 1
            self._link.send(pending.work)

    def _receive(self, message: FromWorker) -> None:
        if isinstance(message, Ready):
            self.ready.set()
            for name, version, reason in message.failed:
                log.error("model failed to load", extra=fields(model=name, version=version, reason=reason))
            log.info(
                "worker ready",
                extra=fields(
                    worker=self._process.pid if self._process else None,
                    models=len(message.loaded),
                    failed=len(message.failed),
                    load_s=round(message.seconds, 3),
                ),
            )
            return
        pending = self._pending.get(message.id)
        if pending is None or pending.answer.done():
            return  # the caller has gone
        if isinstance(message, Failed):
            pending.answer.set_exception(from_code(message.code, message.message, message.detail))
        else:
            pending.answer.set_result(message)

    def _fail_spent(self, code: int | None) -> None:
        for pending in self._pending.values():
            if pending.attempts >= ATTEMPTS and not pending.answer.done():
                pending.answer.set_exception(
                    PushforwardError(
                        f"The worker process died {ATTEMPTS} times while it held these rows; "
                        "they are not tried again.",
                        detail={"attempts": ATTEMPTS, "exit": code},
                    )
                )

    async def _reap(self) -> int | None:
        """Wait for the end of a process whose socket is closed; insist if it does not come."""
        process, self._process = self._process, None
        if process is None:
            return None
        try:
            return await asyncio.to_thread(process.wait, _EXIT_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            return await asyncio.to_thread(process.wait)
