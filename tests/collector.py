"""A collector of traces: takes OTLP over HTTP on a port of its own, and keeps what it is sent."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from tests.server import until


@dataclass(frozen=True)
class Span:
    trace: str
    id: str
    parent: str
    name: str
    kind: int
    begin: int
    end: int
    state: str
    attributes: dict[str, Any]
    events: dict[str, int]
    failed: bool
    reason: str
    resource: dict[str, Any]


@dataclass
class Collector:
    spans: list[Span] = field(default_factory=list)
    url: str = ""

    def trace(self, id: str, whole: Callable[[list[Span]], bool]) -> list[Span]:
        """The spans of a trace by their beginning, once it is whole."""

        def those() -> list[Span]:
            return sorted(
                (span for span in list(self.spans) if span.trace == id), key=lambda span: span.begin
            )

        assert until(lambda: whole(those())), those()
        return those()

    def take(self, body: bytes) -> None:
        for sent in ExportTraceServiceRequest.FromString(body).resource_spans:
            resource = _values(sent.resource.attributes)
            for scope in sent.scope_spans:
                self.spans += [
                    Span(
                        trace=span.trace_id.hex(),
                        id=span.span_id.hex(),
                        parent=span.parent_span_id.hex(),
                        name=span.name,
                        kind=span.kind,
                        begin=span.start_time_unix_nano,
                        end=span.end_time_unix_nano,
                        state=span.trace_state,
                        attributes=_values(span.attributes),
                        events={event.name: event.time_unix_nano for event in span.events},
                        failed=span.status.code == span.status.STATUS_CODE_ERROR,
                        reason=span.status.message,
                        resource=resource,
                    )
                    for span in scope.spans
                ]


def _values(attributes: Any) -> dict[str, Any]:
    return {each.key: getattr(each.value, each.value.WhichOneof("value")) for each in attributes}


@contextmanager
def collector() -> Iterator[Collector]:
    kept = Collector()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            kept.take(self.rfile.read(int(self.headers["content-length"])))
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        kept.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield kept
        finally:
            server.shutdown()
            thread.join()
