import sys

import pytest

from pushforward.errors import UsageError
from pushforward.tracing import Tracing


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.resources", None)
    with pytest.raises(UsageError, match=r"opentelemetry.*pip install 'pushforward\[tracing\]'"):
        Tracing()


@pytest.mark.parametrize("name", ["OTEL_EXPORTER_OTLP_PROTOCOL", "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL"])
def test_a_protocol_that_is_not_spoken_is_refused(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "grpc")
    with pytest.raises(UsageError, match=f"{name} is 'grpc'; traces are sent by http/protobuf"):
        Tracing()


def test_a_variable_that_makes_no_sense_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "0")
    with pytest.raises(UsageError, match=r"OTEL_.*max_queue_size must be a positive integer"):
        Tracing()


def test_names_given_to_the_process_are_kept_and_others_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OTEL_SERVICE_NAME", raising=False)
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment.name=lab")
    tracing = Tracing()
    span = tracing.span("one", "SERVER", {"traceparent": "nonsense"}, {})
    named = tracing._provider.resource.attributes
    tracing.close()
    assert (named["service.name"], named["deployment.environment.name"]) == ("pushforward", "lab")
    assert span.sampled
    assert span.carrier()["traceparent"].startswith(f"00-{span.trace_id}-")
