"""API keys: who may ask for what, and how much of it.

A key is ``pf_<id>_<secret>``. The id names it in lists and logs; of the secret only the SHA-256 is kept. A
plain hash is enough, where passwords need a slow one: the secret is 192 random bits, which nobody can try one
by one, and it costs a request a microsecond.

Keys are kept in a file, or in Redis, where several servers share them and their quotas.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

from pushforward.errors import Unavailable, UsageError
from pushforward.keys.file import KeyFile
from pushforward.keys.key import SCOPES, Key, Scope, new_key
from pushforward.keys.ring import Keyring, Keys

__all__ = ["SCOPES", "Key", "Keyring", "Keys", "Scope", "check_keys", "new_key", "open_keys"]


def open_keys(place: str) -> Keys:
    """The keys at a place: the path of a file, or an address as in ``connections``.

    Raises:
        UsageError: for an address that is none, or when Redis' client is not installed.
    """
    if "://" not in place:
        return KeyFile(Path(place))
    try:
        from pushforward.keys.redis import RedisKeys
    except ModuleNotFoundError as error:
        raise UsageError(f"Keys in Redis need {error.name}: pip install 'pushforward[redis]'.") from None
    return RedisKeys(place)


def check_keys(place: str) -> None:
    """Refuse a place where there can be no keys; one that cannot be reached now may be reached later.

    Raises:
        UsageError: saying what is wrong with it.
    """

    async def look() -> None:
        keys = open_keys(place)
        try:
            await keys.read()
        except Unavailable:
            pass
        finally:
            await keys.close()

    asyncio.run(look())
