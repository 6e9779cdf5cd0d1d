"""The operations: densities, scores, samples, transport and paths."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pushforward.broker.base import Broker
from pushforward.dataplane.admission import Admission
from pushforward.dataplane.dispatch import Dispatcher, first_rows
from pushforward.dataplane.request import Limits, Options, Ticket
from pushforward.dataplane.resolve import Model, Resolver
from pushforward.engine.request import Kind
from pushforward.errors import InvalidInput, LimitExceeded
from pushforward.messages import Result
from pushforward.noise import standard_normal
from pushforward.scoring.attribution import attributions, replacements
from pushforward.scoring.calibration import benjamini_hochberg, flag
from pushforward.store.catalog import Catalog

__all__ = ["Dataplane", "Model", "Scores"]

Floats = npt.NDArray[np.float64]

_SMALL_NOISE = 1 << 14  # numbers drawn faster than a thread is woken


@dataclass(frozen=True)
class Scores:
    """Anomaly scores of rows.

    Args:
        result: the densities they rest on.
        p_value: [n] conformal p-values; NaN for a row that failed.
        is_anomaly: [n].
        attributions: [n, D] nats, if they were asked for.
        smallest_p_value: the least that the calibration can give.
    """

    result: Result
    p_value: Floats
    is_anomaly: npt.NDArray[np.bool_]
    attributions: Floats | None
    smallest_p_value: float


class Dataplane:
    """Answers requests.

    Every operation takes rows in raw units, [n, D]; the context of a conditional model, [n, C] or [1, C] for
    all rows (None otherwise); options; and the ticket of the request, unless it begins here. All of them
    raise:

    - ``InvalidInput`` when there are no rows, or the context does not fit;
    - ``LimitExceeded`` when there are too many rows, or the deadline is too far away;
    - ``Unavailable`` when there is no room for the rows now;
    - ``QuotaExceeded`` when the ticket's owner may not ask for so many now;
    - ``DeadlineExceeded`` when the deadline passed first: no part of the answer is given;
    - ``InvalidModel`` when the version cannot be loaded.

    A row that fails is no error: the result has its status.

    Args:
        catalog: where the models are.
        broker: who solves the rows; started and closed by whoever made it.
        limits: how much one request may ask for.
        admission: how much all may.
        canary_share: share of the requests without a version that go to the one labelled "canary".
    """

    def __init__(
        self,
        catalog: Catalog,
        broker: Broker,
        limits: Limits,
        admission: Admission,
        canary_share: float = 0.0,
    ) -> None:
        self.catalog = catalog
        self.broker = broker
        self.limits = limits
        self.admission = admission
        self._dispatcher = Dispatcher(broker, limits, admission)
        self._resolver = Resolver(catalog, broker.models, canary_share)

    def model(self, name: str, version: str | int | None = None, request_id: str = "") -> Model:
        """The version that answers a request: see ``Resolver``.

        Raises:
            NotFound: listing what there is.
            InvalidModel: when the version is broken or was unloaded, and none was served before it.
        """
        return self._resolver.find(name, version, request_id)

    async def density(
        self,
        model: Model,
        x: Floats,
        context: Floats | None,
        options: Options,
        ticket: Ticket | None = None,
    ) -> Result:
        """log p(x) of rows, in nats; ``value`` holds their base points z."""
        return await self.transport(model, Kind.ENCODE, x, context, options, ticket, density=True)

    async def score(
        self,
        model: Model,
        x: Floats,
        context: Floats | None,
        options: Options,
        ticket: Ticket | None = None,
        *,
        alpha: float = 0.01,
        two_sided: bool = False,
        fdr: float | None = None,
        explain: bool = False,
    ) -> Scores:
        """Anomaly scores of rows.

        Args:
            model: from ``model``.
            x: rows.
            context: see the class.
            options: how to integrate.
            ticket: see the class.
            alpha: share of ordinary rows that may be flagged: a row is when p ≤ alpha.
            two_sided: whether rows that are too likely count as unusual as well.
            fdr: flag by Benjamini–Hochberg over these rows instead, at this false discovery rate.
            explain: whether to attribute the scores to features, for which D·q more rows are solved for each.
        """
        calibration = await model.calibration()
        count, choices = len(x), explain * calibration.quantiles.size
        what = "itself, and every feature at every quantile to explain it"
        async with self._dispatcher.admit(
            model.manifest, count, options, ticket, times=1 + choices, what=what
        ) as admitted:
            rows = np.concatenate([x, replacements(x, calibration.quantiles)]) if explain else x
            if explain and context is not None and len(context) > 1:
                context = np.concatenate([context, np.repeat(context, choices, axis=0)])
            (result,) = await self._dispatcher.solve(admitted, Kind.ENCODE, rows, context, density=True)
        explanation = None
        if explain:
            before, after = np.split(result.log_density, [count])
            explanation = attributions(before, after, model.manifest.dim)
            result = first_rows(result, count)
        p_value = calibration.p_values(result.log_density, two_sided=two_sided)
        return Scores(
            result,
            p_value,
            flag(p_value, alpha) if fdr is None else benjamini_hochberg(p_value, fdr),
            explanation,
            calibration.smallest_p_value(two_sided=two_sided),
        )

    async def sample(
        self,
        model: Model,
        count: int,
        seed: int,
        context: Floats | None,
        options: Options,
        ticket: Ticket | None = None,
        *,
        temperature: float = 1.0,
        density: bool = False,
        first: int = 0,
    ) -> Result:
        """Samples first … first + count − 1 of a seed, as ``value`` [n, D] in raw units.

        Args:
            model: from ``model``.
            count: n.
            seed: what the noise is keyed by; equal calls with equal seeds give equal samples.
            context: see the class.
            options: how to integrate.
            ticket: see the class.
            temperature: standard deviation of the base noise.
            density: whether to answer log p(x) as well, of the model whatever the temperature.
            first: number of the first sample.
        """
        if count < 1:
            raise InvalidInput(f"n is {count}; it must be at least 1.", where="n")
        if count > self.limits.samples:
            raise LimitExceeded(
                f"n is {count}; one request may ask for {self.limits.samples} samples at most.",
                limit=self.limits.samples,
                where="n",
            )
        dim = model.manifest.dim
        async with self._dispatcher.admit(model.manifest, count, options, ticket) as admitted:
            if count * dim <= _SMALL_NOISE:
                noise = standard_normal(seed, first, count, dim)
            else:
                noise = await asyncio.to_thread(standard_normal, seed, first, count, dim)
            (result,) = await self._dispatcher.solve(
                admitted, Kind.DECODE, noise * temperature, context, density=density
            )
        return result

    async def transport(
        self,
        model: Model,
        kind: Kind,
        start: Floats,
        context: Floats | None,
        options: Options,
        ticket: Ticket | None = None,
        *,
        density: bool = False,
    ) -> Result:
        """Carry rows across: x to z (``Kind.ENCODE``) or z to x (``Kind.DECODE``), as ``value`` [n, D]."""
        async with self._dispatcher.admit(model.manifest, len(start), options, ticket) as admitted:
            (result,) = await self._dispatcher.solve(admitted, kind, start, context, density=density)
        return result

    async def path(
        self,
        model: Model,
        kind: Kind,
        start: Floats,
        times: Sequence[float],
        context: Floats | None,
        options: Options,
        ticket: Ticket | None = None,
    ) -> list[Result]:
        """Where rows are at some times on their way: a result for each, ``value`` [n, D] in flow coordinates.

        Every (row, time) is an initial value problem of its own, so that no answer depends on which other
        times are asked for.
        """
        earliest, latest = sorted((model.manifest.t_base, model.manifest.t_data))
        for number, t in enumerate(times):
            if not earliest <= t <= latest:
                raise InvalidInput(
                    f"times[{number}] is {t}; the model's times go from {earliest} to {latest}.",
                    where=f"times[{number}]",
                )
        async with self._dispatcher.admit(
            model.manifest, len(start), options, ticket, times=len(times), what="one for each time"
        ) as admitted:
            return await self._dispatcher.solve(admitted, kind, start, context, density=False, times=times)
