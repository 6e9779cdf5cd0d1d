"""The OpenAPI document: made from the table of operations and their schemas."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

import pushforward
from pushforward.api.answers import Problem
from pushforward.api.body import TIMEOUT
from pushforward.keys import Scope

__all__ = ["Operation", "document"]

_PARAMETERS = {
    "model": "Name of the model.",
    "version": 'A version number, or a label such as "stable".',
}

_TIMEOUT = {
    "name": TIMEOUT,
    "in": "header",
    "description": "Deadline in milliseconds from the arrival of the request; timeout_ms beats it.",
    "schema": {"type": "integer", "minimum": 1},
}


@dataclass(frozen=True)
class Operation:
    """One operation of the API.

    Args:
        method: the HTTP method.
        path: with ``{model}`` and ``{version}`` where they stand.
        handler: what answers it; its name and docstring are those of the operation.
        request: what the body must be; None for an operation without one.
        answers: what the answer may be.
        errors: the HTTP statuses of its errors.
        status: the HTTP status of a good answer.
        scope: what a key must have for it; None when none is needed.
    """

    method: str
    path: str
    handler: Callable[..., Awaitable[Any]]
    request: type[BaseModel] | None
    answers: tuple[type[BaseModel], ...]
    errors: tuple[int, ...]
    status: int = 200
    scope: Scope | None = "infer"


def document(operations: Sequence[Operation]) -> dict[str, Any]:
    """The OpenAPI 3.1 document of the operations."""
    schemas: dict[type[BaseModel], None] = {Problem: None}
    for operation in operations:
        schemas |= dict.fromkeys(operation.answers)
        if operation.request is not None:
            schemas[operation.request] = None
    # Requests as they are checked, answers as they are written: fields that always come are required.
    modes = dict.fromkeys(schemas, "serialization")
    modes |= {operation.request: "validation" for operation in operations if operation.request is not None}
    references, definitions = models_json_schema(
        list(modes.items()),  # type: ignore[arg-type]
        ref_template="#/components/schemas/{model}",
    )
    names: dict[Any, Any] = {schema: reference for (schema, _), reference in references.items()}
    paths: dict[str, Any] = {}
    for operation in operations:
        paths.setdefault(operation.path, {})[operation.method.lower()] = _described(operation, names)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Pushforward",
            "version": pushforward.__version__,
            "description": "Samples, exact log-densities and anomaly scores of continuous normalizing flows.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "paths": paths,
        "components": {
            "schemas": definitions["$defs"],
            "responses": {"Problem": _response("An error.", names[Problem], "application/problem+json")},
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer", "description": "An API key."},
                "header": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
            },
        },
    }


def _described(operation: Operation, names: dict[Any, Any]) -> dict[str, Any]:
    parameters: list[dict[str, Any]] = [
        {"name": name, "in": "path", "required": True, "description": text, "schema": {"type": "string"}}
        for name, text in _PARAMETERS.items()
        if f"{{{name}}}" in operation.path
    ]
    refusals = () if operation.scope is None else (401, 403)
    answers = [names[answer] for answer in operation.answers]
    answer = answers[0] if len(answers) == 1 else {"oneOf": answers}
    described: dict[str, Any] = {
        "summary": (operation.handler.__doc__ or "").rstrip("."),
        "operationId": operation.handler.__name__ + ("_of_version" if "{version}" in operation.path else ""),
        "responses": {
            str(operation.status): _response("The answer.", answer, "application/json"),
            **{
                str(status): {"$ref": "#/components/responses/Problem", "summary": HTTPStatus(status).phrase}
                for status in sorted((*operation.errors, *refusals))
            },
        },
    }
    if operation.scope is not None:  # {}: a server without keys asks for none
        described["security"] = [{"bearer": [operation.scope]}, {"header": [operation.scope]}, {}]
    if operation.request is not None:
        parameters.append(_TIMEOUT)
    if parameters:
        described["parameters"] = parameters
    if operation.request is not None:
        described["requestBody"] = {
            "required": True,
            "content": {"application/json": {"schema": names[operation.request]}},
        }
    return described


def _response(text: str, schema: Any, media_type: str) -> dict[str, Any]:
    return {"description": text, "content": {media_type: {"schema": schema}}}
