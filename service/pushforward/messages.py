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
    "NFE",
    "OCCUPANCY",
    "STEP_SECONDS",
    "UNSOUND",
    "Beat",
    "Cancel",
    "Counts",
    "Failed",
    "FrameReader",
    "FromWorker",
    "Load",
    "ModelState",
    "Probe",
    "Ready",
    "Result",
    "Setup",
    "ToWorker",
    "Unload",
    "Work",
    "decode_from_worker",
    "decode_to_worker",
    "encode",
    "frame",
]

MAX_FRAME_BYTES = 1 << 30
UNSOUND = 3
"""Exit status of a worker whose answers have changed."""
_LENGTH = struct.Struct("<I")
_DTYPES = frozenset({"<f8", "<i4", "|u1"})  # nothing that could carry an object

# Upper edges of the histograms that engines keep.
STEP_SECONDS = tuple(round(m * 10.0**e, 7) for e in range(-5, 1) for m in (1, 2, 5))
OCCUPANCY = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
NFE = (7, 13, 19, 31, 43, 61, 91, 121, 181, 241, 361, 601, 1201, 2401, 6001, 12_001)

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int32]
Bytes = npt.NDArray[np.uint8]


class Setup(msgspec.Struct, frozen=True):
    """What a worker process is to be; its command line carries this as JSON."""

    store: str
    """Folder or URL of the model store."""
    versions: str
    """Which versions to keep loaded, as ``settings.Settings.versions`` says it."""
    load: str
    """``start``: load them before saying ``Ready``; ``first-use``: when a chunk needs them."""
    watch_s: float
    """Seconds between two looks into the store."""
    model_memory_mb: int | None
    device: str
    """``cpu`` or ``cuda:<number>``."""
    slots: int
    """Rows that may run at once."""
    step_budget_ms: float
    log_level: str
    log_format: str
    tracing: bool = False
    cache: str | None = None
    """Folder for copies of a store at a URL."""
    cache_mb: int = 10_000


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
    bulk: bool = False
    """Whether its rows give way to interactive ones."""
    fence: int = 0
    """Counts how often the chunk has been handed out; an answer with an older one is discarded."""
    request: str = ""
    """What the chunks of one request have in common: requests take turns."""
    trace: dict[str, str] = {}
    """The context of its span, as W3C Trace Context spells it; empty for a chunk that is not traced."""


class Cancel(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """Rows that nobody waits for any more."""

    id: str


class Load(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """Load a version now, and keep it whatever the policy."""

    model: str
    version: int


class Unload(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """Finish the rows of a version, then forget it until it is asked for with ``Load``."""

    model: str
    version: int


class Probe(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """Solve a golden row as when it was loaded, and say so with a ``Beat``: how an idle worker proves itself.

    A worker that cannot leaves with the status ``UNSOUND``.
    """


class ModelState(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """What has become of a version in a worker."""

    model: str
    version: int
    state: str
    """``loading``, ``ready``, ``failed`` or ``unloaded``."""
    reason: str = ""
    """Why it is not to be had; without one, an unloaded version is loaded again when it is asked for."""
    seconds: float = 0.0
    """How long loading took."""
    code: str = ""
    """Of the error that the reason is the message of."""


class Ready(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """A worker has loaded what it was told to load, as far as that was possible."""

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
    fence: int = 0
    """That of the ``Work``."""
    queue_s: float = 0.0
    """From the chunk's arrival at the worker until its first row ran."""
    solve_s: float = 0.0
    """From then until its last row left."""


class Failed(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """A chunk that could not be begun: an error of ``errors`` as (code, message, detail)."""

    id: str
    code: str
    message: str
    detail: dict[str, Any]
    fence: int = 0
    """That of the ``Work``."""


class Counts(msgspec.Struct, array_like=True):
    """What an engine has done since it was last asked; two of them add up."""

    step_seconds: list[int] = msgspec.field(default_factory=lambda: [0] * (len(STEP_SECONDS) + 1))
    """Steps of a batch, by the first of ``STEP_SECONDS`` that they do not exceed."""
    step_seconds_sum: float = 0.0
    occupancy: list[int] = msgspec.field(default_factory=lambda: [0] * (len(OCCUPANCY) + 1))
    """Steps of a batch, by the first of ``OCCUPANCY`` (rows) that they do not exceed."""
    occupancy_sum: int = 0
    nfe: list[int] = msgspec.field(default_factory=lambda: [0] * (len(NFE) + 1))
    """Rows that left, by the first of ``NFE`` (evaluations of the field) that they do not exceed."""
    nfe_sum: int = 0
    accepted: int = 0
    """Accepted steps of the rows that left."""
    rejected: int = 0
    status: dict[int, int] = {}
    """Rows that left, by ``engine.request.Status``."""

    def longest_step_s(self) -> float:
        """A bound of the longest step among these, seconds; 0 without steps."""
        edges = (*STEP_SECONDS, self.step_seconds_sum)
        return max((edge for edge, steps in zip(edges, self.step_seconds, strict=True) if steps), default=0.0)


class Beat(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """A worker's loop has made progress since the last one."""

    steps: int
    """Steps of a batch since the worker started."""
    running: int
    """Rows in slots."""
    waiting: int
    """Rows that wait for a slot."""
    counts: Counts


ToWorker = Work | Cancel | Load | Unload | Probe
FromWorker = Ready | ModelState | Result | Failed | Beat


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


def encode(message: ToWorker | FromWorker) -> bytes:
    """A message by itself."""
    return _encoder.encode(message)


def frame(message: ToWorker | FromWorker) -> bytes:
    """A message as it goes onto a stream: its length, then itself."""
    body = encode(message)
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
