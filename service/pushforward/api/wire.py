"""One HTTP request, from its bytes to its answer's bytes, on bare ASGI.

Small as these functions are, a one-row answer takes half a millisecond to compute: what a request costs
here is seen.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import re
import secrets
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import orjson
from pydantic import BaseModel
from starlette.types import Receive, Scope, Send

from pushforward import keys
from pushforward.api.body import TIMEOUT, Headers, Headings, read
from pushforward.api.errors import code, problem
from pushforward.api.interrupt import Interruptible
from pushforward.api.reader import Reader
from pushforward.dataplane import Admission, Limits, Ticket
from pushforward.dataplane.admission import HungUp
from pushforward.engine.request import Status
from pushforward.errors import (
    DeadlineExceeded,
    Forbidden,
    PushforwardError,
    QuotaExceeded,
    Unauthorized,
    Unavailable,
)
from pushforward.logs import audit, fields
from pushforward.metrics import Metrics
from pushforward.spans import begin_request, end_request
from pushforward.tracing import Tracing

__all__ = ["Call", "Door", "Endpoint", "request_id", "sent_key"]

log = logging.getLogger("pushforward.request")

Query = TypeVar("Query", bound=BaseModel)
_ID = re.compile(rb"[A-Za-z0-9._:/+=@-]{1,128}")
_JSON = orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_APPEND_NEWLINE
_HUNG_UP = 499  # the status in the log; nothing is sent
_WATCH_AFTER_S = 0.01  # most answers come sooner, and do not pay for looking whether the client is there


@dataclass(frozen=True)
class Door:
    """What all endpoints share.

    Args:
        admission: bounds what is held.
        limits: how long requests may take.
        metrics: counts and times them.
        max_body_bytes: the largest body that is read.
        reader: says what bodies say.
        keyring: who may ask; None when anyone may.
        tracing: makes their spans; None for none.
    """

    admission: Admission
    limits: Limits
    metrics: Metrics
    max_body_bytes: int
    reader: Reader
    keyring: keys.Keyring | None = None
    tracing: Tracing | None = None


class Call:
    """What the handler of a request is told, and what it leaves for the log."""

    __slots__ = (
        "id",
        "key",
        "logged",
        "path",
        "peer",
        "queue_s",
        "solve_s",
        "started",
        "ticket",
        "total_s",
    )

    def __init__(self, scope: Scope) -> None:
        self.ticket = Ticket()
        self.started = time.perf_counter()  # the same moment
        self.id = request_id(scope)
        self.path: dict[str, str] = scope["path_params"]
        self.peer: str | None = (scope.get("client") or [None])[0]
        self.key: keys.Key | None = None
        self.logged: dict[str, Any] = {}
        self.queue_s = self.solve_s = self.total_s = 0.0

    def end(self) -> None:
        """Stop the clock."""
        self.queue_s, self.solve_s = self.ticket.queue_s, self.ticket.solve_s
        self.total_s = time.perf_counter() - self.started

    def timing(self) -> str:
        """The header ``Server-Timing``."""
        return (
            f"admission;dur={1000 * self.ticket.admitted_s:.3f}, queue;dur={1000 * self.queue_s:.3f}, "
            f"solve;dur={1000 * self.solve_s:.3f}, total;dur={1000 * self.total_s:.3f}"
        )

    def trace_field(self) -> dict[str, str]:
        """The field of its log lines that names its trace, if it has one."""
        return {} if self.ticket.span is None else {"trace_id": self.ticket.span.trace_id}

    def line(self, scope: Scope, status: int) -> dict[str, Any]:
        """What the log says of it."""
        ticket = self.ticket
        if ticket.rows:
            ended = b"".join(result.status.tobytes() for result in ticket.results)
            self.logged |= {
                "rows": ticket.rows,
                "solved": ended.count(Status.OK),
                "steps": sum(int(result.steps.sum()) for result in ticket.results),
                "nfe": sum(int(result.nfe.sum()) for result in ticket.results),
                "queue_ms": round(1000 * self.queue_s, 3),
                "solve_ms": round(1000 * self.solve_s, 3),
            }
        told = {"request": self.id, "method": scope["method"], "path": scope["path"], "status": status}
        wall = {"wall_ms": round(1000 * self.total_s, 3)}
        return told | self.logged | wall | self.trace_field()


class Endpoint(Generic[Query]):
    """An ASGI application around a handler of one operation.

    Args:
        handler: from the call and the checked body (None without one) to the content of the answer.
        door: what all endpoints share.
        schema: what the body must be; None for an operation without a body, which solves nothing.
        status: of a good answer.
        scope: what a key must have; None when none is needed. Requests for "admin" leave a line for audits.
        path: under which it stands, for its spans.
    """

    def __init__(
        self,
        handler: Callable[[Call, Query], Awaitable[Any]],
        door: Door,
        schema: type[Query] | None = None,
        status: int = 200,
        scope: keys.Scope | None = None,
        path: str = "",
    ) -> None:
        self.handler = handler
        self._schema = schema
        self._door = door
        self._status = status
        self._keyring = None if scope is None else door.keyring
        self._scope = scope
        self._path = path
        self._tracing = None if schema is None else door.tracing
        # A body that the queue could never hold is as good as one that is never read.
        self._max_body_bytes = min(door.max_body_bytes, door.admission.max_bytes)
        stages = ("total",) if schema is None else ("total", "admission", "queue", "solve")
        self._seconds = [door.metrics.seconds.labels(handler.__name__, stage) for stage in stages]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        call, requests = Call(scope), self._door.metrics.requests
        outcome, fault, status = "cancelled", "", _HUNG_UP
        if self._tracing is not None:
            call.ticket.span = begin_request(self._tracing, scope, self._path)
        requests.enter()
        try:
            headers, body = {"content-type": "application/json", "x-request-id": call.id}, b""
            try:
                if self._keyring is not None:
                    self._identify(self._keyring, call, scope)
                body = orjson.dumps(await self._content(call, scope, receive), option=_JSON)
                outcome, status = "answered", self._status
            except HungUp:
                pass
            except PushforwardError as error:
                outcome, fault = _outcome(error), code(error)
                status, headers, body = problem(error, call.id)
                call.logged["error"] = error.message
            except Exception:
                log.exception("request failed", extra=fields(request=call.id, **call.trace_field()))
                mistake = PushforwardError(
                    "The server made a mistake; its log has the details under this request id."
                )
                outcome, fault = "failed", code(mistake)
                status, headers, body = problem(mistake, call.id)
            call.end()
            if status != _HUNG_UP:
                if self._schema is not None:
                    headers["server-timing"] = call.timing()
                headers["content-length"] = str(len(body))
                raw = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
                await send({"type": "http.response.start", "status": status, "headers": raw})
                await send({"type": "http.response.body", "body": body})
        finally:
            requests.leave(self.handler.__name__, outcome, fault)
            # Told when the answer is on its way, which it is at the end of this turn of the event loop.
            asyncio.get_running_loop().call_soon(self._tell, call, scope, status, outcome, fault)

    def _identify(self, keyring: keys.Keyring, call: Call, scope: Scope) -> None:
        assert self._scope is not None
        key = call.key = keyring.identify(sent_key(scope["headers"]), self._scope)
        call.logged["key"] = key.id
        if key.has_quota:
            call.ticket.quota = functools.partial(keyring.counted, key)

    async def _content(self, call: Call, scope: Scope, receive: Receive) -> Any:
        if self._schema is None:
            return await self.handler(call, None)  # type: ignore[arg-type]
        headings = Headings(scope["headers"], self._max_body_bytes)
        timeout_s = self._door.limits.timeout_s(headings.timeout_ms, TIMEOUT)
        with self._door.admission.admit(0, headings.nbytes) as place:
            call.ticket.timeout_ms, call.ticket.body = headings.timeout_ms, place

            whole = asyncio.get_running_loop().create_future()

            async def interruption() -> Exception:
                await asyncio.wait([whole], timeout=timeout_s)
                if not whole.done():
                    return DeadlineExceeded(
                        f"The deadline of {1000 * (timeout_s or 0):.0f} ms passed before the whole body had "
                        f"arrived: send it faster, or set {TIMEOUT}."
                    )
                while (await receive())["type"] != "http.disconnect":
                    pass
                return HungUp()

            with Interruptible(_WATCH_AFTER_S, interruption):
                body = await read(receive, place)
                whole.set_result(None)
                left_s = None if timeout_s is None else call.ticket.arrived + timeout_s - time.time()
                try:
                    query = await self._door.reader.read(self._schema, body, left_s)
                except TimeoutError:
                    raise DeadlineExceeded(
                        f"The deadline of {1000 * (timeout_s or 0):.0f} ms passed before the body had been "
                        f"read: send fewer rows in one request, or set {TIMEOUT}."
                    ) from None
                return await self.handler(call, query)

    def _tell(self, call: Call, scope: Scope, status: int, outcome: str, fault: str) -> None:
        ticket = call.ticket
        stages = (call.total_s, ticket.admitted_s, call.queue_s, call.solve_s)
        exemplar = call.trace_field() if ticket.span is not None and ticket.span.sampled else None
        for seconds, stage in zip(stages if ticket.rows else stages[:1], self._seconds, strict=False):
            stage.observe(seconds, exemplar)
        line = call.line(scope, status)
        log.info("request", extra={"fields": line})
        if ticket.span is not None:
            admitted = ticket.arrived + ticket.admitted_s if ticket.rows else None
            reply = None if status == _HUNG_UP else ticket.arrived + call.total_s
            end_request(ticket.span, line, outcome, fault, admitted, reply)
        if self._scope == "admin":
            audit(
                self.handler.__name__,
                **call.path,
                key=None if call.key is None else call.key.id,
                name=None if call.key is None else call.key.name,
                peer=call.peer,
                outcome="done" if status == self._status else "refused",
                status=status,
                request=call.id,
            )


def sent_key(headers: Headers) -> bytes | None:
    """The key in ``Authorization: Bearer …`` or ``X-API-Key``; None when there is none.

    Raises:
        Unauthorized: when there are several: who sent which would be a guess.
    """
    sent = None
    for name, value in headers:
        if name == b"authorization" and value[:7].lower() == b"bearer ":
            value = value[7:]
        elif name != b"x-api-key":
            continue
        if sent is not None:
            raise Unauthorized("There are several API keys in this request: send one.")
        sent = value.strip()
    return sent


def request_id(scope: Scope) -> str:
    """The id that the client gave in ``X-Request-Id``, if it is printable and short; else a new one."""
    for name, value in scope["headers"]:
        if name == b"x-request-id" and _ID.fullmatch(value):
            return str(value, "ascii")
    return secrets.token_hex(8)


def _outcome(error: PushforwardError) -> str:
    if isinstance(error, DeadlineExceeded):
        return "expired"
    return "refused" if isinstance(error, _REFUSALS) else "failed"


_REFUSALS = (Unavailable, Unauthorized, Forbidden, QuotaExceeded)
