"""The manifest: what one published version of a model is, and the hash of every file it consists of.

A manifest is data from a disk that others can write to, so reading one is strict: unknown fields,
wrong types, NaN, paths that leave the folder and files of executable formats are all refused, by name.
"""

from __future__ import annotations

import hashlib
import re
import stat
from collections import Counter
from datetime import datetime, timedelta
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from pushforward.errors import InvalidInput, InvalidModel

__all__ = [
    "FORMAT_VERSION",
    "MANIFEST",
    "REQUIRED_FILES",
    "Certificate",
    "FileEntry",
    "Manifest",
    "Solver",
    "check_name",
    "is_name",
    "read_small_file",
    "sha256_file",
    "shown",
]

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
REQUIRED_FILES = ("MODEL_CARD.md", "calibration.safetensors", "golden.safetensors", "weights.safetensors")
MAX_BYTES = 1 << 20  # a manifest of a thousand features takes 60 KB

# Formats that hold only data. Anything that Python would have to unpickle is not among them.
_SUFFIXES = (".onnx", ".safetensors", ".md", ".json")
# Plain ASCII, so that nothing here means something else after decoding, normalising or case folding.
_NAME = r"^[a-z0-9][a-z0-9._-]{0,62}$"
_PATH = r"^([A-Za-z0-9][A-Za-z0-9._-]{0,99}/){0,2}[A-Za-z0-9][A-Za-z0-9._-]{0,99}$"

Name = Annotated[str, Field(pattern=_NAME)]
Feature = Annotated[str, Field(min_length=1, max_length=200)]
FilePath = Annotated[str, Field(pattern=_PATH)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]
Scalar = str | int | float | bool | None


class _Record(BaseModel):
    model_config = ConfigDict(
        strict=True, frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True
    )


class Solver(_Record):
    """How the version integrates unless a request says otherwise."""

    method: Annotated[str, Field(pattern=r"^[a-z0-9_]{1,40}$")]
    """Name of the Runge–Kutta method that its step programs contain."""
    rtol: Positive
    """Relative tolerance of z, per step."""
    atol: Positive
    """Absolute tolerance of z, per step, in units of the transformed data."""
    logp_atol: Positive
    """Absolute tolerance of the log-density, per step, in nats."""
    precision: Literal["float32", "float64"]
    """Arithmetic of z and of the field; the log-density is always accumulated in float64."""
    dt_data_to_base: Positive
    """Size of the first step from data to base, in units of t."""
    dt_base_to_data: Positive
    """Size of the first step from base to data, in units of t."""
    max_steps: Count
    """Attempted steps after which a row is given up with the status ``max_steps``."""


class FileEntry(_Record):
    """Size and hash of one file of a version."""

    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    """SHA-256 of its bytes, in lower-case hexadecimal."""
    bytes: Annotated[int, Field(ge=0)]
    """Its size."""


