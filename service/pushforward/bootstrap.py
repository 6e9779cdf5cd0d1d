"""Puts the rooms together: the one place where everything is made from the settings."""

from __future__ import annotations

import gc
import itertools
import logging
import math
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from pushforward import logs
from pushforward.broker.local import LocalBroker
from pushforward.dataplane import Admission, Dataplane, Limits
from pushforward.errors import UsageError
from pushforward.messages import Setup
from pushforward.metrics import Metrics
from pushforward.programs.devices import check_devices, gpus
from pushforward.settings import Settings
from pushforward.store.catalog import Catalog
from pushforward.store.opening import opened

__all__ = ["offline", "serve"]

log = logging.getLogger(__name__)

_UNLIMITED = 1 << 62
_KEEP_ALIVE_S = 75  # longer than clients and proxies keep idle connections, so that it is they who close them
_BACKLOG = 2048


def serve(settings: Settings) -> None:
    """Serve the models of the store over HTTP until told to stop.

    Raises:
        UsageError: when the address cannot be listened on, or the store cannot be opened.
        NotFound: when there is no model store.
        Unavailable: when the store cannot be reached, and nothing of it is in the cache.
    """
    logs.configure(settings.log_level, settings.log_format)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _leave)
    # no store is an error now, not a server without models
    catalog = opened(settings.store, settings.cache, settings.cache_mb)
    admission = Admission(settings.max_queue_rows, settings.max_queue_bytes)
    metrics = Metrics(admission)
    broker = LocalBroker(_setups(settings), settings.stall_s, metrics.engine)
    metrics.engine.models = broker.models
    listener = _listening(settings.host, settings.port)
    broker.spawn()  # it loads its models while this process imports what only serving needs

    import uvicorn

    from pushforward.api.app import build
    from pushforward.api.server import Server

    limits = Limits(
        rows=settings.max_rows,
        samples=settings.max_samples,
        timeout_ms=settings.timeout_ms,
        max_timeout_ms=settings.max_timeout_ms,
        chunk_rows=settings.chunk_rows,
        interactive_rows=settings.interactive_rows,
    )
    plane = Dataplane(catalog, broker, limits, admission, settings.canary_share)
    app = build(plane, metrics, settings.max_body_bytes)
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
    with catalog.followed(settings.watch_s):
        Server(config, broker).run(sockets=[listener])


@asynccontextmanager
async def offline(settings: Settings, catalog: Catalog) -> AsyncIterator[Dataplane]:
    """A data plane with worker processes and without a server, for as long as the block runs.

    Args:
        settings: of which the limits and deadlines, which protect a server, do not apply.
        catalog: where the models are.
    """
    quiet = {"load": "first-use", "log_level": "warning", "workers": settings.workers or 1}
    broker = LocalBroker(_setups(settings.model_copy(update=quiet)), settings.stall_s)
    limits = Limits(
        rows=_UNLIMITED,
        samples=_UNLIMITED,
        timeout_ms=None,
        max_timeout_ms=_UNLIMITED,
        chunk_rows=settings.chunk_rows,
        interactive_rows=_UNLIMITED,
    )
    await broker.start()
    try:
        yield Dataplane(catalog, broker, limits, Admission(_UNLIMITED, _UNLIMITED))
    finally:
        await broker.close()


def _setups(settings: Settings) -> list[Setup]:
    """One for each worker."""
    devices = gpus() or ["cpu"] if settings.device == "auto" else settings.device.split(",")
    check_devices(devices)
    spare_cores = max(1, len(os.sched_getaffinity(0)) - 1)
    workers = settings.workers or (spare_cores if devices == ["cpu"] else len(devices))
    return [
        Setup(
            store=settings.store,
            versions=settings.versions,
            load=settings.load,
            watch_s=settings.watch_s,
            model_memory_mb=settings.model_memory_mb,
            device=device,
            slots=settings.slots,
            step_budget_ms=settings.step_budget_ms,
            log_level=settings.log_level,
            log_format=settings.log_format,
            cache=None if settings.cache is None else str(settings.cache),
            cache_mb=settings.cache_mb,
        )
        for device in itertools.islice(itertools.cycle(devices), workers)
    ]


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
