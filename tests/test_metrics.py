"""What is counted, and how it is told."""

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as read_openmetrics
from prometheus_client.parser import text_string_to_metric_families

from pushforward.dataplane.admission import Admission
from pushforward.engine.request import Status
from pushforward.errors import Unavailable
from pushforward.messages import NFE, OCCUPANCY, STEP_SECONDS, Beat, Counts, ModelState
from pushforward.metrics import EngineCollector, Metrics, Readiness


def beat(steps: int, rows: int, running: int = 0) -> Beat:
    """Of an engine that made so many steps of 3 ms with 5 rows, and finished rows with 31 evaluations."""
    counts = Counts()
    counts.step_seconds[next(i for i, edge in enumerate(STEP_SECONDS) if edge >= 0.003)] = steps
    counts.step_seconds_sum = 0.003 * steps
    counts.occupancy[OCCUPANCY.index(8)] = steps
    counts.occupancy_sum = 5 * steps
    counts.nfe[NFE.index(31)] = rows
    counts.nfe_sum = 31 * rows
    counts.accepted, counts.rejected = 4 * rows, rows
    counts.status = {Status.OK: rows, Status.NONFINITE: 1}
    return Beat(steps, running, 2, counts)


def samples(metrics: Metrics) -> dict[tuple[str, ...], float]:
    """Every sample by its name and the values of its labels, in the order of their names."""
    _, text = metrics.exposition("")
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text.decode())
        for sample in family.samples
    }


def test_the_exposition_is_what_prometheus_reads() -> None:
    admission = Admission(10, 1000)
    metrics = Metrics(admission)
    metrics.requests.enter(3)
    metrics.requests.leave("sample", "answered", "")
    metrics.requests.leave("sample", "expired", "deadline-exceeded")
    metrics.seconds.labels("sample", "total").observe(0.003)
    with admission.admit(7, 100) as place:
        place.leave("answered", 2)
        with pytest.raises(Unavailable):
            admission.admit(6, 0)
        told = samples(metrics)
    assert told["pushforward_requests_total", "", "sample", "answered"] == 1
    assert told["pushforward_requests_total", "deadline-exceeded", "sample", "expired"] == 1
    assert told["pushforward_deadline_misses_total",] == 1
    assert told["pushforward_requests_in_flight",] == 1
    assert told["pushforward_rows_total", "answered"] == 2
    assert told["pushforward_rows_total", "refused"] == 6
    assert told["pushforward_rejections_total", "rows"] == 1
    assert (told["pushforward_queue_rows",], told["pushforward_queue_rows_limit",]) == (5, 10)
    assert (told["pushforward_queue_bytes",], told["pushforward_queue_bytes_limit",]) == (100, 1000)
    assert told["pushforward_request_seconds_bucket", "0.005", "sample", "total"] == 1
    assert told["pushforward_request_seconds_count", "sample", "total"] == 1


def test_readiness_is_what_the_broker_says_now() -> None:
    reasons = ["The workers are starting."]
    metrics = Metrics(Admission(1, 1))
    metrics.registry.register(Readiness(lambda: reasons[0] if reasons else None))
    assert samples(metrics)["pushforward_ready",] == 0
    reasons.clear()
    assert samples(metrics)["pushforward_ready",] == 1


def test_the_format_is_the_one_that_is_asked_for() -> None:
    metrics = Metrics(Admission(1, 1))
    kind, text = metrics.exposition("application/openmetrics-text; version=1.0.0")
    assert kind.startswith("application/openmetrics-text; version=1.0.0")
    assert {family.name for family in read_openmetrics(text.decode())} >= {"pushforward_requests_in_flight"}
    kind, _ = metrics.exposition("*/*")
    assert kind.startswith("text/plain; version=")


def test_what_workers_did_adds_up_and_outlives_them() -> None:
    metrics = Metrics(Admission(1, 1))
    engine = metrics.engine
    engine.add("a", beat(steps=10, rows=4, running=6))
    engine.add("b", beat(steps=1, rows=2, running=3))
    engine.add("a", beat(steps=5, rows=1, running=7))
    before = samples(metrics)
    assert before["pushforward_rows_running", "a"] == 7
    assert before["pushforward_rows_running", "b"] == 3
    engine.gone("a")
    engine.restarts["crash"] += 1
    engine.redeliveries += 2
    engine.quarantined += 1
    engine.models = lambda: {("pair", 2): ModelState("pair", 2, "failed", "Wrong hash.")}
    after = samples(metrics)
    assert ("pushforward_rows_running", "a") not in after
    for told in (before, after):
        assert told["pushforward_step_seconds_count",] == 16
        assert told["pushforward_step_seconds_sum",] == pytest.approx(0.048)
        assert told["pushforward_batch_occupancy_rows_bucket", "4.0"] == 0
        assert told["pushforward_batch_occupancy_rows_bucket", "8.0"] == 16
        assert told["pushforward_batch_occupancy_rows_bucket", "+Inf"] == 16
        assert told["pushforward_nfe_per_row_count",] == 7
        assert told["pushforward_nfe_per_row_sum",] == 7 * 31
        assert told["pushforward_steps_total", "accepted"] == 28
        assert told["pushforward_steps_total", "rejected"] == 7
        assert told["pushforward_rows_finished_total", "ok"] == 7
        assert told["pushforward_rows_finished_total", "nonfinite"] == 3
    assert after["pushforward_worker_restarts_total", "crash"] == 1
    assert after["pushforward_redeliveries_total",] == 2
    assert after["pushforward_quarantined_total",] == 1
    assert after["pushforward_model_state", "pair", "failed", "2"] == 1


def test_every_status_has_its_name() -> None:
    collector = EngineCollector()
    counts = Counts(status={status.value: 1 for status in Status})
    collector.add("a", Beat(0, 0, 0, counts))
    (finished,) = [family for family in collector.collect() if family.name == "pushforward_rows_finished"]
    assert {sample.labels["status"] for sample in finished.samples} == {
        status.name.lower() for status in Status
    }
