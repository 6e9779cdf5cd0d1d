"""The HTTP application: operations, their description, and problem+json for whatever else is asked."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import re
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Literal

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Match, Route
from starlette.types import ASGIApp, Receive, Scope, Send

from pushforward.api import schemas
from pushforward.api.answers import (
    AnomalyAnswer,
    DensityAnswer,
    Health,
    ModelAnswer,
    ModelList,
    PathAnswer,
    SampleAnswer,
    TransportAnswer,
    VersionState,
)
from pushforward.api.errors import HttpError, problem
from pushforward.api.openapi import Operation, document
from pushforward.api.reader import Reader
from pushforward.api.routes import Routes
from pushforward.api.wire import Door, Endpoint, request_id, sent_key
from pushforward.dataplane import Dataplane
from pushforward.errors import PushforwardError
from pushforward.keys import Keyring
from pushforward.metrics import Metrics, Readiness
from pushforward.tracing import Tracing

__all__ = ["build", "operations"]

_MODEL = "/v1/models/{model}"
_VERSION = "/v1/models/{model}/versions/{version}"
_READING = (404, 405, 500, 503)
_SOLVING = (400, 404, 405, 413, 415, 422, 429, 500, 503, 504)

Admin = Literal["here", "elsewhere", "alone"]


def operations(routes: Routes, admin: Admin = "here") -> list[Operation]:
    """The table of operations, those that must be fast first.

    Args:
        routes: handle them.
        admin: whether those that change the server are among them, or others only, or they only.
    """
    solving: Sequence[tuple[Any, ...]] = (
        (routes.log_density, schemas.DensityRequest, (DensityAnswer,)),
        (routes.anomaly, schemas.AnomalyRequest, (AnomalyAnswer,)),
        (routes.sample, schemas.SampleRequest, (SampleAnswer,)),
        (routes.transport, schemas.TransportRequest, (TransportAnswer, PathAnswer)),
    )
    reading: Sequence[tuple[Any, ...]] = (
        ("/v1/models", routes.models, ModelList),
        (_MODEL, routes.model, ModelAnswer),
        (_VERSION, routes.model, ModelAnswer),
    )
    health = (("/health/live", routes.live, Health), ("/health/ready", routes.ready, Health))
    controlling: Sequence[Any] = () if admin == "elsewhere" else (routes.load, routes.unload)
    if admin == "alone":
        solving, reading = (), ()
    return [
        *(
            Operation("POST", f"{model}/{handler.__name__}", handler, request, forms, _SOLVING)
            for model in (_MODEL, _VERSION)
            for handler, request, forms in solving
        ),
        *(
            Operation(
                "POST",
                f"{_VERSION}/{handler.__name__}",
                handler,
                None,
                (VersionState,),
                _READING,
                status=202,
                scope="admin",
            )
            for handler in controlling
        ),
        *(Operation("GET", path, handler, None, (answer,), _READING) for path, handler, answer in reading),
        *(
            Operation("GET", path, handler, None, (answer,), _READING, scope=None)
            for path, handler, answer in health
        ),
    ]


def build(
    plane: Dataplane,
    metrics: Metrics,
    max_body_bytes: int,
    keyring: Keyring | None = None,
    admin_port: int | None = None,
    tracing: Tracing | None = None,
) -> ASGIApp:
    """The application.

    Args:
        plane: answers the requests; its broker is started and closed with the application.
        metrics: of the server.
        max_body_bytes: the largest request body that is read.
        keyring: who may ask, started and closed with the application; None when anyone may.
        admin_port: where requests that change the server, and /metrics, are answered, and no others; None for
            no port of their own.
        tracing: makes a span for every request that solves; closed with the application.
    """
    metrics.engine.models = plane.broker.models
    routes = Routes(plane, keyring)
    reader = Reader()
    door = Door(plane.admission, plane.limits, metrics, max_body_bytes, reader, keyring, tracing)
    metrics.registry.register(Readiness(plane.broker.unavailable))

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        if keyring is not None:
            await keyring.start()
        await plane.broker.start()
        yield
        await plane.broker.close()
        await reader.close()
        if keyring is not None:
            await keyring.close()
        if tracing is not None:
            await asyncio.to_thread(tracing.close)

    if admin_port is None:
        return _application(routes, door, "here", lifespan)
    admin = _application(routes, door, "alone")
    return _ByPort(admin_port, admin, _application(routes, door, "elsewhere", lifespan))


def _application(
    routes: Routes, door: Door, admin: Admin, lifespan: Callable[[FastAPI], Any] | None = None
) -> ASGIApp:
    table = operations(routes, admin)
    endpoints = [
        Route(
            one.path,
            Endpoint(one.handler, door, one.request, one.status, one.scope, one.path),
            methods=[one.method],
        )
        for one in table
    ]
    page = Path(__file__).with_name("docs.html").read_bytes()
    page_headers = {"content-security-policy": _policy(page)}

    async def docs(request: Request) -> Response:
        return Response(page, media_type="text/html; charset=utf-8", headers=page_headers)

    async def exposition(request: Request) -> Response:
        if door.keyring is not None and admin == "here":  # a port of their own is for those who may
            door.keyring.identify(sent_key(request.headers.raw), "metrics")
        content_type, text = door.metrics.exposition(request.headers.get("accept", ""))
        return Response(text, headers={"content-type": content_type})

    app = FastAPI(
        lifespan=lifespan,
        exception_handlers={HTTPException: _refused, PushforwardError: _failed},
        redirect_slashes=False,
        docs_url=None,  # FastAPI's page loads scripts from elsewhere; ours works offline
        redoc_url=None,
    )
    pages = [Route("/docs", docs, methods=["GET"])]
    if admin != "elsewhere":
        pages.append(Route("/metrics", exposition, methods=["GET"]))
    app.router.routes += [*endpoints, *pages]
    description = document(table)
    app.openapi = lambda: description  # type: ignore[method-assign]
    return _ShortCut(endpoints, app)


def _policy(page: bytes) -> str:
    """A content security policy under which a page runs its own script and style, and nothing else."""
    hashes = {
        tag: base64.b64encode(hashlib.sha256(text).digest()).decode()
        for tag, text in re.findall(rb"<(script|style)>(.*?)</\1>", page, re.DOTALL)
    }
    return (
        f"default-src 'none'; script-src 'sha256-{hashes[b'script']}'; "
        f"style-src 'sha256-{hashes[b'style']}'; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


class _ByPort:
    """Leads requests that came in on the admin port to an application of their own."""

    def __init__(self, port: int, there: ASGIApp, elsewhere: ASGIApp) -> None:
        self._port = port
        self._there = there
        self._elsewhere = elsewhere

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        server = scope.get("server")
        app = self._there if server is not None and server[1] == self._port else self._elsewhere
        await app(scope, receive, send)


class _ShortCut:
    """Leads a request straight to its endpoint, and everything else through the whole application.

    The endpoints need nothing of the framework's middleware, whose 40 µs are seen beside the half millisecond
    that a one-row answer takes to compute.
    """

    def __init__(self, routes: Sequence[Route], app: ASGIApp) -> None:
        self._routes = routes
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            for route in self._routes:
                match, found = route.matches(scope)
                if match is Match.FULL:
                    scope.update(found)
                    await route.app(scope, receive, send)
                    return
        await self._app(scope, receive, send)


async def _failed(request: Request, error: Exception) -> Response:
    """What a page raised."""
    assert isinstance(error, PushforwardError)
    status, headers, body = problem(error, request_id(request.scope))
    return Response(body, status, headers)


async def _refused(request: Request, error: Exception) -> Response:
    """What the router refuses, told as the rest of the API tells it."""
    assert isinstance(error, HTTPException)
    path = request.url.path[:200]
    if error.status_code == 405:
        allowed = ", ".join(sorted((error.headers or {}).get("Allow", "").split(", ")))
        message = f"{request.method} is not a method of {path}; use {allowed}."
        fault = HttpError(405, "method-not-allowed", message, {"allow": allowed})
    else:
        fault = HttpError(404, "no-such-path", f"There is nothing at {path}; /docs describes what there is.")
    status, headers, body = problem(fault, request_id(request.scope))
    return Response(body, status, headers)
