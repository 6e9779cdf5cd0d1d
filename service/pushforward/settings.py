"""Settings: one typed place, filled from flags, ``PUSHFORWARD_…`` variables, a file and defaults."""

from __future__ import annotations

import difflib
import os
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from pushforward.errors import UsageError

__all__ = ["PREFIX", "Settings", "load_settings"]

PREFIX = "PUSHFORWARD_"
VERSIONS = r"^(latest(:[1-9][0-9]{0,4})?|all|[^/,\s]+/[1-9][0-9]{0,8}(,[^/,\s]+/[1-9][0-9]{0,8})*)$"


def _spelt(store: Any) -> Any:
    return os.fspath(store) if isinstance(store, Path) else store


class Settings(BaseModel):
    """Everything that can be set, for the server and for the commands that work without one."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    config: Path | None = None
    """File with settings, in TOML: lines such as port = 9000; flags and variables win over it."""
    store: Annotated[str, BeforeValidator(_spelt), Field(min_length=1)] = "model_store"
    """Model store: a folder, or a URL such as s3://bucket/prefix."""
    cache: Path | None = None
    """Folder for copies of a store at a URL; unless given, pushforward in the user's cache folder."""
    cache_mb: Annotated[int, Field(ge=1)] = 10_000
    """Megabytes of copies that are kept; beyond, those of the versions unused for longest go."""

    host: Annotated[str, Field(min_length=1)] = "127.0.0.1"
    """Address to listen on; 0.0.0.0 for every interface."""
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    """Port to listen on; 0 takes a free one and the log says which."""
    admin_port: Annotated[int, Field(ge=0, le=65535)] | None = None
    """Port of its own for load, unload and /metrics; of a `pushforward worker`, for health and metrics."""
    keys: Annotated[str, Field(min_length=1)] | None = None
    """API keys that requests must have: a file, or a redis:// address that several servers share."""
    insecure: bool = False
    """Serve without keys beyond this machine: whoever reaches the address may do everything."""

    device: Annotated[str, Field(pattern=r"^(auto|(cpu|cuda:[0-9]+)(,(cpu|cuda:[0-9]+))*)$")] = "auto"
    """Where workers integrate: cpu, cuda:0, or several with commas between; auto: every GPU, else the CPU."""
    broker: Annotated[str, Field(min_length=1)] | None = None
    """Redis or Valkey queue to serve from or work for: redis://host, rediss://, unix://, sentinel://a,b/name."""
    lease_s: Annotated[float, Field(ge=0.5, le=3600)] = 5.0
    """Seconds after which chunks of a `pushforward worker` that does not answer are given to another."""
    workers: Annotated[int, Field(ge=0, le=1024)] | None = None
    """Worker processes, over the devices in turn; unless given, one for each GPU, or all cores but one."""
    stall_s: Annotated[float, Field(ge=0.2, le=3600)] = 10.0
    """Seconds without a step after which a worker that holds rows is taken for stuck, and replaced."""
    slots: Annotated[int, Field(ge=1, le=65536)] = 256
    """Rows that a worker integrates at once."""
    step_budget_ms: Annotated[float, Field(gt=0, le=60_000)] = 1.5
    """Longest step, in milliseconds, that bulk rows may make while interactive rows run beside them."""
    chunk_rows: Annotated[int, Field(ge=1, le=65536)] = 256
    """Rows of a request that travel together to a worker."""
    interactive_rows: Annotated[int, Field(ge=0)] = 256
    """Requests of more rows are bulk, which gives way to interactive ones, unless they set their priority."""

    load: Literal["start", "first-use"] = "start"
    """When models are loaded: before the server is ready, or when they are first asked for."""
    versions: Annotated[str, Field(pattern=VERSIONS)] = "latest"
    """Versions to load, beside labelled ones: latest, latest:3 of each, all, or a list: wine/2,moons/1."""
    watch_s: Annotated[float, Field(ge=0.05, le=86_400)] = 2.0
    """Seconds between two looks into the store for new versions and moved labels."""
    model_memory_mb: Annotated[int, Field(ge=1)] | None = None
    """Megabytes of programs a worker keeps loaded; beyond, those unused for longest go. None for no bound."""
    canary_share: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Share of the requests without a version that go to the one labelled "canary", where there is one."""

    max_body_bytes: Annotated[int, Field(ge=1024, le=1 << 30)] = 16 << 20
    """Largest request body, in bytes; longer ones are refused with 413."""
    max_connections: Annotated[int, Field(ge=1, le=1 << 20)] = 2048
    """Most connections at once; beyond, they are answered 503 and closed."""
    header_timeout_s: Annotated[float, Field(ge=0.5, le=3600)] = 10.0
    """Seconds in which the head of a request must arrive; its body must then come at 4 KiB/s at least."""
    max_rows: Annotated[int, Field(ge=1)] = 100_000
    """Most rows that one request may make the engine integrate (rows, or rows × times of a path)."""
    max_samples: Annotated[int, Field(ge=1)] = 100_000
    """Most samples that one request may ask for."""
    max_queue_rows: Annotated[int, Field(ge=1)] = 400_000
    """Most rows of all requests together that wait or run; beyond, requests are refused with 503."""
    max_queue_bytes: Annotated[int, Field(ge=1024)] = 1 << 30
    """Most bytes of all bodies and rows together that are held; beyond, requests are refused with 503."""
    timeout_ms: Annotated[int, Field(ge=1)] = 30_000
    """Deadline of a request that does not set its own, in milliseconds."""
    max_timeout_ms: Annotated[int, Field(ge=1)] = 600_000
    """Longest deadline that a request may set, in milliseconds."""
    drain_s: Annotated[float, Field(ge=0, le=3600)] = 30.0
    """How long a server told to stop waits for the requests it has taken, in seconds."""

    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Least severe level that is logged; "info" has a line for every request."""
    log_format: Literal["text", "json"] = "text"
    """Log lines as key=value text or as JSON."""
    tracing: bool = False
    """Whether requests are traced, as the OTEL_… variables say; needs the extra "tracing"."""


