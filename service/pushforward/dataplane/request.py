"""A request, apart from its rows: how to integrate them, what it may ask for, what was spent on it."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from pushforward.dataplane.admission import Place
from pushforward.errors import LimitExceeded
from pushforward.messages import Result
from pushforward.tracing import Span

__all__ = ["Limits", "Options", "Ticket"]


class Options(BaseModel):
    """How rows are integrated; what is not given comes from the model's manifest or the settings."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", use_attribute_docstrings=True)

    rtol: Annotated[float, Field(ge=1e-13, le=0.1)] | None = None
    """Relative tolerance of z, per step."""
    atol: Annotated[float, Field(ge=1e-13, le=0.1)] | None = None
    """Absolute tolerance of z, per step, in units of the transformed data."""
    logp_atol: Annotated[float, Field(ge=1e-13, le=1.0)] | None = None
    """Absolute tolerance of the log-density, per step, in nats."""
    max_steps: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    """Attempted steps after which a row is given up."""
    precision: Literal["float32", "float64"] | None = None
    """Arithmetic of z and of the vector field."""
    timeout_ms: Annotated[int, Field(ge=1)] | None = None
    """Deadline of the whole request, in milliseconds from its arrival."""
    priority: Literal["interactive", "bulk"] | None = None
    """Bulk rows give way to interactive ones. By default a request is bulk when it has many rows."""


@dataclass(frozen=True)
class Limits:
    """How much one request may ask for.

    Args:
        rows: most rows that the engine integrates for it.
        samples: most samples.
        timeout_ms: deadline unless it sets one; None for none.
        max_timeout_ms: longest deadline it may set.
        chunk_rows: most rows that travel together.
        interactive_rows: a request of more is bulk, unless it says otherwise.
    """

    rows: int
    samples: int
    timeout_ms: int | None
    max_timeout_ms: int
    chunk_rows: int
    interactive_rows: int

    def check_rows(self, rows: int, times: int = 1, what: str = "") -> None:
        """Refuse more rows, each ``times`` over, than are allowed.

        Raises:
            LimitExceeded: saying how many there are and may be.
        """
        if rows * times > self.rows:
            asked = f"{rows} rows are"
            if times > 1:
                asked = f"{rows} rows, each {times} times ({what}), are {rows * times} rows, which is"
            raise LimitExceeded(
                f"{asked} more than one request may have integrated: {self.rows}.", limit=self.rows
            )

    def timeout_s(self, asked_ms: int | None, where: str = "timeout_ms") -> float | None:
        """Seconds from a request's arrival to its deadline; None for none.

        Raises:
            LimitExceeded: when it asks, in ``where``, for a later one than is allowed.
        """
        if asked_ms is None:
            return None if self.timeout_ms is None else self.timeout_ms / 1000
        if asked_ms > self.max_timeout_ms:
            raise LimitExceeded(
                f"{where} is {asked_ms}; it may be {self.max_timeout_ms} at most.",
                limit=self.max_timeout_ms,
                where=where,
            )
        return asked_ms / 1000


class Ticket:
    """What the data plane knows of a request: when it came, how long it may take, what was spent on it.

    Args:
        timeout_ms: its deadline, from its arrival, unless its options set one.
        body: what it holds of the queue already.

    Attributes:
        quota: counts its rows for as long as a block runs, given their number and the seconds to its
            deadline; None when nobody counts them.
        arrived: Unix time in seconds.
        rows: that are integrated for it.
        admitted_s: seconds from its arrival until they were admitted.
        results: answers of chunks so far.
        span: that of the request, if it is traced.
    """

    __slots__ = ("admitted_s", "arrived", "body", "quota", "results", "rows", "span", "timeout_ms")

    def __init__(self, timeout_ms: int | None = None, body: Place | None = None) -> None:
        self.arrived = time.time()
        self.timeout_ms = timeout_ms
        self.body = body
        self.quota: Callable[[int, float], AbstractAsyncContextManager[None]] | None = None
        self.rows = 0
        self.admitted_s = 0.0
        self.results: list[Result] = []
        self.span: Span | None = None

    @property
    def queue_s(self) -> float:
        """The longest that one of its chunks waited at a worker until its first row ran, in seconds."""
        return max((result.queue_s for result in self.results), default=0.0)

    @property
    def solve_s(self) -> float:
        """The longest that one of its chunks ran, in seconds."""
        return max((result.solve_s for result in self.results), default=0.0)
