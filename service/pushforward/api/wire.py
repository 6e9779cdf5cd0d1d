"""One HTTP request, from its bytes to its answer's bytes, on bare ASGI.

Small as these functions are, a one-row answer takes half a millisecond to compute: what a request costs
here is seen.
"""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
import time
from collections.abc import Awaitable, Callable
from typing import Any, Generic, TypeVar

import orjson
from pydantic import BaseModel, TypeAdapter, ValidationError
from starlette.types import Receive, Scope, Send

from pushforward.api.errors import HttpError, invalid_input, problem
from pushforward.engine.request import Status
from pushforward.errors import InvalidInput, PushforwardError
from pushforward.logs import fields
from pushforward.messages import Result

__all__ = ["Call", "Endpoint", "request_id"]

log = logging.getLogger("pushforward.request")

Query = TypeVar("Query", bound=BaseModel)
_ID = re.compile(rb"[A-Za-z0-9._:/+=@-]{1,128}")
_JSON = orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_APPEND_NEWLINE


class Call:
    """What the handler of a request is told, and what it leaves for the log."""

    __slots__ = ("id", "logged", "path", "result")

    def __init__(self, scope: Scope) -> None:
        self.id = request_id(scope)
        self.path: dict[str, str] = scope["path_params"]
        self.logged: dict[str, Any] = {}
        self.result: Result | None = None

    def log(self, scope: Scope, status: int, wall_s: float) -> None:
        """Write the request's line."""
        if self.result is not None:
            self.logged |= {
                "rows": len(self.result.status),
                "steps": int(self.result.steps.sum()),
                "nfe": int(self.result.nfe.sum()),
                "failed": len(self.result.status) - self.result.status.tobytes().count(Status.OK),
            }
        told = {"request": self.id, "method": scope["method"], "path": scope["path"], "status": status}
        log.info("request", extra={"fields": told | self.logged | {"wall_ms": round(1000 * wall_s, 3)}})


class Endpoint(Generic[Query]):
    """An ASGI application around a handler of one operation.

    Args:
        handler: from the call and the checked body (None without one) to the content of the answer.
        schema: what the body must be; None for an operation without a body.
        max_body_bytes: the largest body that is read.
    """

    def __init__(
        self,
        handler: Callable[[Call, Query], Awaitable[Any]],
        schema: type[Query] | None = None,
        max_body_bytes: int = 0,
    ) -> None:
        self.handler = handler
        self.schema = schema
        self._validator = None if schema is None else TypeAdapter(schema).validator
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        started = time.perf_counter()
        call = Call(scope)
        status, headers = 200, {"content-type": "application/json", "x-request-id": call.id}
        try:
            query: Any = None
            if self._validator is not None:
                query = _parsed(self._validator, await _body(scope, receive, self._max_body_bytes))
            body = orjson.dumps(await self.handler(call, query), option=_JSON)
        except PushforwardError as error:
            status, headers, body = problem(error, call.id)
            call.logged["error"] = error.message
        except Exception:
            log.exception("request failed", extra=fields(request=call.id))
            fault = PushforwardError(
                "The server made a mistake; its log has the details under this request id."
            )
            status, headers, body = problem(fault, call.id)
        headers["content-length"] = str(len(body))
        raw = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
        await send({"type": "http.response.start", "status": status, "headers": raw})
        await send({"type": "http.response.body", "body": body})
        # Logged when the answer is on its way, which it is at the end of this turn of the event loop.
        wall_s = time.perf_counter() - started
        asyncio.get_running_loop().call_soon(call.log, scope, status, wall_s)


def request_id(scope: Scope) -> str:
    """The id that the client gave in ``X-Request-Id``, if it is printable and short; else a new one."""
    for name, value in scope["headers"]:
        if name == b"x-request-id" and _ID.fullmatch(value):
            return str(value, "ascii")
    return secrets.token_hex(8)


async def _body(scope: Scope, receive: Receive, limit: int) -> bytes:
    for name, value in scope["headers"]:
        if name == b"content-type":
            _check_content_type(value)
        elif name == b"content-encoding" and value.strip().lower() not in (b"", b"identity"):
            raise HttpError(
                415,
                "unsupported-encoding",
                f"The body is encoded as {value.decode('latin-1')!r}; send it without Content-Encoding.",
                {"accept-encoding": "identity"},
            )
        elif name == b"content-length" and int(value) > limit:  # uvicorn has checked that it is a number
            raise _too_large(limit)
    parts: list[bytes] = []
    size, more = 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise HttpError(
                400, "incomplete-body", "The connection was closed before the whole body had arrived."
            )
        part, more = message.get("body", b""), message.get("more_body", False)
        size += len(part)
        if size > limit:
            raise _too_large(limit)
        parts.append(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _too_large(limit: int) -> HttpError:
    # The rest of the body is not wanted, so the connection cannot serve another request.
    return HttpError(
        413,
        "body-too-large",
        f"The body is larger than {limit} bytes: send fewer rows in one request.",
        {"connection": "close"},
    )


def _check_content_type(value: bytes) -> None:
    kind, _, parameters = value.decode("latin-1").lower().partition(";")
    charset = parameters.partition("charset=")[2].strip(' "')
    if kind.strip() != "application/json" or charset not in ("", "utf-8"):
        raise HttpError(
            415,
            "unsupported-media-type",
            f"The body is {value.decode('latin-1')!r}; send Content-Type: application/json, in UTF-8.",
            {"accept": "application/json"},
        )


def _parsed(validator: Any, body: bytes) -> Any:
    try:
        query = validator.validate_json(body)
    except ValidationError as error:
        raise invalid_input(error) from None
    if query.model_extra:
        unknown = next(iter(query.model_extra))[:80]
        known = ", ".join(type(query).model_fields)
        raise InvalidInput(f"There is no field {unknown!r}; the fields are {known}.", where=unknown)
    return query
