"""From the rows of a request to chunks for the workers, and back to one result."""

from __future__ import annotations

import asyncio
import itertools
import secrets
import time
from collections import Counter
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from pushforward.broker.base import Broker
from pushforward.dataplane.admission import Admission, Place
from pushforward.dataplane.request import Limits, Options, Ticket
from pushforward.engine.request import Kind, Status
from pushforward.errors import DeadlineExceeded, InvalidInput
from pushforward.messages import Result, Work
from pushforward.spans import traced
from pushforward.store.manifest import Manifest

__all__ = ["Dispatcher", "first_rows"]

Floats = npt.NDArray[np.float64]

_ROWS_OUT = 1024  # rows of a request that are with the workers at once: some batches full
_UNCOUNTED_S = 3600.0  # how long rows without a deadline count as asked for, if nobody says they are done
_OUTCOMES = {Status.OUTSIDE_SUPPORT: "answered", Status.CANCELLED: "cancelled", Status.DEADLINE: "expired"}


@dataclass(frozen=True)
class Admitted:
    """Rows for which there is room, not yet made; see ``Dispatcher.admit``."""

    manifest: Manifest
    options: Options
    ticket: Ticket
    place: Place
    timeout_s: float | None


class Dispatcher:
    """Has rows solved by the workers of a broker.

    Args:
        broker: takes the chunks.
        limits: how much one request may ask for.
        admission: how much all may.
    """

    def __init__(self, broker: Broker, limits: Limits, admission: Admission) -> None:
        self._broker = broker
        self._limits = limits
        self._admission = admission
        self._requests = (f"{secrets.token_hex(4)}-{number}" for number in itertools.count())

    @asynccontextmanager
    async def admit(
        self,
        manifest: Manifest,
        rows: int,
        options: Options,
        ticket: Ticket | None,
        *,
        times: int = 1,
        what: str = "",
    ) -> AsyncIterator[Admitted]:
        """Take a request in, before its rows are made, for as long as the block runs.

        Args:
            manifest: of the version.
            rows: how many there are.
            options: how they are to be integrated.
            ticket: the request; None for one that begins here.
            times: how often each of them is integrated.
            what: why more than once.

        Raises:
            InvalidInput: when there are no rows.
            LimitExceeded: when there are more than one request may have.
            Unavailable: when there is no room for them now.
            QuotaExceeded: when their owner may not ask for so many now.
            DeadlineExceeded: when it is too late already.
        """
        if rows < 1:
            raise InvalidInput("There are no rows; give at least one.")
        self._limits.check_rows(rows, times, what)
        if ticket is None:
            ticket = Ticket()
        rows *= times
        timeout_s = self._limits.timeout_s(options.timeout_ms or ticket.timeout_ms)
        elapsed_s = time.time() - ticket.arrived
        if timeout_s is not None and elapsed_s > timeout_s:
            raise _too_late(timeout_s, rows, [], [])
        nbytes = 8 * rows * (manifest.dim + manifest.context_dim)
        with self._admission.admit(rows, nbytes, ticket.body) as place:
            await self._broker.admit(rows, nbytes)
            ticket.rows, ticket.admitted_s = rows, time.time() - ticket.arrived
            admitted = Admitted(manifest, options, ticket, place, timeout_s)
            if ticket.quota is None:
                yield admitted
            else:
                left_s = _UNCOUNTED_S if timeout_s is None else timeout_s - elapsed_s
                async with ticket.quota(rows, left_s):
                    yield admitted

    async def solve(
        self,
        admitted: Admitted,
        kind: Kind,
        rows: Floats,
        context: Floats | None,
        *,
        density: bool,
        times: Sequence[float | None] = (None,),
    ) -> list[Result]:
        """One result for each time; see ``Dataplane`` for the arguments and errors.

        Only so many chunks are out at once. A request must not fill the queue of a worker, where whatever
        others send meanwhile would wait behind it.
        """
        manifest, options, ticket = admitted.manifest, admitted.options, admitted.ticket
        count, size = len(rows), self._limits.chunk_rows
        context = _fitting(manifest, context, count)
        solver, timeout_s = manifest.solver, admitted.timeout_s
        deadline = None if timeout_s is None else ticket.arrived + timeout_s
        bulk = options.priority == "bulk"
        if options.priority is None:
            bulk = count * len(times) > self._limits.interactive_rows
        request = next(self._requests)

        def work(number: int, t_end: float | None, first: int) -> Work:
            return Work(
                id=f"{request}/{number}",
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
                bulk=bulk,
                request=request,
            )

        submit = self._broker.submit
        if ticket.span is not None and ticket.span.sampled:
            submit = partial(traced, ticket.span, submit)
        places = list(itertools.product(times, range(0, count, size)))
        results: dict[int, Result] = {}
        late: list[Floats] = []
        waiting = iter(enumerate(places))

        async def take_turns() -> None:
            for number, place in waiting:
                if late:  # the chunks that are out are told the same, and how far they came
                    return
                result = results[number] = await submit(work(number, *place))
                ticket.results.append(result)
                _leave(admitted.place, result)
                if Status.DEADLINE in result.status.tobytes():
                    late.append(_travelled(manifest, kind, place[0], result))

        try:
            if len(places) == 1:
                await take_turns()
            else:
                out = max(2, _ROWS_OUT // min(count, size))
                await _all_or_none([take_turns() for _ in range(min(out, len(places)))])
            if late:
                raise TimeoutError
        except TimeoutError:
            raise _too_late(timeout_s or 0, count * len(times), list(results.values()), late) from None
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
    columns: dict[str, Any] = {
        name: np.concatenate([getattr(result, name) for result in results]) for name in _COLUMNS
    }
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


def _leave(place: Place, result: Result) -> None:
    """Give the rows of an answer back to the queue."""
    status = result.status.tobytes()
    answered = status.count(Status.OK)
    place.leave("answered", answered)
    if answered < len(status):
        for value, rows in Counter(status).items():
            if value != Status.OK:
                place.leave(_OUTCOMES.get(Status(value), "failed"), rows)


def _travelled(manifest: Manifest, kind: Kind, t_end: float | None, result: Result) -> Floats:
    """For each row that was late: the share of its way, in time, that it had travelled."""
    begin, end = manifest.t_base, manifest.t_data
    if kind is Kind.ENCODE:
        begin, end = end, begin
    way = (end if t_end is None else t_end) - begin
    reached = result.t[result.status == Status.DEADLINE]
    return np.clip(np.nan_to_num((reached - begin) / way), 0.0, 1.0) if way else np.zeros(len(reached))


def _too_late(
    timeout_s: float, rows: int, results: Sequence[Result], late: Sequence[Floats]
) -> DeadlineExceeded:
    """How far a request came. Rows of which nothing was heard count as not begun."""
    travelled = np.concatenate([*late, np.zeros(0)])
    solved = sum(len(result.status) for result in results) - len(travelled)
    unfinished = rows - solved
    detail = {
        "rows": rows,
        "solved": solved,
        "nfe": sum(int(result.nfe.sum()) for result in results),
        "travelled_least": float(travelled.min()) if len(travelled) == unfinished > 0 else 0.0,
        "travelled_mean": float(travelled.sum()) / max(unfinished, 1),
    }
    return DeadlineExceeded(
        f"The deadline of {round(1000 * timeout_s)} ms passed when {solved} of {rows} rows had been solved; "
        f"the others were {detail['travelled_mean']:.0%} of their way along on average. "
        "Raise timeout_ms, or ask for fewer rows.",
        detail=detail,
    )


async def _all_or_none(calls: Sequence[Coroutine[Any, Any, None]]) -> None:
    """Run calls together; when one fails, the others are cancelled."""
    tasks = [asyncio.ensure_future(call) for call in calls]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
