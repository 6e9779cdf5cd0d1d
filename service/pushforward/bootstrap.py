"""Puts the rooms together: the one place where everything is made from the settings."""

from __future__ import annotations

import gc
import logging
import math
import signal
import socket
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from pushforward import logs
from pushforward.broker.local import LocalBroker
from pushforward.dataplane import Dataplane, Limits
from pushforward.errors import InvalidModel, UsageError
from pushforward.messages import Setup
from pushforward.settings import Settings
from pushforward.store.catalog import Catalog

__all__ = ["offline", "serve"]

log = logging.getLogger(__name__)

_UNLIMITED = 1 << 62
_KEEP_ALIVE_S = 75  # longer than clients and proxies keep idle connections, so that it is they who close them
_BACKLOG = 2048


def serve(settings: Settings) -> None:
    """Serve the models of the store over HTTP until told to stop.

    Raises:
        UsageError: when the address cannot be listened on.
        NotFound: when there is no model store.
    """
    logs.configure(settings.log_level, settings.log_format)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _leave)
    catalog = Catalog(settings.store)
    broker = LocalBroker(
        _setup(settings, _served(catalog) if settings.load == "start" else [], settings.log_level)
    )
    listener = _listening(settings.host, settings.port)
    broker.spawn()  # it loads its models while this process imports what only serving needs

    import uvicorn

    from pushforward.api.app import build

    limits = Limits(
        rows=settings.max_rows,
        samples=settings.max_samples,
        timeout_ms=settings.timeout_ms,
        max_timeout_ms=settings.max_timeout_ms,
        chunk_rows=settings.chunk_rows,
    )
    app = build(Dataplane(catalog, broker, limits), settings.max_body_bytes)
    config = uvicorn.Config(
        app,
        loop="uvloop",
        http="httptools",
        ws="none",
        lifespan="on",
        log_config=None,
        log_level="warning",
        access_log=False,  # a request has its own line, with more in it
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=_KEEP_ALIVE_S,
        timeout_graceful_shutdown=math.ceil(settings.drain_s),
        backlog=_BACKLOG,
    )
    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    log.info("listening", extra=logs.fields(url=f"http://{shown}:{port}", docs=f"http://{shown}:{port}/docs"))
    gc.freeze()  # what is there now stays: collections need not look at it again and again
    uvicorn.Server(config).run(sockets=[listener])


@asynccontextmanager
async def offline(settings: Settings, catalog: Catalog, version: tuple[str, int]) -> AsyncIterator[Dataplane]:
    """A data plane with a worker process and without a server, for as long as the block runs.

    Args:
        settings: of which the limits and deadlines, which protect a server, do not apply.
        catalog: where the model is.
        version: the model version to load.
    """
    broker = LocalBroker(_setup(settings, [version], "warning"))
    limits = Limits(
        rows=_UNLIMITED,
        samples=_UNLIMITED,
        timeout_ms=None,
        max_timeout_ms=_UNLIMITED,
        chunk_rows=settings.chunk_rows,
    )
    await broker.start()
    try:
        yield Dataplane(catalog, broker, limits)
    finally:
        await broker.close()


def _served(catalog: Catalog) -> list[tuple[str, int]]:
    """What a request without a version number can mean: the default of each model, and those with labels."""
    versions: list[tuple[str, int]] = []
    for name in catalog.models():
        try:
            default = catalog.resolve(name).manifest.version
            versions += [(name, number) for number in sorted({default, *catalog.labels(name).values()})]
        except InvalidModel as error:
            log.error("model cannot be served", extra=logs.fields(model=name, reason=error.message))
    return versions


def _setup(settings: Settings, versions: Sequence[tuple[str, int]], log_level: str) -> Setup:
    return Setup(
        store=str(settings.store),
        models=list(versions),
        slots=settings.slots,
        log_level=log_level,
        log_format=settings.log_format,
    )


def _listening(host: str, port: int) -> socket.socket:
    """A socket that listens on the address: what is wrong with that is known before anything is started."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(_BACKLOG)
    except OSError as error:
        raise UsageError(
            f"Cannot listen on --host {host} --port {port}: {error.strerror}. "
            "Choose another port; 0 takes a free one."
        ) from None
    return listener


def _leave(number: int, frame: Any) -> None:
    # Uvicorn puts its own handlers in place while it serves, and hands the signal on to these when it has
    # drained.
    sys.exit(0)
