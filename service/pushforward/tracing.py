"""Tracing with OpenTelemetry: spans are made here, and sent to a collector by OTLP over HTTP.

What a trace is made of is said in ``spans``; how it is sampled and where it goes, in the ``OTEL_…`` variables
of OpenTelemetry, which its SDK reads. The SDK is imported when tracing is switched on, and only then.

Spans are sent by a thread in batches. Nothing waits for it: while a collector is away its spans are dropped,
and at the end of the process they are waited for only so long.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import pushforward
from pushforward.errors import UsageError
from pushforward.logs import fields

if TYPE_CHECKING:
    from opentelemetry import trace as otel
    from opentelemetry.sdk.trace import ReadableSpan
    from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

__all__ = ["Span", "Tracing", "trace_field"]

log = logging.getLogger(__name__)

_FLUSH_S = 2.0  # less than a worker has for its exit
_PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
_SENT_AS = "http/protobuf"


class Tracing:
    """Makes the spans of this process and sends them.

    Raises:
        UsageError: when the extra is missing, or a variable of OpenTelemetry asks for what there is not.
    """

    def __init__(self) -> None:
        for name in _PROTOCOLS:
            if os.environ.get(name, _SENT_AS) != _SENT_AS:
                raise UsageError(f"{name} is {os.environ[name]!r}; traces are sent by {_SENT_AS} alone.")
        try:
            from opentelemetry import context, trace
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import OTELResourceDetector, Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
            from opentelemetry.trace.propagation import tracecontext
        except ModuleNotFoundError as error:
            raise UsageError(f"Tracing needs {error.name}: pip install 'pushforward[tracing]'.") from None
        named: dict[str, str | int] = {
            "service.name": "pushforward",
            "service.version": pushforward.__version__,
            "process.pid": os.getpid(),
        }
        resource = Resource.create().merge(Resource(named)).merge(OTELResourceDetector().detect())
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        try:
            self._exporter = _Exporter(OTLPSpanExporter())
            self._provider.add_span_processor(BatchSpanProcessor(cast("SpanExporter", self._exporter)))
        except ValueError as error:
            raise UsageError(f"A variable that begins with OTEL_ is not allowed: {error}.") from None
        self.api = trace
        self.tracer = self._provider.get_tracer("pushforward", pushforward.__version__)
        self.root = context.Context()
        self.propagator = tracecontext.TraceContextTextMapPropagator()

    def span(
        self,
        name: str,
        kind: str,
        carrier: Mapping[str, str | list[str]],
        attributes: Mapping[str, Any],
        began_ns: int | None = None,
    ) -> Span:
        """Begin a span whose parent is in another process, or nowhere.

        Args:
            name: of the span.
            kind: ``SERVER``, ``PRODUCER`` or ``CONSUMER``.
            carrier: the parent's context in the words of W3C Trace Context; empty, or not to be understood,
                for the first span of a trace.
            attributes: that are known; a sampler sees them.
            began_ns: Unix time in nanoseconds; None for now.
        """
        parent = self.propagator.extract(carrier, self.root)
        return Span(
            self, self.tracer.start_span(name, parent, self.api.SpanKind[kind], attributes, (), began_ns)
        )

    def close(self) -> None:
        """Send what is left, for at most two seconds, and not at all while nothing arrives."""
        sending = threading.Thread(target=self._provider.shutdown, daemon=True)
        sending.start()
        sending.join(0 if self._exporter.failing else _FLUSH_S)


class Span:
    """A span that has begun; made by ``Tracing.span``.

    Attributes:
        sampled: whether it will be sent. If not, it has no children.
        trace_id: of its trace, in hexadecimal.
    """

    __slots__ = ("_span", "_tracing", "sampled", "trace_id")

    def __init__(self, tracing: Tracing, span: otel.Span) -> None:
        self._tracing = tracing
        self._span = span
        self.sampled = span.is_recording()
        self.trace_id = f"{span.get_span_context().trace_id:032x}"

    def child(self, name: str, kind: str, attributes: Mapping[str, Any]) -> Span:
        """Begin a span within this one."""
        tracing = self._tracing
        parent = tracing.api.set_span_in_context(self._span, tracing.root)
        return Span(tracing, tracing.tracer.start_span(name, parent, tracing.api.SpanKind[kind], attributes))

    def carrier(self) -> dict[str, str]:
        """Its context in the words of W3C Trace Context, for a child in another process."""
        carrier: dict[str, str] = {}
        tracing = self._tracing
        tracing.propagator.inject(carrier, tracing.api.set_span_in_context(self._span, tracing.root))
        return carrier

    def event(self, name: str, at_ns: int) -> None:
        """Something happened, at a Unix time in nanoseconds."""
        self._span.add_event(name, timestamp=at_ns)

    def end(self, attributes: Mapping[str, Any], error: str | None = None, at_ns: int | None = None) -> None:
        """Finish it.

        Args:
            attributes: that are known by now.
            error: why it failed; None when it did not.
            at_ns: Unix time in nanoseconds; None for now.
        """
        self._span.set_attributes(attributes)
        if error is not None:
            self._span.set_status(self._tracing.api.StatusCode.ERROR, error)
        self._span.end(at_ns)


def trace_field(carrier: Mapping[str, str]) -> dict[str, str]:
    """The field of a log line that names the trace of a carrier from ``Span.carrier``; none for an empty one.

    >>> trace_field({"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"})
    {'trace_id': '0af7651916cd43dd8448eb211c80319c'}
    """
    return {"trace_id": carrier["traceparent"].split("-")[1]} if carrier else {}


class _Exporter:
    """Logs when spans begin to be lost, and when they arrive again, rather than every attempt.

    Args:
        exporter: sends them.

    Attributes:
        failing: whether the last batch was lost.
    """

    def __init__(self, exporter: SpanExporter) -> None:
        self.failing = False
        self._exporter = exporter
        self._reasons: list[str] = []
        logging.getLogger(type(exporter).__module__).addFilter(self._note)

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        result = self._exporter.export(spans)
        failing = result.name != "SUCCESS"
        if failing and not self.failing:
            log.warning("traces are lost", extra=fields(reason=self._reasons[0] if self._reasons else ""))
        elif self.failing and not failing:
            log.warning("traces arrive again")
        self.failing = failing
        self._reasons.clear()
        return result

    def shutdown(self) -> None:
        self._exporter.shutdown()

    def _note(self, record: logging.LogRecord) -> bool:
        self._reasons.append(record.getMessage())
        return False
