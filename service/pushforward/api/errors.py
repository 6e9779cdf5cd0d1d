"""Errors as problem+json (RFC 9457): the one place that gives an error its HTTP status."""

from __future__ import annotations

import math
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

import orjson
from pydantic import ValidationError

from pushforward import errors
from pushforward.errors import InvalidInput, PushforwardError

__all__ = ["STATUS", "HttpError", "code", "invalid_input", "problem"]

STATUS: dict[type[PushforwardError], int] = {
    errors.InvalidInput: 422,
    errors.LimitExceeded: 422,
    errors.NotFound: 404,
    errors.Conflict: 409,
    errors.InvalidModel: 503,
    errors.SolveFailed: 500,
    errors.DeadlineExceeded: 504,
    errors.Unauthorized: 401,
    errors.Forbidden: 403,
    errors.QuotaExceeded: 429,
    errors.Unavailable: 503,
    errors.TrainingFailed: 500,
    errors.PublishFailed: 500,
    errors.UsageError: 500,
    PushforwardError: 500,
}


class HttpError(PushforwardError):
    """A fault of the HTTP request itself, before anything was asked of a model.

    Args:
        status: the HTTP status.
        code: the kind of error, for programs.
        message: what was wrong, and what would be right.
        headers: headers of the answer, such as ``Allow``.
    """

    def __init__(
        self, status: int, code: str, message: str, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.http_code = code
        self.headers = dict(headers or {})

    def __reduce__(self) -> tuple[Any, ...]:  # see ``reader``
        return HttpError, (self.status, self.http_code, self.message, self.headers)


def code(error: PushforwardError) -> str:
    """The kind of error, for programs."""
    return error.http_code if isinstance(error, HttpError) else error.code


def problem(error: PushforwardError, request_id: str) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body that tell of an error."""
    headers = {"content-type": "application/problem+json", "x-request-id": request_id}
    if isinstance(error, HttpError):
        status = error.status
        headers |= error.headers
    else:
        status = STATUS[type(error)]
    retry_after = error.detail.get("retry_after")
    if retry_after is not None:
        headers["retry-after"] = str(math.ceil(retry_after))
    if isinstance(error, errors.Unauthorized):
        headers["www-authenticate"] = 'Bearer realm="pushforward"'
    elif isinstance(error, errors.Forbidden):
        headers["www-authenticate"] = (
            f'Bearer realm="pushforward", error="insufficient_scope", scope="{error.detail["scope"]}"'
        )
    body = {
        **error.detail,
        "type": f"urn:pushforward:error:{code(error)}",
        "title": HTTPStatus(status).phrase,
        "status": status,
        "detail": error.message,
        "code": code(error),
        "request_id": request_id,
    }
    return status, headers, orjson.dumps(body, option=orjson.OPT_APPEND_NEWLINE)


def invalid_input(error: ValidationError) -> PushforwardError:
    """What pydantic found wrong with a request body, as one error that names the first place.

    The forms of a union are not part of the place: ``context.numbers[0]`` is ``context[0]`` to whoever
    wrote it.
    """
    first, *others = error.errors(include_url=False, include_context=True)
    if first["type"] == "json_invalid":
        return HttpError(400, "malformed-json", f"The body is not JSON: {first['ctx']['error']}.")
    where = _place(first["loc"])
    more = f" (and {len(others)} more)" if others else ""
    return InvalidInput(f"{where or 'The body'}: {_explained(first)}{more}.", where=where or None)


_FORMS = ("numbers", "names")  # tags of schemas.Rows


def _place(loc: tuple[int | str, ...]) -> str:
    parts = [
        part for index, part in enumerate(loc) if not (index == 1 and loc[0] == "context" and part in _FORMS)
    ]
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part[:80]}" for part in parts)
    return text.removeprefix(".")


def _explained(fault: Any) -> str:
    kind, given, limits = fault["type"], fault["input"], fault.get("ctx", {})
    if kind == "float_type":
        return f"must be a number, not {_shown(given)}"
    if kind == "int_type":
        return f"must be a whole number, not {_shown(given)}"
    if kind == "bool_type":
        return f"must be true or false, not {_shown(given)}"
    if kind == "list_type":
        return f"must be a list, not {_shown(given)}"
    for name, words in _BOUNDS.items():
        if name in limits and isinstance(given, int | float):
            return f"must be {words} {limits[name]:g}, not {_shown(given)}"
    message: str = fault["msg"].removeprefix("Input ").removeprefix("Value error, ")
    return f"{message}, not {_shown(given)}" if isinstance(given, str) else message


_BOUNDS = {"ge": "at least", "gt": "more than", "le": "at most", "lt": "less than"}


def _shown(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "a list"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
