"""What a worker on its own answers over HTTP: whether it is well, and what it has done."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client.registry import CollectorRegistry
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from pushforward.api.errors import problem
from pushforward.api.wire import request_id
from pushforward.errors import Unavailable
from pushforward.metrics import exposition

__all__ = ["build_probes"]


def build_probes(unavailable: Callable[[], str | None], registry: CollectorRegistry) -> Starlette:
    """The application.

    Args:
        unavailable: why the worker would not take work now; None when it would.
        registry: of its metrics.
    """

    async def live(request: Request) -> Response:
        return JSONResponse({"status": "live"})

    async def ready(request: Request) -> Response:
        reason = unavailable()
        if reason is None:
            return JSONResponse({"status": "ready"})
        status, headers, body = problem(Unavailable(reason, retry_after=1), request_id(request.scope))
        return Response(body, status, headers)

    async def metrics(request: Request) -> Response:
        content_type, text = exposition(registry, request.headers.get("accept", ""))
        return Response(text, headers={"content-type": content_type})

    return Starlette(
        routes=[
            Route("/health/live", live),
            Route("/health/ready", ready),
            Route("/metrics", metrics),
        ]
    )
