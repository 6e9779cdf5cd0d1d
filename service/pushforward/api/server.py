"""Uvicorn's server, with a way to leave that no client notices."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Iterator
from types import FrameType

import uvicorn

from pushforward.api.protocol import Protocol
from pushforward.broker.base import Broker

__all__ = ["HEADERS", "Probes", "Server"]

HEADERS = [
    ("cache-control", "no-store"),  # answers are about somebody's rows
    ("referrer-policy", "no-referrer"),
    ("x-content-type-options", "nosniff"),
]
"""Of every answer."""

_LINGER_S = 0.5  # for what is on its way on open connections, and for those who ask whether we are ready


class _Watched(uvicorn.Server):
    """A server that looks after slow connections."""

    async def on_tick(self, counter: int) -> bool:
        """Look at all connections, once a second."""
        if counter % 10 == 0:
            now = asyncio.get_running_loop().time()
            for connection in list(self.server_state.connections):
                if isinstance(connection, Protocol):
                    connection.look(now)
        return await super().on_tick(counter)


class Server(_Watched):
    """The HTTP server.

    It leaves in three steps: not ready, and every answer closes its connection; no new connections; the end,
    when the last answer is out. A second signal ends it at once.

    Args:
        config: of uvicorn.
        broker: is told that no more work is coming.
    """

    def __init__(self, config: uvicorn.Config, broker: Broker) -> None:
        super().__init__(config)
        self._broker = broker

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Take SIGTERM and SIGINT."""
        self.force_exit = self.should_exit
        super().handle_exit(sig, frame)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Leave."""
        self._broker.drain()
        # Uvicorn reads these for every request that begins from now on.
        self.server_state.default_headers = [*self.server_state.default_headers, (b"connection", b"close")]
        if not self.force_exit:
            await asyncio.sleep(_LINGER_S)
        await super().shutdown(sockets)


class Probes(_Watched):
    """An HTTP server beside something else, which leaves the signals alone and ends when it is cancelled."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Capture none."""
        yield
