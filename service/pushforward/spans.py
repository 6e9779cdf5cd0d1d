"""What a trace is made of: its spans, their events and attributes, in the order of a request.

    POST …/log_density   server, in the HTTP process   admitted … reply
    └─ chunk             producer, the same            queued …
       └─ solve          consumer, in a worker         first step … last step

A request has a chunk span for every chunk, whose context travels with the chunk. A worker makes its span
when it has sent its answer, so that the answer does not wait for it. HTTP attributes have the names of
OpenTelemetry's semantic conventions; the others begin with ``pushforward.``.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import msgspec

from pushforward.engine.request import Status
from pushforward.errors import PushforwardError
from pushforward.messages import Result, Work
from pushforward.tracing import Span, Tracing

__all__ = ["begin_request", "end_request", "solve", "traced"]

_HOST = re.compile(r"(.*?)(?::([0-9]{1,5}))?", re.DOTALL)  # matches whatever a client may write
_PARENT = {b"traceparent": "traceparent", b"tracestate": "tracestate"}
_LOGGED = ("request", "model", "version", "rows", "solved", "steps", "nfe")
_ERRORS = {Status.DEADLINE: "the deadline passed", Status.CANCELLED: "cancelled"}


def begin_request(tracing: Tracing, scope: Mapping[str, Any], route: str) -> Span:
    """Begin the span of an HTTP request, within that of its client if the headers name one."""
    carrier: dict[str, str | list[str]] = {}
    method = scope["method"]
    attributes: dict[str, str | int] = {
        "http.request.method": method,
        "http.route": route,
        "url.path": scope["path"],
        "url.scheme": scope.get("scheme", "http"),
        "network.protocol.version": scope.get("http_version", "1.1"),
    }
    if scope.get("client"):
        attributes["client.address"] = scope["client"][0]
    for name, value in scope["headers"]:
        if name in _PARENT:
            carrier.setdefault(_PARENT[name], []).append(value.decode("latin-1"))  # type: ignore[union-attr]
        elif name == b"user-agent":
            attributes["user_agent.original"] = value.decode("latin-1")
        elif name == b"host":
            host, port = _HOST.fullmatch(value.decode("latin-1")).groups()  # type: ignore[union-attr]
            attributes["server.address"] = host
            if port is not None:
                attributes["server.port"] = int(port)
    return tracing.span(f"{method} {route}", "SERVER", carrier, attributes)


def end_request(
    span: Span,
    line: Mapping[str, Any],
    outcome: str,
    fault: str,
    admitted: float | None,
    reply: float | None,
) -> None:
    """End the span of an HTTP request.

    Args:
        span: from ``begin_request``.
        line: what the log says of it.
        outcome: as the metrics have it.
        fault: the code of its error, or "".
        admitted: when its rows were admitted, Unix time in seconds; None without rows.
        reply: when its answer was sent; None when there was nobody to send it to.
    """
    attributes = {f"pushforward.{name}": line[name] for name in _LOGGED if name in line}
    attributes["pushforward.outcome"] = outcome
    if fault:
        attributes["pushforward.code"] = fault
    if admitted is not None:
        span.event("admitted", _ns(admitted))
    error = None
    if reply is None:
        error = "the client hung up"
        attributes["error.type"] = outcome
    else:
        span.event("reply", _ns(reply))
        attributes["http.response.status_code"] = line["status"]
        if line["status"] >= 500:  # by the convention, what the client did wrong is no error of the server
            error = line.get("error", fault)
            attributes["error.type"] = fault
    span.end(attributes, error)


async def traced(parent: Span, submit: Callable[[Work], Awaitable[Result]], work: Work) -> Result:
    """Have a chunk solved, in a span of its own.

    Args:
        parent: that of its request.
        submit: of the broker.
        work: the chunk.
    """
    told = {"pushforward.chunk": work.id, "pushforward.rows": len(work.rows)}
    span = parent.child("chunk", "PRODUCER", told)
    span.event("queued", time.time_ns())
    try:
        result = await submit(msgspec.structs.replace(work, trace=span.carrier()))
    except BaseException as error:
        span.end(_attempts(error), _reason(error))
        raise
    # At the end of this turn of the event loop, the answer is on its way.
    asyncio.get_running_loop().call_soon(_end_chunk, span, result, time.time_ns())
    return result


def _end_chunk(span: Span, result: Result, at_ns: int) -> None:
    span.end(_spent(result) | {"pushforward.attempts": result.fence}, _late(result), at_ns)


def solve(
    tracing: Tracing, work: Work, arrived_ns: int, outcome: Result | Exception | None, over_ns: int
) -> None:
    """A worker's attempt at a chunk, when it is over.

    Args:
        tracing: of the worker.
        work: the chunk.
        arrived_ns: when it came to the worker, Unix time in nanoseconds.
        outcome: its answer, or why there is none; None when it was cancelled before its rows were submitted.
        over_ns: when its last row left, or it was given up.
    """
    told = {
        "pushforward.chunk": work.id,
        "pushforward.attempt": work.fence,
        "pushforward.model": work.model,
        "pushforward.version": work.version,
        "pushforward.kind": work.kind,
        "pushforward.rows": len(work.rows),
    }
    span = tracing.span("solve", "CONSUMER", work.trace, told, arrived_ns)
    if not isinstance(outcome, Result):
        span.end({}, "cancelled" if outcome is None else _reason(outcome), over_ns)
        return
    if outcome.steps.any():
        span.event("first step", over_ns - round(1e9 * outcome.solve_s))
        span.event("last step", over_ns)
    span.end(_spent(outcome), _late(outcome), over_ns)


def _spent(result: Result) -> dict[str, Any]:
    return {
        "pushforward.solved": result.status.tobytes().count(Status.OK),
        "pushforward.steps": int(result.steps.sum()),
        "pushforward.nfe": int(result.nfe.sum()),
    }


def _late(result: Result) -> str | None:
    """Why a chunk was not solved to its end. A row that failed on its way is no fault of the chunk."""
    ended = result.status.tobytes()
    return next((reason for status, reason in _ERRORS.items() if status in ended), None)


def _reason(error: BaseException) -> str:
    if isinstance(error, asyncio.CancelledError):
        return "cancelled"
    if isinstance(error, TimeoutError):
        return "the deadline passed"
    return error.message if isinstance(error, PushforwardError) else f"{type(error).__name__}: {error}"


def _attempts(error: BaseException) -> dict[str, Any]:
    """How often a chunk that was given up had been handed out."""
    detail = error.detail if isinstance(error, PushforwardError) else {}
    return {"pushforward.attempts": detail["attempts"]} if "attempts" in detail else {}


def _ns(seconds: float) -> int:
    return round(1e9 * seconds)
