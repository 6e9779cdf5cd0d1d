"""What the HTTP process and its workers say to each other.

Messages are msgspec records, sent as MessagePack. An array travels as (dtype, shape, bytes), with the
numbers little-endian and row-major. On a stream, every message is preceded by its length in bytes as an
unsigned 32-bit little-endian integer.
"""

from __future__ import annotations

import struct
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

__all__ = [
    "MAX_FRAME_BYTES",
    "Cancel",
    "Failed",
    "FrameReader",
    "FromWorker",
    "Ready",
    "Result",
    "Setup",
    "ToWorker",
    "Work",
    "decode_from_worker",
    "decode_to_worker",
    "frame",
]

MAX_FRAME_BYTES = 1 << 30
_LENGTH = struct.Struct("<I")
_DTYPES = frozenset({"<f8", "<i4", "|u1"})  # nothing that could carry an object

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int32]
Bytes = npt.NDArray[np.uint8]


class Setup(msgspec.Struct, frozen=True):
    """What a worker process is to be; its command line carries this as JSON."""

    store: str
    """Folder of the model store."""
    models: list[tuple[str, int]]
    """Versions to load before saying ``Ready``; any other is loaded when it is first asked for."""
    slots: int
    """Rows that may run at once."""
    log_level: str
    log_format: str


class Work(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """A chunk: rows of one request that travel together to one worker."""

    id: str
    """Unique among all chunks in flight: ``<request id>/<index>``."""
    model: str
    version: int
    kind: str
    """A value of ``engine.request.Kind``."""
    density: bool
    """Whether the log-density is integrated along."""
    precision: str
    rows: Floats
    """[n, D]: x to encode, z to decode."""
    context: Floats | None
    """[n, C] for a conditional model."""
    rtol: float
    atol: float
    logp_atol: float
    """Nats per step."""
    max_steps: int
    t_end: float | None = None
    """Where to stop for a point on the way; None goes to the end of the model's interval."""
    deadline: float | None = None
    """Unix time in seconds, so that it means the same on another machine."""


class Cancel(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """Rows that nobody waits for any more."""

    id: str


class Ready(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """A worker has loaded what it was told to load, as far as that was possible."""

    loaded: list[tuple[str, int]]
    failed: list[tuple[str, int, str]]
    """Model, version and the reason."""
    seconds: float
    """How long it took."""


class Result(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """The answer to a chunk, one entry per row and in its order."""

    id: str
    value: Floats
    """[n, D]: the point at the other end; NaN unless the row arrived."""
    log_density: Floats
    """[n], nats; −∞ outside the support; NaN where it was not asked for or the row failed."""
    error_estimate: Floats
    """[n], nats: sum of the local errors of the log-density."""
    steps: Ints
    accepted: Ints
    nfe: Ints
    """[n]: evaluations of the vector field."""
    status: Bytes
    """[n]: values of ``engine.request.Status``."""
    t: Floats
    """[n]: time reached."""


class Failed(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """A chunk that could not be begun: an error of ``errors`` as (code, message, detail)."""

    id: str
    code: str
    message: str
    detail: dict[str, Any]


ToWorker = Work | Cancel
FromWorker = Ready | Result | Failed


def _encode_array(value: Any) -> Any:
    if not isinstance(value, np.ndarray):
        raise NotImplementedError(f"a message cannot carry {type(value).__name__}")
    little = np.ascontiguousarray(value, value.dtype.newbyteorder("<"))
    return little.dtype.str, value.shape, little.data if little.size else b""


def _decode_array(kind: type, value: Any) -> Any:
    dtype, shape, data = value
    if dtype not in _DTYPES:
        raise ValueError(f"a message cannot carry an array of {dtype!r}")
    return np.frombuffer(data, dtype).reshape(shape)


_encoder = msgspec.msgpack.Encoder(enc_hook=_encode_array)
_to_worker = msgspec.msgpack.Decoder(ToWorker, dec_hook=_decode_array)
_from_worker = msgspec.msgpack.Decoder(FromWorker, dec_hook=_decode_array)


def frame(message: ToWorker | FromWorker) -> bytes:
    """A message as it goes onto a stream: its length, then itself."""
    body = _encoder.encode(message)
    return _LENGTH.pack(len(body)) + body


def decode_to_worker(body: bytes) -> ToWorker:
    """Read a message to a worker (without its length).

    Raises:
        msgspec.DecodeError: when it is not one.
    """
    message: ToWorker = _to_worker.decode(body)
    return message


def decode_from_worker(body: bytes) -> FromWorker:
    """Read a message from a worker (without its length).

    Raises:
        msgspec.DecodeError: when it is not one.
    """
    message: FromWorker = _from_worker.decode(body)
    return message


class FrameReader:
    r"""Cuts a byte stream into the bodies of its frames.

    >>> reader = FrameReader()
    >>> reader.feed(b"\x02\x00")
    []
    >>> reader.feed(b"\x00\x00hi\x00\x00\x00\x00")
    [b'hi', b'']
    """

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[bytes]:
        """Add bytes as they arrived; return the bodies that are now complete.

        Raises:
            ValueError: when a frame claims to be longer than ``MAX_FRAME_BYTES``.
        """
        self._buffer += data
        bodies = []
        start, end = 0, len(self._buffer)
        while end - start >= 4:
            (length,) = _LENGTH.unpack_from(self._buffer, start)
            if length > MAX_FRAME_BYTES:
                raise ValueError(f"a frame of {length} bytes is longer than {MAX_FRAME_BYTES}")
            if end - start - 4 < length:
                break
            bodies.append(bytes(self._buffer[start + 4 : start + 4 + length]))
            start += 4 + length
        del self._buffer[:start]
        return bodies
