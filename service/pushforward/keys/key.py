"""A key: what is kept of it, and how it is made and recognised."""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Annotated, Literal, get_args

import msgspec

__all__ = ["SCOPES", "Key", "Scope", "decode", "decode_all", "encode", "encode_all", "new_key", "split"]

Scope = Literal["infer", "jobs", "metrics", "admin"]
"""What a key may do: ask models and read what there is; jobs; read the metrics; load and unload versions."""
SCOPES: tuple[Scope, ...] = get_args(Scope)

_TOKEN = re.compile(rb"pf_([0-9a-f]{12})_([0-9a-f]{48})")
_NOBODYS = "0" * 64  # what the secret of an unknown id is compared with, so that it takes as long


class Key(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What is kept of a key."""

    id: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{12}$")]
    name: Annotated[str, msgspec.Meta(max_length=100)]
    """Who has it, for people."""
    sha256: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]
    """Of the secret."""
    scopes: list[Scope]
    created: Annotated[datetime, msgspec.Meta(tz=True)]
    expires: Annotated[datetime, msgspec.Meta(tz=True)] | None = None
    rows_per_second: Annotated[float, msgspec.Meta(gt=0)] | None = None
    """Rows that may be asked for per second, on average."""
    burst_rows: Annotated[int, msgspec.Meta(ge=1)] | None = None
    """Rows that may be asked for at once, after a pause; unless given, those of ten seconds."""
    rows_in_flight: Annotated[int, msgspec.Meta(ge=1)] | None = None
    """Rows that have been asked for and not answered."""

    @property
    def burst(self) -> float:
        """The most that can be saved up of ``rows_per_second``."""
        return self.burst_rows or max(1.0, 10 * (self.rows_per_second or 0))

    @property
    def has_quota(self) -> bool:
        """Whether there is a limit to count for."""
        return self.rows_per_second is not None or self.rows_in_flight is not None

    def has_expired(self) -> bool:
        """Whether its time is over."""
        return self.expires is not None and self.expires <= datetime.now(UTC)


def new_key(
    name: str,
    scopes: Sequence[Scope],
    *,
    expires: datetime | None = None,
    rows_per_second: float | None = None,
    burst_rows: int | None = None,
    rows_in_flight: int | None = None,
) -> tuple[Key, str]:
    """A new key, and what its owner has to send, which is kept nowhere."""
    number, secret = secrets.token_hex(6), secrets.token_hex(24)
    key = Key(
        id=number,
        name=name,
        sha256=_sha256(secret.encode()),
        scopes=[scope for scope in SCOPES if scope in scopes],
        created=datetime.now(UTC).replace(microsecond=0),
        expires=expires,
        rows_per_second=rows_per_second,
        burst_rows=burst_rows,
        rows_in_flight=rows_in_flight,
    )
    return key, f"pf_{number}_{secret}"


def split(token: bytes) -> tuple[str, bytes] | None:
    """Id and secret of what somebody sent, if it looks like a key.

    >>> split(b"pf_0123456789ab_" + b"f" * 48)[0]
    '0123456789ab'
    >>> split(b"pf_0123456789ab_" + b"f" * 47) is None
    True
    """
    found = _TOKEN.fullmatch(token)
    return None if found is None else (found[1].decode(), found[2])


def opens(key: Key | None, secret: bytes) -> bool:
    """Whether it is the secret of a key, in a time that does not tell how far it was right."""
    same = hmac.compare_digest(_sha256(secret), _NOBODYS if key is None else key.sha256)
    return same and key is not None


encode = msgspec.json.Encoder().encode
decode = msgspec.json.Decoder(Key).decode


class _Kept(msgspec.Struct, forbid_unknown_fields=True):
    keys: list[Key]


def encode_all(keys: Sequence[Key]) -> bytes:
    """The text of a file of keys."""
    return msgspec.json.format(msgspec.json.encode(_Kept(list(keys))), indent=2) + b"\n"


def decode_all(text: bytes) -> list[Key]:
    """What ``encode_all`` wrote.

    Raises:
        msgspec.DecodeError: when it is something else.
    """
    return msgspec.json.decode(text, type=_Kept).keys


def _sha256(secret: bytes) -> str:
    return hashlib.sha256(secret).hexdigest()
