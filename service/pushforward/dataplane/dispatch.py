"""From the rows of a request to chunks for the workers, and back to one result."""

from __future__ import annotations

import asyncio
import itertools
import secrets
import time
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field

from pushforward.broker.base import Broker
from pushforward.engine.request import Kind, Status
from pushforward.errors import DeadlineExceeded, InvalidInput, LimitExceeded
from pushforward.messages import Result, Work
from pushforward.store.manifest import Manifest

__all__ = ["Dispatcher", "Limits", "Options", "first_rows"]

Floats = npt.NDArray[np.float64]

_ROWS_OUT = 1024  # rows of a request that are with the workers at once: some batches full


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


@dataclass(frozen=True)
class Limits:
    """How much one request may ask for.

    Args:
        rows: most rows that the engine integrates for it.
        samples: most samples.
        timeout_ms: deadline unless it sets one; None for none.
        max_timeout_ms: longest deadline it may set.
        chunk_rows: rows that travel together.
    """

    rows: int
    samples: int
    timeout_ms: int | None
    max_timeout_ms: int
    chunk_rows: int

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

    def timeout_s(self, asked_ms: int | None) -> float | None:
        """Seconds until the deadline of a request that arrives now; None for none.

        Raises:
            LimitExceeded: when it asks for a longer one than is allowed.
        """
        if asked_ms is None:
            return None if self.timeout_ms is None else self.timeout_ms / 1000
        if asked_ms > self.max_timeout_ms:
            raise LimitExceeded(
                f"timeout_ms is {asked_ms}; it may be {self.max_timeout_ms} at most.",
                limit=self.max_timeout_ms,
                where="timeout_ms",
            )
        return asked_ms / 1000


class Dispatcher:
    """Has rows solved by the workers of a broker.

    Args:
        broker: takes the chunks.
        limits: how much one request may ask for.
    """

    def __init__(self, broker: Broker, limits: Limits) -> None:
        self._broker = broker
        self._limits = limits
        self._ids = (f"{secrets.token_hex(4)}-{number}" for number in itertools.count())

    async def solve(
        self,
        manifest: Manifest,
        kind: Kind,
        rows: Floats,
        context: Floats | None,
        options: Options,
        *,
        density: bool,
        times: Sequence[float | None] = (None,),
    ) -> list[Result]:
        """One result for each time; see ``Dataplane`` for the arguments and errors.

        Only so many chunks are out at once. A request must not fill the queue of a worker, where whatever
        others send meanwhile would wait behind it.
        """
        count, size = len(rows), self._limits.chunk_rows
        if count < 1:
            raise InvalidInput("There are no rows; give at least one.")
        self._limits.check_rows(count, len(times), "one for each time")
        timeout_s = self._limits.timeout_s(options.timeout_ms)
        deadline = None if timeout_s is None else time.time() + timeout_s
        context = _fitting(manifest, context, count)
        solver = manifest.solver

        def work(t_end: float | None, first: int) -> Work:
            return Work(
                id=next(self._ids),
                model=manifest.name,
                version=manifest.version,
                kind=kind.value,
                density=density,
                precision=options.precision or solver.precision,
                rows=rows[first : first + size],
                context=None if context is None else context[first : first + size],
                rtol=options.rtol or solver.rtol,
                atol=options.atol or solver.atol,
                logp_atol=options.logp_atol or solver.logp_atol,
                max_steps=options.max_steps or solver.max_steps,
                t_end=t_end,
                deadline=deadline,
            )

        places = list(itertools.product(times, range(0, count, size)))
        results: dict[int, Result] = {}
        waiting = iter(enumerate(places))

        async def take_turns() -> None:
            for number, place in waiting:
                results[number] = await self._broker.submit(work(*place))
                if Status.DEADLINE in results[number].status.tobytes():
                    raise TimeoutError

        try:
            if len(places) == 1:
                await take_turns()
            else:
                out = max(2, _ROWS_OUT // min(count, size))
                await _all_or_none([take_turns() for _ in range(min(out, len(places)))])
        except TimeoutError:
            raise _too_late(timeout_s or 0, count * len(times), list(results.values())) from None
        ordered = [results[number] for number in range(len(places))]
        chunks = len(places) // len(times)
        return [_joined(ordered[first : first + chunks]) for first in range(0, len(places), chunks)]


def first_rows(result: Result, count: int) -> Result:
    """The first rows of a result."""
    return Result(id=result.id, **{name: getattr(result, name)[:count] for name in _COLUMNS})


_COLUMNS = ("value", "log_density", "error_estimate", "steps", "accepted", "nfe", "status", "t")


def _joined(results: Sequence[Result]) -> Result:
    if len(results) == 1:
        return results[0]
    columns = {name: np.concatenate([getattr(result, name) for result in results]) for name in _COLUMNS}
    return Result(id=results[0].id, **columns)


def _fitting(manifest: Manifest, context: Floats | None, count: int) -> Floats | None:
    """The context with a row for each of ``count`` rows."""
    if manifest.context_dim == 0:
        if context is not None:
            raise InvalidInput(f"Model {manifest.name} takes no context; leave it out.", where="context")
        return None
    if context is None:
        names = ", ".join(map(repr, manifest.context_features))
        raise InvalidInput(
            f"Model {manifest.name} is conditional: give context, with {names}.", where="context"
        )
    if len(context) not in (1, count):
        raise InvalidInput(
            f"context has {len(context)} rows; it must have 1, for all rows, or {count}, one for each.",
            where="context",
        )
    return context if len(context) == count else np.broadcast_to(context, (count, context.shape[1]))


def _too_late(timeout_s: float, rows: int, results: Sequence[Result]) -> DeadlineExceeded:
    """How far a request came."""
    solved = sum(int((result.status != Status.DEADLINE).sum()) for result in results)
    return DeadlineExceeded(
        f"The deadline of {round(1000 * timeout_s)} ms passed when {solved} of {rows} rows had been solved: "
        "raise timeout_ms, or ask for fewer rows.",
        detail={"rows": rows, "solved": solved, "nfe": sum(int(result.nfe.sum()) for result in results)},
    )


async def _all_or_none(calls: Sequence[Coroutine[Any, Any, None]]) -> None:
    """Run calls together; when one fails, the others are cancelled."""
    tasks = [asyncio.ensure_future(call) for call in calls]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