class Certificate(_Record):
    """The error of log p that was measured at publishing, with the default solver, on held-out rows."""

    rows: Count
    """Held-out rows measured."""
    reference: Annotated[str, Field(min_length=1)]
    """What the error is measured against, such as "float64, dopri8, rtol = atol = 1e-10"."""
    p50: NotNegative
    """Median of |log p − reference|, in nats."""
    p99: NotNegative
    """Its 99% quantile, in nats."""
    p999: NotNegative
    """Its 99.9% quantile, in nats."""
    max: NotNegative
    """Its maximum, in nats."""
    share_within_1e3: Annotated[float, Field(ge=0, le=1)]
    """Share of the rows with |log p − reference| ≤ 1e-3 nats."""
    steps_mean: Positive
    """Mean number of attempted steps per row."""
    steps_max: Count
    """Largest number of attempted steps of a row."""
    created_on: Annotated[str, Field(min_length=1)]
    """Processor and architecture that measured it."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if not self.p50 <= self.p99 <= self.p999 <= self.max:
            raise ValueError("p50, p99, p999 and max must ascend")
        return self


class Manifest(_Record):
    """One published version of a model.

    Raises:
        pydantic.ValidationError: when built from values that break a rule; ``read`` turns that into
            ``InvalidModel``.
    """

    format_version: Literal[1]
    """Version of this layout."""
    name: Name
    """Name of the model; also the name of its folder."""
    version: Annotated[int, Field(ge=1, le=999_999_999)]
    """Number of the version; also the name of its folder."""
    created: str
    """When it was published: ISO 8601, UTC."""
    description: str
    """What it models, in a sentence or two."""
    features: Annotated[list[Feature], Field(min_length=1)]
    """Names of the D columns of x, in order."""
    context_features: list[Feature]
    """Names of the C columns of the context, in order; empty for an unconditional model."""
    t_base: float
    """Time of the base distribution."""
    t_data: float
    """Time of the data."""
    solver: Solver
    """Default method, tolerances and first steps."""
    divergence: Literal["closed_form", "forward_mode", "reverse_mode", "hutchinson"]
    """How tr ∂f/∂z is computed; "hutchinson" is a random estimate, the others are exact."""
    programs: Annotated[dict[str, FilePath], Field(min_length=1)]
    """Program name → file, such as "encode" → "programs/encode.onnx"."""
    method_stages: Count
    """Evaluations of the vector field per attempted step."""
    files: dict[FilePath, FileEntry]
    """Every file of the version except the manifest itself."""
    certificate: Certificate
    """Measured error of the log-density."""
    calibration_rows: Count
    """Held-out rows behind the p-values."""
    metrics: dict[str, float]
    """Held-out measures of quality, such as "held_out_log_density" in nats per row."""
    training: dict[str, Scalar]
    """How it was trained: objective, seed, epochs and so on."""
    data: dict[str, Scalar]
    """Where the data came from: source, licence, rows and so on."""

    @property
    def dim(self) -> int:
        """D, the width of x."""
        return len(self.features)

    @property
    def context_dim(self) -> int:
        """C, the width of the context; 0 for an unconditional model."""
        return len(self.context_features)

    @property
    def program_bytes(self) -> int:
        """Size of its programs together: what keeping it loaded is reckoned to cost."""
        return sum(self.files[path].bytes for path in set(self.programs.values()))

    @property
    def exact(self) -> bool:
        """Whether log-densities are exact up to solver error, rather than random estimates."""
        return self.divergence != "hutchinson"

    @field_validator("created")
    @classmethod
    def _utc(cls, value: str) -> str:
        moment = datetime.fromisoformat(value)
        if moment.utcoffset() != timedelta(0):
            raise ValueError("must be in UTC, such as 2026-01-31T12:00:00+00:00")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        column, times = Counter(self.features + self.context_features).most_common(1)[0]
        if times > 1:
            raise ValueError(f"features and context_features must be distinct; {column!r} occurs twice")
        if self.t_base == self.t_data:
            raise ValueError("t_base and t_data must differ")
        for path in self.files:
            if path == MANIFEST:
                raise ValueError(f"files must not list {MANIFEST}, which cannot contain its own hash")
            if not path.endswith(_SUFFIXES):
                raise ValueError(f"files lists {path!r}; a version holds only {', '.join(_SUFFIXES)} files")
        for path in (*REQUIRED_FILES, *self.programs.values()):
            if path not in self.files:
                raise ValueError(f"files must list {path!r}")
        return self

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read and check a manifest.

        Args:
            path: the file ``…/<name>/<version>/manifest.json``.

        Raises:
            InvalidModel: naming the file and the first field that is wrong.
        """
        file = "/".join(path.parts[-3:])
        raw = read_small_file(path, MAX_BYTES, file)
        try:
            return cls.model_validate_json(raw.decode())
        except UnicodeDecodeError as error:
            raise InvalidModel(
                f"{file} is not UTF-8 text: {error.reason} at byte {error.start}.", file=file
            ) from None
        except ValidationError as error:
            first, *others = error.errors(include_url=False, include_input=False)
            where = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"])
            where = ascii(where[1:120])[1:-1]
            more = f" (and {len(others)} more)" if others else ""
            raise InvalidModel(
                f"{file} is not a valid manifest: {where + ': ' if where else ''}{first['msg']}{more}.",
                file=file,
                detail={"field": where},
            ) from None

    def to_bytes(self) -> bytes:
        """The manifest as the UTF-8 JSON text that ``read`` reads."""
        return (self.model_dump_json(indent=2) + "\n").encode()


def is_name(text: str) -> bool:
    """Whether a text can be the name of a model or label."""
    return re.fullmatch(_NAME, text) is not None


def check_name(name: str, what: str = "model name", where: str = "name") -> str:
    """Return ``name`` if it can be the name of a new model or label.

    Raises:
        InvalidInput: saying what a name looks like.

    >>> check_name("wine-2")
    'wine-2'
    """
    if not is_name(name):
        raise InvalidInput(
            f"{shown(name)} is not a {what}: use 1 to 63 lower-case letters, digits, '.', '_' and '-', "
            "beginning with a letter or digit.",
            where=where,
        )
    return name


def shown(text: str) -> str:
    """Text from outside as it may stand in a message: quoted, escaped and of bounded length."""
    return ascii(text if len(text) <= 80 else text[:77] + "...")


def read_small_file(path: Path, limit: int, file: str) -> bytes:
    """Read a plain file of at most ``limit`` bytes from the store; errors call it ``file``.

    Raises:
        InvalidModel: when it is missing, unreadable, a link, not a plain file, or larger.
    """
    try:
        if not stat.S_ISREG(path.lstat().st_mode):  # never wait for a pipe, never follow a link
            raise InvalidModel(f"{file} is not a plain file.", file=file)
        with path.open("rb") as stream:
            raw = stream.read(limit + 1)
    except FileNotFoundError:
        raise InvalidModel(f"{file} is missing.", file=file) from None
    except OSError as error:
        raise InvalidModel(f"{file} cannot be read: {error.strerror}.", file=file) from None
    if len(raw) > limit:
        raise InvalidModel(f"{file} is larger than {limit} bytes.", file=file)
    return raw


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes, in lower-case hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
