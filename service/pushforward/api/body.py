"""The body of a request: its headers, its bytes, and what they say."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError
from starlette.types import Receive

from pushforward.api.errors import HttpError, invalid_input
from pushforward.dataplane.admission import HungUp, Place
from pushforward.errors import InvalidInput

__all__ = ["TIMEOUT", "Headers", "Headings", "parsed", "read"]

Headers = list[tuple[bytes, bytes]]
TIMEOUT = "X-Timeout-Ms"


class Headings:
    """What the headers say of a body.

    Args:
        headers: of the request.
        limit: the largest body that is read, in bytes.

    Attributes:
        nbytes: the largest that the body may turn out to be.
        timeout_ms: the deadline they set, if any.

    Raises:
        HttpError: for a body that cannot be read.
        InvalidInput: for a deadline that is no number.
    """

    __slots__ = ("nbytes", "timeout_ms")

    def __init__(self, headers: Headers, limit: int) -> None:
        self.nbytes = 0
        self.timeout_ms: int | None = None
        for name, value in headers:
            if name == b"content-type":
                _check_content_type(value)
            elif name == b"content-encoding" and value.strip().lower() not in (b"", b"identity"):
                raise HttpError(
                    415,
                    "unsupported-encoding",
                    f"The body is encoded as {value.decode('latin-1')!r}; send it without Content-Encoding.",
                    {"accept-encoding": "identity"},
                )
            elif name == b"content-length":  # uvicorn has checked that it is a number
                if int(value) > limit:
                    raise _too_large(limit)
                self.nbytes = int(value)
            elif name == b"transfer-encoding":
                self.nbytes = limit
            elif name == b"x-timeout-ms":
                self.timeout_ms = _milliseconds(value)


async def read(receive: Receive, place: Place) -> bytes:
    """The body, for which its place has room.

    Args:
        receive: of ASGI.
        place: holds the largest that the body may be, and in the end no more than it is.

    Raises:
        HttpError: when it is larger.
        HungUp: when the client leaves before its end.
    """
    parts: list[bytes] = []
    size, more = 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise HungUp
        part, more = message.get("body", b""), message.get("more_body", False)
        size += len(part)
        if size > place.nbytes:  # which only a body in chunks can be
            raise _too_large(place.nbytes)
        parts.append(part)
    if size < place.nbytes:
        place.shrink(size)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def parsed(validator: Any, body: bytes) -> Any:
    """What a body says.

    Raises:
        HttpError: when it is no JSON.
        InvalidInput: naming the first place that is not as it must be.
    """
    try:
        query = validator.validate_json(body)
    except ValidationError as error:
        raise invalid_input(error) from None
    if query.model_extra:
        unknown = next(iter(query.model_extra))[:80]
        known = ", ".join(type(query).model_fields)
        raise InvalidInput(f"There is no field {unknown!r}; the fields are {known}.", where=unknown)
    return query


def _milliseconds(value: bytes) -> int:
    text = value.decode("latin-1").strip()
    if not (text.isascii() and text.isdigit() and len(text) < 16 and int(text) > 0):
        raise InvalidInput(
            f"{TIMEOUT} is {text[:80]!r}; it must be a whole number of milliseconds, at least 1.",
            where=TIMEOUT,
        )
    return int(text)


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