def load_settings(**flags: Any) -> Settings:
    """Read the settings; a flag that is None was not given.

    Raises:
        UsageError: naming the flag, variable or file and name, its value and what is allowed.
    """
    given = _from_environment()
    for name, value in flags.items():
        if value is not None:
            given[name] = "--" + name.replace("_", "-"), value
    if "config" in given:
        given = _from_file(Path(given["config"][1])) | given
    try:
        settings = Settings(**{name: value for name, (_, value) in given.items()})
    except ValidationError as error:
        raise UsageError("\n".join(_explained(problem, given) for problem in error.errors())) from None
    if settings.timeout_ms > settings.max_timeout_ms:
        raise UsageError(
            f"The default deadline {_source('timeout_ms', given)} = {settings.timeout_ms} is above the "
            f"longest allowed one, {_source('max_timeout_ms', given)} = {settings.max_timeout_ms}."
        )
    return settings


Given = dict[str, tuple[str, Any]]
"""By name of the setting: what its user calls it, and the value."""


def _from_environment() -> Given:
    variables = {name.upper(): name for name in os.environ if name.upper().startswith(PREFIX)}
    known = {PREFIX + name.upper(): name for name in Settings.model_fields}
    for name in sorted(variables.keys() - known.keys()):
        raise UsageError(f"The environment variable {variables[name]} is not a setting: {_hint(name, known)}")
    return {known[name]: (name, os.environ[variable]) for name, variable in variables.items()}


def _from_file(path: Path) -> Given:
    try:
        found = tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise UsageError(f"The file of settings {path} cannot be read: {error.strerror}.") from None
    except ValueError as error:  # of TOML, or of UTF-8
        raise UsageError(f"The file of settings {path} is not in TOML: {error}.") from None
    known = Settings.model_fields.keys() - {"config"}
    for name in found.keys() - known:
        raise UsageError(f"{path}: {name} is not a setting: {_hint(name, known)}")
    return {name: (f"{path}: {name}", value) for name, value in found.items()}


def _hint(name: str, known: Iterable[str]) -> str:
    """A misspelt name must not be silently without effect."""
    close = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {close[0]}?" if close else f"the settings are {', '.join(known)}."


def _source(name: str, given: Given) -> str:
    return given[name][0] if name in given else PREFIX + name.upper()


def _explained(problem: Any, given: Given) -> str:
    source, value = given[str(problem["loc"][0])]
    return f"{source}: the value {value!r} is not allowed. {problem['msg']}."
