"""Puts the rooms together: the one place where everything is made from the settings."""

from __future__ import annotations

import asyncio
import functools
import gc
import ipaddress
import itertools
import logging
import math
import os
import resource
import signal
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from prometheus_client.registry import CollectorRegistry

from pushforward import logs
from pushforward.broker.base import Broker
from pushforward.broker.local import LocalBroker
from pushforward.dataplane import Admission, Dataplane, Limits
from pushforward.errors import UsageError
from pushforward.keys import Keyring, check_keys, open_keys
from pushforward.messages import Setup
from pushforward.metrics import EngineCollector, Metrics, Readiness
from pushforward.programs.devices import check_devices, gpus
from pushforward.settings import Settings
from pushforward.store.catalog import Catalog
from pushforward.store.opening import opened
from pushforward.tracing import Tracing

__all__ = ["offline", "serve", "work"]

log = logging.getLogger(__name__)

_UNLIMITED = 1 << 62
_KEEP_ALIVE_S = 75  # longer than clients and proxies keep idle connections, so that it is they who close them
_BACKLOG = 2048
_OTHER_FILES = 512  # connections that are turned away, workers, the store


def serve(settings: Settings) -> None:
    """Serve the models of the store over HTTP until told to stop.

    Raises:
        UsageError: when the address cannot be listened on, the store cannot be opened, or traces cannot be
            made.
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
    tracing = Tracing() if settings.tracing else None
    listeners = _listening(settings)
    if settings.keys is not None:
        check_keys(settings.keys)
    _make_room(settings.max_connections)
    broker = _broker(settings, admission, metrics)

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
    admin_port = None if settings.admin_port is None else listeners[1].getsockname()[1]
    keyring = None if settings.keys is None else Keyring(open_keys(settings.keys))
    app = build(plane, metrics, settings.max_body_bytes, keyring, admin_port, tracing)
    config = _uvicorn(
        app,
        settings,
        admin_port,
        lifespan="on",
        timeout_graceful_shutdown=math.ceil(settings.drain_s),
    )
    url, *admin_url = map(_url, listeners)
    told = {"url": url, "docs": f"{url}/docs", "admin": admin_url[0] if admin_url else None}
    log.info("listening", extra=logs.fields(**told, keys=keyring is not None))
    gc.freeze()  # what is there now stays: collections need not look at it again and again
    with catalog.followed(settings.watch_s):
        Server(config, broker).run(sockets=listeners)


def work(settings: Settings) -> None:
    """Solve chunks of a queue that API processes share, until told to stop.

    Raises:
        UsageError: when there is no queue to work for, or a setting does not fit.
        NotFound: when there is no model store.
        Unavailable: when the store cannot be reached, and nothing of it is in the cache.
    """
    logs.configure(settings.log_level, settings.log_format)
    if settings.broker is None:
        raise UsageError("A worker needs a queue to work for: give --broker, such as redis://localhost:6379.")
    if settings.workers == 0:
        raise UsageError("--workers is 0: a worker needs at least one process; leave it out.")
    _check_queue(settings.broker)  # before there are processes to leave behind
    # no store is an error now, not a worker without models
    catalog = opened(settings.store, settings.cache, settings.cache_mb)
    listener = None
    if settings.admin_port is not None:  # which tells how it is, and does nothing for anybody
        listener = _listener(settings.host, "--admin-port", settings.admin_port, loopback_only=False)
    setups = _setups(settings)
    if settings.tracing:  # what is missing is told now, not by every process in turn
        Tracing().close()
    collector = EngineCollector()
    local = LocalBroker(setups, settings.stall_s, collector)
    collector.models = local.models
    local.spawn()

    import uvloop

    with catalog.followed(settings.watch_s):
        uvloop.run(_work(settings, local, collector, listener))


async def _work(
    settings: Settings, local: LocalBroker, collector: EngineCollector, listener: socket.socket | None
) -> None:
    from pushforward.api.probes import build_probes
    from pushforward.api.server import Probes
    from pushforward.broker.redis.back import Puller

    assert settings.broker is not None
    told = asyncio.Event()
    loop = asyncio.get_running_loop()

    def leave() -> None:
        if told.is_set():  # for the second time
            os._exit(1)
        told.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, leave)
    await local.start()
    rows = 2 * settings.slots * local.size
    puller = Puller(settings.broker, local, rows, settings.lease_s, collector)
    registry = CollectorRegistry(auto_describe=True)
    registry.register(collector)
    registry.register(Readiness(puller.unavailable))
    await puller.start()
    probes = None
    if listener is not None:
        app = build_probes(puller.unavailable, registry)
        probes = asyncio.create_task(
            Probes(_uvicorn(app, settings, lifespan="off")).serve(sockets=[listener])
        )
        log.info("listening", extra=logs.fields(url=_url(listener)))
    await told.wait()
    log.info("leaving", extra=logs.fields(chunks=puller.holds))
    await puller.drain(settings.drain_s)
    await local.close()
    if probes is not None:
        probes.cancel()
        await asyncio.wait([probes])


def _broker(settings: Settings, admission: Admission, metrics: Metrics) -> Broker:
    """The way to the workers: processes of this machine, started now, or a queue with others behind it."""
    if settings.broker is not None:
        if settings.workers:
            raise UsageError(
                f"--broker leaves the solving to `pushforward worker`, and --workers is {settings.workers}: "
                "leave it out, or give 0."
            )
        _check_queue(settings.broker)
        from pushforward.broker.redis.front import RedisBroker

        return RedisBroker(settings.broker, admission)
    if settings.workers == 0:
        raise UsageError("--workers is 0, which needs a --broker whose workers are elsewhere.")
    broker = LocalBroker(_setups(settings), settings.stall_s, metrics.engine)
    broker.spawn()  # it loads its models while this process imports what only serving needs
    return broker


def _check_queue(url: str) -> None:
    """Refuse an address where there can be no queue; one that cannot be reached now may be reached later."""
    try:
        from pushforward.broker.redis.link import Link
    except ModuleNotFoundError as error:
        package = str(error.name).partition(".")[0]
        raise UsageError(f"A queue in Redis needs {package}: pip install 'pushforward[redis]'.") from None
    Link(url)


@asynccontextmanager
async def offline(settings: Settings, catalog: Catalog) -> AsyncIterator[Dataplane]:
    """A data plane with worker processes and without a server, for as long as the block runs.

    Args:
        settings: of which the limits and deadlines, which protect a server, do not apply.
        catalog: where the models are.
    """
    quiet = {"load": "first-use", "log_level": "warning", "workers": settings.workers or 1, "tracing": False}
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
            tracing=settings.tracing,
            cache=None if settings.cache is None else str(settings.cache),
            cache_mb=settings.cache_mb,
        )
        for device in itertools.islice(itertools.cycle(devices), workers)
    ]


def _listening(settings: Settings) -> list[socket.socket]:
    """The sockets that listen, the main one first: what is wrong is known before anything is started."""
    ports = {"--port": settings.port, "--admin-port": settings.admin_port}
    open_to_all = settings.keys is None and not settings.insecure
    return [
        _listener(settings.host, flag, port, loopback_only=open_to_all)
        for flag, port in ports.items()
        if port is not None
    ]


def _listener(host: str, flag: str, port: int, *, loopback_only: bool) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        if loopback_only and not ipaddress.ip_address(str(address[0]).partition("%")[0]).is_loopback:
            raise UsageError(
                f"--host {host} can be reached from other machines, and there are no API keys. Make one with "
                "`pushforward keys create --keys FILE` and serve with --keys FILE (PUSHFORWARD_KEYS), or say "
                "with --insecure (PUSHFORWARD_INSECURE=true) that whoever reaches it may do everything."
            )
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(_BACKLOG)
    except OSError as error:
        raise UsageError(
            f"Cannot listen on --host {host} {flag} {port}: {error.strerror}. "
            "Choose another port; 0 takes a free one."
        ) from None
    return listener


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _uvicorn(app: Any, settings: Settings, admin_port: int | None = None, **options: Any) -> Any:
    """How HTTP is spoken."""
    import uvicorn

    from pushforward.api.protocol import Guard, Protocol
    from pushforward.api.server import HEADERS

    guard = Guard(settings.max_connections, settings.header_timeout_s, admin_port)
    return uvicorn.Config(
        app,
        loop="uvloop",
        http=functools.partial(Protocol, guard),  # type: ignore[arg-type]
        ws="none",
        log_config=None,
        log_level="warning",
        access_log=False,  # a request has its own line, with more in it
        proxy_headers=False,
        server_header=False,
        headers=HEADERS,
        timeout_keep_alive=_KEEP_ALIVE_S,
        backlog=_BACKLOG,
        **options,
    )


def _make_room(connections: int) -> None:
    """See to it that this process may have so many connections, and the files beside them."""
    wanted = connections + _OTHER_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return
    if hard != resource.RLIM_INFINITY and hard < wanted:
        raise UsageError(
            f"--max-connections {connections} needs {wanted} open files, and this process may have {hard}: "
            "raise that limit (ulimit -Hn), or take fewer connections."
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _leave(number: int, frame: Any) -> None:
    # Uvicorn puts its own handlers in place while it serves, and hands the signal on to these when it has
    # drained.
    sys.exit(0)
