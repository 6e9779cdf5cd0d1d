"""Connections to Redis or Valkey, from an address in one line.

    redis://[user:password@]host[:6379][/db]          plain
    rediss://…                                        over TLS; ?ssl_ca_certs=… names an authority
    unix:///path/to/socket[?db=0]                     a Unix socket
    sentinel://[user:password@]host[:26379],host…/service[/db]     the master that sentinels name
    sentinels://…                                     the same, all over TLS

A password that must not be seen in a process list or a compose file is read from the file that
``?password_file=…`` names.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast
from urllib.parse import parse_qsl, unquote, urlencode, urlsplit, urlunsplit

import redis.asyncio as redis
from redis.asyncio.sentinel import Sentinel, SentinelConnectionPool

from pushforward.errors import UsageError

__all__ = ["connect", "shown"]

SCHEMES = ("redis", "rediss", "unix", "sentinel", "sentinels")


def connect(url: str, **options: Any) -> redis.Redis:
    """A client for the address; nothing is sent yet, and no answer is decoded.

    Args:
        url: see the module.
        options: of ``redis.asyncio.Redis``, such as ``socket_timeout``.

    Raises:
        UsageError: for an address that is none.
    """
    try:
        address, password = _with_password_file(url)
        if urlsplit(address).scheme.startswith("sentinel"):
            client = _behind_sentinels(address, password, options)
        else:
            secret = {} if password is None else {"password": password}
            client = redis.Redis.from_url(address, **options | secret)
        # An option that there is not is found by making a connection, which connects to nothing yet.
        client.connection_pool.make_connection()  # type: ignore[no-untyped-call]
        return client
    except TypeError as error:
        option = str(error).rpartition(" ")[2]  # "… got an unexpected keyword argument 'x'"
        reason = f"{option} after it is no option; leave it out"
    except ValueError as error:
        reason = str(error)
    raise UsageError(f"{shown(url)} is no address of a Redis server: {reason}.")


def shown(url: str) -> str:
    """The address without what must stay secret, for logs and messages.

    >>> shown("redis://:pass@localhost:6379/0")
    'redis://localhost:6379/0'
    """
    parts = urlsplit(url if "://" in url else f"//{url}")
    place = parts.netloc.rpartition("@")[2] + parts.path
    return f"{parts.scheme}://{place}" if parts.scheme else place


def _with_password_file(url: str) -> tuple[str, str | None]:
    """The address without ``password_file``, and what that file holds."""
    parts = urlsplit(url)
    if parts.scheme not in SCHEMES:
        raise ValueError(f"it must begin with one of {', '.join(f'{scheme}://' for scheme in SCHEMES)}")
    query = dict(parse_qsl(parts.query))
    file = query.pop("password_file", None)
    if file is None:
        return url, None
    try:
        password = Path(file).read_text().strip()
    except OSError as error:
        raise ValueError(f"its password_file {file} cannot be read: {error.strerror}") from None
    return urlunsplit(parts._replace(query=urlencode(query))), password


def _behind_sentinels(url: str, password: str | None, options: dict[str, Any]) -> redis.Redis:
    parts = urlsplit(url)
    credentials, _, hosts = parts.netloc.rpartition("@")
    user, _, spelt = credentials.partition(":")
    service, _, db = parts.path.strip("/").partition("/")
    if not service:
        raise ValueError("it must name the service after the sentinels, as in sentinel://host:26379/mymaster")
    places = []
    for host in hosts.split(","):
        name, _, port = host.partition(":")
        places.append((name, int(port or 26379)))
    access: dict[str, Any] = {
        "username": unquote(user) or None,
        "password": password or unquote(spelt) or None,
        "ssl": parts.scheme == "sentinels",
        **dict(parse_qsl(parts.query)),
        **options,
    }
    own = {key: access[key] for key in access if key != "username"}
    sentinel = Sentinel(places, sentinel_kwargs=own)  # type: ignore[no-untyped-call]
    return cast(redis.Redis, sentinel.master_for(service, redis_class=_Master, db=int(db or 0), **access))


class _Master(redis.Redis):
    """The server that sentinels name; closes the connections to them as well."""

    async def aclose(self, close_connection_pool: bool | None = None) -> None:
        await super().aclose(close_connection_pool)
        manager = cast(SentinelConnectionPool, self.connection_pool).sentinel_manager
        for sentinel in manager.sentinels:
            await sentinel.aclose()
