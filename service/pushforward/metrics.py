"""What is counted and timed, in the words of Prometheus.

The front door counts requests and rows in a ``Tally``, which conserves them: whatever was submitted is in
flight or has exactly one outcome. Workers count what their engines do and send it with every ``Beat``; it is
added up here, so that a worker that dies takes none of it along.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Protocol

import prometheus_client as prometheus
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector, CollectorRegistry

from pushforward.messages import NFE, OCCUPANCY, STEP_SECONDS, Beat, Counts, ModelState

prometheus.disable_created_metrics()  # type: ignore[no-untyped-call]

__all__ = ["EngineCollector", "Metrics", "Readiness", "Tally", "exposition"]

Values = Iterable[tuple[tuple[str, ...], float]]
"""The words of the labels, and the value."""

_SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 300)
_STATUS = {
    1: "ok",
    2: "max_steps",
    3: "step_underflow",
    4: "nonfinite",
    5: "outside_support",
    6: "cancelled",
    7: "deadline",
}


class Tally:
    """What has become of everything that was submitted: it is in flight, or it has one outcome.

    >>> tally = Tally()
    >>> tally.enter(3)
    >>> tally.leave("answered", count=2)
    >>> tally.submitted, tally.in_flight, dict(tally.outcomes)
    (3, 1, {('answered',): 2})
    """

    def __init__(self) -> None:
        self.submitted = 0
        self.in_flight = 0
        self.outcomes: Counter[tuple[str, ...]] = Counter()

    def enter(self, count: int = 1) -> None:
        """So many more are in flight."""
        self.submitted += count
        self.in_flight += count

    def leave(self, *outcome: str, count: int = 1) -> None:
        """So many of those in flight have this outcome; one tally uses equally many words for all."""
        self.in_flight -= count
        self.outcomes[outcome] += count


class Queue(Protocol):
    """What is shown of admission; see ``dataplane.admission``."""

    tally: Tally
    refused: Counter[str]
    max_rows: int
    max_bytes: int

    @property
    def rows(self) -> int: ...
    @property
    def nbytes(self) -> int: ...


class Metrics(Collector):
    """The metrics of a server, in a registry of their own.

    Args:
        queue: counts the rows.

    Attributes:
        requests: tally of requests; an outcome is (operation, outcome, error code or "").
        seconds: how long the stages of requests took, by operation and stage.
        engine: what the workers tell.
    """

    def __init__(self, queue: Queue) -> None:
        self.queue = queue
        self.requests = Tally()
        self.registry = CollectorRegistry(auto_describe=True)
        self.seconds = prometheus.Histogram(
            "pushforward_request_seconds",
            "How long requests took: until admitted, waiting for a slot, in slots, and altogether.",
            ["operation", "stage"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.engine = EngineCollector()
        self.registry.register(self)
        self.registry.register(self.engine)

    def collect(self) -> Iterator[Metric]:
        """The tallies and the queue, as they are now."""
        requests, queue = self.requests, self.queue
        labels = ["operation", "outcome", "code"]
        yield _counter("requests", "Requests that have ended.", labels, requests.outcomes.items())
        yield _gauge("requests_in_flight", "Requests that have not ended.", [], [((), requests.in_flight)])
        expired = sum(count for words, count in requests.outcomes.items() if words[1] == "expired")
        yield _counter("deadline_misses", "Requests whose deadline passed.", [], [((), expired)])
        yield _counter("rows", "Rows that have ended.", ["outcome"], queue.tally.outcomes.items())
        refused = (((reason,), count) for reason, count in queue.refused.items())
        yield _counter("rejections", "Requests refused because the queue was full.", ["reason"], refused)
        for name, text, value in (
            ("queue_rows", "Rows that wait or run.", queue.rows),
            ("queue_rows_limit", "Most rows that may wait or run.", queue.max_rows),
            ("queue_bytes", "Bytes of the bodies and rows that are held.", queue.nbytes),
            ("queue_bytes_limit", "Most bytes that may be held.", queue.max_bytes),
        ):
            yield _gauge(name, text, [], [((), value)])

    def exposition(self, accept: str) -> tuple[str, bytes]:
        """See ``exposition``."""
        return exposition(self.registry, accept)


def exposition(registry: CollectorRegistry, accept: str) -> tuple[str, bytes]:
    """Content type and text of all metrics, in the best format that an ``Accept`` header allows."""
    encode, content_type = choose_encoder(accept)
    return content_type, encode(registry)


class Readiness(Collector):
    """Whether this process would take work now, as ``/health/ready`` says it.

    Args:
        unavailable: tells why not, or None; see ``Broker.unavailable``.
    """

    def __init__(self, unavailable: Callable[[], str | None]) -> None:
        self._unavailable = unavailable

    def collect(self) -> Iterator[Metric]:
        """It, as it is now."""
        ready = self._unavailable() is None
        yield _gauge("ready", "1 when a request sent now would be taken, else 0.", [], [((), int(ready))])


class EngineCollector(Collector):
    """What the engines of all workers have done, added up, and what they are doing now.

    The broker tells it: ``add`` for every ``Beat``, ``gone`` when a worker is lost, and increments of the
    counters.

    Attributes:
        restarts: workers that were replaced, by cause.
        redeliveries: chunks that were handed out again.
        quarantined: chunks that were tried alone on a worker.
        models: tells the state of every version; see ``Broker.models``.
    """

    def __init__(self) -> None:
        self.restarts: Counter[str] = Counter()
        self.redeliveries = 0
        self.quarantined = 0
        self.models: Callable[[], Mapping[tuple[str, int], ModelState]] = dict
        self._total = Counts()
        self._now: dict[str, Beat] = {}

    def add(self, worker: str, beat: Beat) -> None:
        """Add what a worker has done since its last beat, and show what it has in hand."""
        total, counts = self._total, beat.counts
        total.step_seconds = _sums(total.step_seconds, counts.step_seconds)
        total.step_seconds_sum += counts.step_seconds_sum
        total.occupancy = _sums(total.occupancy, counts.occupancy)
        total.occupancy_sum += counts.occupancy_sum
        total.nfe = _sums(total.nfe, counts.nfe)
        total.nfe_sum += counts.nfe_sum
        total.accepted += counts.accepted
        total.rejected += counts.rejected
        for status, rows in counts.status.items():
            total.status[status] = total.status.get(status, 0) + rows
        self._now[worker] = beat

    def gone(self, worker: str) -> None:
        """A worker has ended: it has nothing in hand, and what it has done still counts."""
        self._now.pop(worker, None)

    def collect(self) -> Iterator[Metric]:
        """All of it, as metrics."""
        total = self._total
        yield _histogram(
            "step_seconds",
            "Duration of a step of a batch.",
            STEP_SECONDS,
            total.step_seconds,
            total.step_seconds_sum,
        )
        yield _histogram(
            "batch_occupancy_rows",
            "Rows in a step of a batch.",
            OCCUPANCY,
            total.occupancy,
            total.occupancy_sum,
        )
        yield _histogram(
            "nfe_per_row", "Evaluations of the vector field for a row.", NFE, total.nfe, total.nfe_sum
        )
        steps = [(("accepted",), total.accepted), (("rejected",), total.rejected)]
        yield _counter(
            "steps", "Steps of the rows that left, by what the controller said.", ["result"], steps
        )
        finished = (((_STATUS.get(status, "unknown"),), rows) for status, rows in total.status.items())
        yield _counter("rows_finished", "Rows that left the engines.", ["status"], finished)
        running = (((worker,), beat.running) for worker, beat in self._now.items())
        yield _gauge("rows_running", "Rows in slots.", ["worker"], running)
        waiting = (((worker,), beat.waiting) for worker, beat in self._now.items())
        yield _gauge("rows_waiting", "Rows that wait for a slot.", ["worker"], waiting)
        restarts = (((cause,), count) for cause, count in self.restarts.items())
        yield _counter("worker_restarts", "Workers that were replaced.", ["cause"], restarts)
        yield _counter("redeliveries", "Chunks handed out again.", [], [((), self.redeliveries)])
        yield _counter("quarantined", "Chunks tried alone on a worker.", [], [((), self.quarantined)])
        labels = ["model", "version", "state"]
        states = (((name, str(number), one.state), 1) for (name, number), one in self.models().items())
        yield _gauge("model_state", "1 for the state that a version is in.", labels, states)


def _sums(left: Sequence[int], right: Sequence[int]) -> list[int]:
    return [one + other for one, other in zip(left, right, strict=True)]


def _counter(name: str, text: str, labels: Sequence[str], values: Values) -> CounterMetricFamily:
    family = CounterMetricFamily(f"pushforward_{name}", text, labels=labels)
    for words, value in values:
        family.add_metric(words, value)
    return family


def _gauge(name: str, text: str, labels: Sequence[str], values: Values) -> GaugeMetricFamily:
    family = GaugeMetricFamily(f"pushforward_{name}", text, labels=labels)
    for words, value in values:
        family.add_metric(words, value)
    return family


def _histogram(
    name: str, text: str, edges: Iterable[float], counts: Sequence[int], total: float
) -> HistogramMetricFamily:
    buckets, below = [], 0
    for edge, count in zip((*map(str, map(float, edges)), "+Inf"), counts, strict=True):
        below += count
        buckets.append((edge, below))
    return HistogramMetricFamily(f"pushforward_{name}", text, buckets=buckets, sum_value=total)
