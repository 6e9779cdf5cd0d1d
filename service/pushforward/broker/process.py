"""One worker process on this machine, at the other end of a Unix socket pair."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import cast

import pushforward
from pushforward.messages import FrameReader, FromWorker, ToWorker, decode_from_worker, frame

__all__ = ["Process"]

_EXIT_TIMEOUT_S = 5.0


class _Link(asyncio.Protocol):
    """The parent's end of the socket: cuts what arrives into messages."""

    def __init__(self, on_message: Callable[[FromWorker], None]) -> None:
        self._on_message = on_message
        self._frames = FrameReader()
        self.transport: asyncio.Transport | None = None
        self.lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's is no subclass of it

    def data_received(self, data: bytes) -> None:
        for body in self._frames.feed(data):
            self._on_message(decode_from_worker(body))

    def connection_lost(self, exc: Exception | None) -> None:
        self.transport = None
        if not self.lost.done():
            self.lost.set_result(None)


class Process:
    """A worker process: started at once, spoken to from an event loop, waited for at its end.

    When this process dies, the worker reads the end of its socket and ends too.

    Args:
        setup: what the worker is to be: a ``messages.Setup`` in JSON.

    Raises:
        OSError: when it cannot be started.
    """

    def __init__(self, setup: str) -> None:
        self._socket, theirs = socket.socketpair()
        self._link: _Link | None = None
        root = str(Path(pushforward.__file__).parent.parent)
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH")))),
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
        }
        try:
            with theirs:
                # -P: a file of the current folder must not pass for a module.
                self._process = subprocess.Popen(
                    [sys.executable, "-P", "-m", "pushforward.worker", str(theirs.fileno()), setup],
                    pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL,
                    env=environment,
                )
        except BaseException:
            self._socket.close()
            raise

    @property
    def pid(self) -> int:
        """The process id."""
        return self._process.pid

    async def connect(self, on_message: Callable[[FromWorker], None]) -> None:
        """Begin to listen to it."""
        self._socket.setblocking(False)
        loop = asyncio.get_running_loop()
        _, self._link = await loop.create_unix_connection(lambda: _Link(on_message), sock=self._socket)

    def send(self, message: ToWorker) -> None:
        """Send a message; lost when the worker is."""
        if self._link is not None and self._link.transport is not None:
            self._link.transport.write(frame(message))

    def kill(self) -> None:
        """End it at once, whatever it is doing, even if it is stopped."""
        self._process.kill()

    async def lost(self) -> None:
        """Wait until its end of the socket is closed: it has died, or is about to."""
        assert self._link is not None
        await asyncio.shield(self._link.lost)

    async def end(self) -> int:
        """Close the socket, which it takes for its order to leave, and wait for that; insist if need be.

        Returns:
            The exit status; −n after signal n.
        """
        if self._link is None:
            self._socket.close()
        elif self._link.transport is not None:
            self._link.transport.close()
        try:
            return await asyncio.to_thread(self._process.wait, _EXIT_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return await asyncio.to_thread(self._process.wait)
