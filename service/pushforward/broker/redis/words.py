"""What a worker says of itself to all who ask."""

from __future__ import annotations

import msgspec

from pushforward.messages import ModelState

__all__ = ["Announcement", "decode_announcement", "encode_announcement"]


class Announcement(msgspec.Struct, array_like=True, frozen=True):
    """A worker that lives."""

    id: str
    unavailable: str | None
    """Why it would not take a chunk now."""
    reads: list[str]
    """The versions whose streams it reads, as ``<name>/<version>``."""
    models: list[ModelState]
    """What has become of versions there."""


encode_announcement = msgspec.msgpack.Encoder().encode
decode_announcement = msgspec.msgpack.Decoder(Announcement).decode
