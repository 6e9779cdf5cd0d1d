"""Uvicorn's HTTP protocol with an end to what a connection may cost.

Uvicorn with httptools reads heads of any size, waits for ever for the rest of a head or of a body nobody
wants, and writes for ever to whoever does not read. Here

- a head has at most 100 fields and 32 KiB, and so has whatever else the parser would have to keep;
- the head of a request must have come after so many seconds, counted from its first byte or from the start
  of the connection; a body must come, and an answer be read, at 4 KiB/s after those;
- there are only so many connections, and requests sent ahead on one.

What costs something per request are four methods of some lines; slow connections are found by a look at all
of them, once a second.
"""

from __future__ import annotations

import asyncio
import secrets
from dataclasses import dataclass
from typing import Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from pushforward.api.errors import HttpError, problem

__all__ = ["Guard", "Protocol"]

_MOST_FIELDS = 100
_MOST_BYTES = 1 << 15
_LEAST_RATE = 4096  # bytes per second
_MOST_AHEAD = 64  # requests that a connection may send before the answers to those before
_TURNED_AWAY = 256  # connections beyond the limit that are told so; more are just closed


@dataclass(frozen=True)
class Guard:
    """How much connections may cost.

    Args:
        max_connections: most of them, of all ports but the admin port.
        header_timeout_s: see the module.
        admin_port: from which nobody is turned away.
    """

    max_connections: int
    header_timeout_s: float
    admin_port: int | None = None


class Protocol(HttpToolsProtocol):
    """One connection.

    Args:
        guard: how much it may cost.
        arguments: of uvicorn's protocol.
    """

    def __init__(self, guard: Guard, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._guard = guard
        self._turned_away = False
        self._deaf = False
        self._fault: HttpError | None = None
        self._kept = 0  # bytes that came since the parser last had nothing to keep
        self._body_bytes = 0
        self._owed: tuple[RequestResponseCycle | None, float] | None = None
        self._arriving: tuple[RequestResponseCycle, float, int] | None = None
        self._unread: tuple[int, float] | None = None
        self._running: RequestResponseCycle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take it, unless there are too many."""
        super().connection_made(transport)
        beyond = len(self.connections) - self._guard.max_connections
        if beyond > 0 and (self.server is None or self.server[1] != self._guard.admin_port):
            self._turned_away = True
            if beyond > _TURNED_AWAY:
                transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell the application; uvicorn tells only the request that came last."""
        self.pipeline.clear()
        if self._running is not None:
            self._running.disconnected = True
            self._running.message_event.set()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse what came."""
        if self._deaf:
            return
        if self._turned_away:
            most = self._guard.max_connections
            self._refuse(
                HttpError(
                    503,
                    "too-many-connections",
                    f"This server has {most} connections open, which is all it takes. Try again in 1 s.",
                    {"retry-after": "1"},
                )
            )
            return
        self._kept += len(data)
        super().data_received(data)
        if self._kept > _MOST_BYTES and not self.transport.is_closing():
            self._refuse(_too_large())

    def on_headers_complete(self) -> None:
        """Begin a request, if its head is not too large."""
        self._kept = 0
        headers = self.headers
        size = len(self.url) + sum([len(name) + len(value) for name, value in headers])
        if len(headers) > _MOST_FIELDS or size > _MOST_BYTES:
            self._fault = _too_large()
            raise self._fault
        if len(self.pipeline) >= _MOST_AHEAD:
            raise ConnectionAbortedError  # those before it are answered, and this is not
        super().on_headers_complete()
        self.headers = []  # fields after a body are not the request's: what follows goes nowhere
        if self.parser.should_upgrade():  # to what we do not speak: bytes that follow are not a request
            self.cycle.keep_alive = False

    def on_body(self, body: bytes) -> None:
        """Take a part of a body."""
        self._kept = 0
        self._body_bytes += len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        """Take the end of a body."""
        self._kept = 0
        super().on_message_complete()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._running = cycle
        super()._start_asgi_task(cycle, app)

    def send_400_response(self, msg: str) -> None:
        """Tell what the parser did not like; uvicorn calls it when parsing fails."""
        self._refuse(
            self._fault
            or HttpError(400, "malformed-request", "This is not an HTTP/1.1 request that can be understood.")
        )

    def look(self, now: float) -> None:
        """Close the connection if its client keeps it waiting; called once a second."""
        cycle, timeout = self.cycle, self._guard.header_timeout_s
        unread = self.transport.get_write_buffer_size()
        if unread:
            self._owed = self._arriving = None
            if self._unread is None or now - self._unread[1] > timeout:
                if self._unread is not None and unread > self._unread[0] - timeout * _LEAST_RATE:
                    self.transport.abort()  # closing would wait until everything is read
                self._unread = unread, now
            return
        self._unread = None
        if self.transport.is_closing():
            return
        if cycle is not None and not cycle.response_complete:
            self._owed = None
            if cycle.more_body and not (self.flow.read_paused or cycle.waiting_for_100_continue):
                if self._arriving is None or self._arriving[0] is not cycle:
                    self._arriving = cycle, now, self._body_bytes
                _, since, before = self._arriving
                elapsed = now - since
                if elapsed > timeout and self._body_bytes - before < elapsed * _LEAST_RATE:
                    self._refuse(_too_slow("body", timeout))
        elif self.timeout_keep_alive_task is not None:  # it rests, which uvicorn ends
            self._owed = None
        elif self._owed is None or self._owed[0] is not cycle:
            self._owed = cycle, now
        elif now - self._owed[1] > timeout:
            if self._kept:
                self._refuse(_too_slow("head", timeout))
            else:
                self.transport.close()

    def _refuse(self, fault: HttpError) -> None:
        """Answer for the application, as far as that is possible still, and close."""
        cycle = self.cycle
        busy = cycle is not None and not cycle.response_complete
        if busy and not cycle.more_body:  # a request before this one has been taken: its answer is the last
            cycle.keep_alive = False
            self._deaf = True
            return
        if not busy or not cycle.response_started:
            status, headers, body = problem(fault, secrets.token_hex(8))
            lines = [STATUS_LINE[status]]
            lines += [b"%b: %b\r\n" % pair for pair in self.server_state.default_headers]
            headers |= {"content-length": str(len(body)), "connection": "close"}
            lines += [f"{name}: {value}\r\n".encode("latin-1") for name, value in headers.items()]
            self.transport.write(b"".join([*lines, b"\r\n", body]))
        if busy:
            cycle.disconnected = True  # the application is told now, and what it says is not heard
            cycle.message_event.set()
        self.transport.close()


def _too_large() -> HttpError:
    return HttpError(
        431,
        "header-fields-too-large",
        f"The head of a request may have {_MOST_FIELDS} fields and {_MOST_BYTES} bytes.",
    )


def _too_slow(what: str, timeout: float) -> HttpError:
    rest = f", and after those come at {_LEAST_RATE} bytes per second" if what == "body" else ""
    return HttpError(
        408, "request-timeout", f"The {what} of the request must arrive within {timeout:g} s{rest}."
    )
