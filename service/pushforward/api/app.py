"""The HTTP application: operations, their description, and problem+json for whatever else is asked."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

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
from pushforward.api.routes import Routes
from pushforward.api.wire import Door, Endpoint, request_id
from pushforward.dataplane import Dataplane
from pushforward.metrics import Metrics, Readiness
from pushforward.tracing import Tracing

__all__ = ["build", "operations"]

_MODEL = "/v1/models/{model}"
_VERSION = "/v1/models/{model}/versions/{version}"
_READING = (404, 405, 500, 503)
_SOLVING = (400, 404, 405, 413, 415, 422, 500, 503, 504)


def operations(routes: Routes) -> list[Operation]:
    """The table of operations, those that must be fast first."""
    solving = (
        (routes.log_density, schemas.DensityRequest, (DensityAnswer,)),
        (routes.anomaly, schemas.AnomalyRequest, (AnomalyAnswer,)),
        (routes.sample, schemas.SampleRequest, (SampleAnswer,)),
        (routes.transport, schemas.TransportRequest, (TransportAnswer, PathAnswer)),
    )
    reading = (
        ("/v1/models", routes.models, ModelList),
        (_MODEL, routes.model, ModelAnswer),
        (_VERSION, routes.model, ModelAnswer),
        ("/health/live", routes.live, Health),
        ("/health/ready", routes.ready, Health),
    )
    controlling = (routes.load, routes.unload)
    return [
        *(
            Operation("POST", f"{model}/{handler.__name__}", handler, request, forms, _SOLVING)
            for model in (_MODEL, _VERSION)
            for handler, request, forms in solving
        ),
        *(
            Operation("POST", f"{_VERSION}/{handler.__name__}", handler, None, (VersionState,), _READING, 202)
            for handler in controlling
        ),
        *(Operation("GET", path, handler, None, (answer,), _READING) for path, handler, answer in reading),
    ]


def build(plane: Dataplane, metrics: Metrics, max_body_bytes: int, tracing: Tracing | None = None) -> ASGIApp:
    """The application.

    Args:
        plane: answers the requests; its broker is started and closed with the application.
        metrics: of the server.
        max_body_bytes: the largest request body that is read.
        tracing: makes a span for every request that solves; closed with the application.
    """
    table = operations(Routes(plane))
    door = Door(plane.admission, plane.limits, metrics, max_body_bytes, tracing)
    routes = [
        Route(one.path, Endpoint(one.handler, door, one.request, one.status, one.path), methods=[one.method])
        for one in table
    ]
    metrics.engine.models = plane.broker.models
    metrics.registry.register(Readiness(plane.broker.unavailable))
    page = Path(__file__).with_name("docs.html").read_bytes()

    async def docs(request: Request) -> Response:
        return Response(page, media_type="text/html; charset=utf-8")

    async def exposition(request: Request) -> Response:
        content_type, text = metrics.exposition(request.headers.get("accept", ""))
        return Response(text, headers={"content-type": content_type})

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await plane.broker.start()
        yield
        await plane.broker.close()
        if tracing is not None:
            await asyncio.to_thread(tracing.close)

    app = FastAPI(
        lifespan=lifespan,
        exception_handlers={HTTPException: _refused},
        redirect_slashes=False,
        docs_url=None,  # FastAPI's page loads scripts from elsewhere; ours works offline
        redoc_url=None,
    )
    pages = [Route("/docs", docs, methods=["GET"]), Route("/metrics", exposition, methods=["GET"])]
    app.router.routes += [*routes, *pages]
    description = document(table)
    app.openapi = lambda: description  # type: ignore[method-assign]
    return _ShortCut(routes, app)


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
