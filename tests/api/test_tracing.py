"""Traces as a collector gets them, of servers with workers as users start them."""

import json
import os
import shutil
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families
from tests.api.conftest import ENDLESS, SLOW, rows_running
from tests.collector import Collector, Span, collector
from tests.poison import poison
from tests.server import Server, Start, until

SERVER, PRODUCER, CONSUMER = 2, 4, 5
TRACE = "0af7651916cd43dd8448eb211c80319c"
VARIABLES = {"OTEL_SERVICE_NAME": "flows", "OTEL_BSP_SCHEDULE_DELAY": "50"}


@pytest.fixture(scope="module")
def moons(tmp_path_factory: pytest.TempPathFactory, checkout: Path) -> Path:
    """A store with moons/1 alone."""
    store = tmp_path_factory.mktemp("store")
    shutil.copytree(checkout / "model_store" / "moons" / "1", store / "moons" / "1")
    return store


def starting(start: Start, at: Path, url: str, *flags: str, **variables: str) -> Server:
    """A server that sends traces to an address."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (VARIABLES | variables | {"OTEL_EXPORTER_OTLP_ENDPOINT": url}).items():
            patch.setenv(name, value)
        return start("--tracing", *flags, at=at)


@pytest.fixture(scope="module")
def collected() -> Iterator[Collector]:
    with collector() as kept:
        yield kept


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory, moons: Path, store: Path) -> Path:
    """A store with moons/1, and the model that takes long."""
    both = tmp_path_factory.mktemp("both")
    shutil.copytree(moons, both, dirs_exist_ok=True)
    shutil.copytree(store / "positive", both / "positive")
    return both


@pytest.fixture(scope="module")
def server(start: Start, both: Path, collected: Collector) -> Iterator[Server]:
    server = starting(start, both, collected.url, "--chunk-rows", "100")
    yield server
    server.stop()


def ask(server: Server, path: str, body: Any, trace: str = TRACE, **headers: str) -> httpx.Response:
    headers = {"traceparent": f"00-{trace}-00f067aa0ba902b7-01"} | headers
    with server.client() as client:
        return client.post(f"/v1/models/{path}", json=body, headers=headers, timeout=None)


def finished(spans: list[Span]) -> bool:
    """Whether the request's own span is there, which its process ends last, and a solve for every chunk."""
    names = [span.name for span in spans]
    return any(name.startswith("POST") for name in names) and names.count("chunk") == names.count("solve")


def named(spans: list[Span], name: str) -> Span:
    (found,) = [span for span in spans if span.name.startswith(name)]
    return found


def test_one_request_is_one_trace_from_the_client_to_the_step(server: Server, collected: Collector) -> None:
    answer = ask(server, "moons/log_density", {"x": [[0, 0], [1, 1]]}, tracestate="vendor=1")
    request, chunk, solve = collected.trace(TRACE, lambda spans: finished(spans) and len(spans) == 3)
    assert [span.name for span in (request, chunk, solve)] == [
        "POST /v1/models/{model}/log_density",
        "chunk",
        "solve",
    ]
    assert (request.kind, chunk.kind, solve.kind) == (SERVER, PRODUCER, CONSUMER)
    assert (request.parent, chunk.parent, solve.parent) == ("00f067aa0ba902b7", request.id, chunk.id)
    assert {request.state, chunk.state, solve.state} == {"vendor=1"}
    assert not any(span.failed for span in (request, chunk, solve))
    moments = [
        request.begin,
        request.events["admitted"],
        chunk.events["queued"],
        solve.begin,
        solve.events["first step"],
        solve.events["last step"],
        chunk.end,
        request.events["reply"],
        request.end,
    ]
    assert moments == sorted(moments)

    content = answer.json()
    attributes = request.attributes
    assert attributes["http.request.method"] == "POST"
    assert attributes["http.route"] == "/v1/models/{model}/log_density"
    assert attributes["http.response.status_code"] == 200
    assert attributes["url.path"] == "/v1/models/moons/log_density"
    assert attributes["pushforward.request"] == answer.headers["x-request-id"]
    assert (attributes["pushforward.model"], attributes["pushforward.version"]) == (
        "moons",
        content["version"],
    )
    assert (attributes["pushforward.rows"], attributes["pushforward.solved"]) == (2, 2)
    assert attributes["pushforward.outcome"] == "answered"
    assert f"http://{attributes['server.address']}:{attributes['server.port']}" == server.url
    for span in (request, chunk, solve):
        assert span.attributes["pushforward.steps"] == sum(content["steps"])
        assert span.attributes["pushforward.nfe"] == sum(content["nfe"])
    assert (chunk.attributes["pushforward.attempts"], solve.attributes["pushforward.attempt"]) == (1, 1)
    assert request.resource["process.pid"] == server.process.pid
    assert solve.resource["process.pid"] == server.worker()
    assert {request.resource["service.name"], solve.resource["service.name"]} == {"flows"}


def test_the_log_and_the_metrics_name_the_trace(server: Server) -> None:
    trace = f"{2:032x}"
    ask(server, "moons/sample", {"n": 1}, trace)
    assert until(lambda: any(line.get("trace_id") == trace for line in server.log))
    accept = {"accept": "application/openmetrics-text; version=1.0.0"}
    with server.client() as client:
        text = client.get("/metrics", headers=accept).text
    exemplars = {
        sample.exemplar.labels["trace_id"]
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.exemplar is not None
    }
    assert trace in exemplars


def test_every_chunk_of_a_long_request_has_its_spans(server: Server, collected: Collector) -> None:
    trace = f"{3:032x}"
    assert ask(server, "moons/sample", {"n": 450}, trace).status_code == 200
    spans = collected.trace(trace, lambda spans: finished(spans) and len(spans) == 11)
    request = named(spans, "POST")
    chunks = {span.id: span for span in spans if span.name == "chunk"}
    solves = [span for span in spans if span.name == "solve"]
    assert {chunk.parent for chunk in chunks.values()} == {request.id}
    assert {solve.parent for solve in solves} == chunks.keys()
    assert sorted(chunk.attributes["pushforward.rows"] for chunk in chunks.values()) == [
        50,
        100,
        100,
        100,
        100,
    ]
    for solve in solves:
        assert solve.attributes["pushforward.chunk"] == chunks[solve.parent].attributes["pushforward.chunk"]
        assert solve.begin <= solve.events["first step"] <= solve.events["last step"] <= solve.end


def test_a_bad_request_is_told_and_no_error_of_the_server(server: Server, collected: Collector) -> None:
    trace = f"{4:032x}"
    assert ask(server, "moons/log_density", {"x": [[0, 0, 0]]}, trace).status_code == 422
    (request,) = collected.trace(trace, finished)
    assert request.attributes["http.response.status_code"] == 422
    assert request.attributes["pushforward.outcome"] == "failed"
    assert request.attributes["pushforward.code"] == "invalid-input"
    assert not request.failed
    assert request.events.keys() == {"reply"}


@pytest.mark.parametrize("host", ["", "[::1]", "[::1]:80", "a:b:123456", "a:\xb2"])
def test_headers_that_make_no_sense_begin_a_trace_of_their_own(
    server: Server, collected: Collector, host: str
) -> None:
    before = len(collected.spans)
    odd = {"traceparent": "00-nonsense", "tracestate": "=,,=", "host": host.encode("latin-1")}
    with server.client() as client:
        answer = client.post("/v1/models/moons/sample", json={"n": 1}, headers=odd)  # type: ignore[arg-type]
    assert answer.status_code == 200

    def mine() -> list[Span]:
        ids = answer.headers["x-request-id"]
        return [s for s in collected.spans[before:] if s.attributes.get("pushforward.request") == ids]

    assert until(lambda: bool(mine()))
    (request,) = mine()
    assert request.parent == ""
    shown = request.attributes["server.address"]
    assert host in (shown, f"{shown}:{request.attributes.get('server.port')}")


def test_a_deadline_is_an_error_of_all_three(server: Server, collected: Collector) -> None:
    trace = f"{5:032x}"
    answer = ask(server, "positive/sample", ENDLESS | {"n": 100, "timeout_ms": 1000}, trace)
    assert answer.status_code == 504
    spans = collected.trace(trace, lambda spans: finished(spans) and len(spans) == 3)
    assert all(span.failed for span in spans)
    assert {named(spans, name).reason for name in ("chunk", "solve")} == {"the deadline passed"}
    assert named(spans, "POST").attributes["error.type"] == "deadline-exceeded"


def test_a_client_that_hangs_up_cancels_its_spans(server: Server, collected: Collector) -> None:
    trace = f"{6:032x}"
    body = json.dumps(ENDLESS | {"n": 100}).encode()
    head = (
        f"POST /v1/models/positive/sample HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
        f"traceparent: 00-{trace}-00f067aa0ba902b7-01\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    assert until(lambda: rows_running(server) == 0)  # of an earlier test
    with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2]))) as sock:
        sock.sendall(head.encode() + body)
        assert until(lambda: rows_running(server) > 0)
    assert until(lambda: server.metrics()["pushforward_requests_in_flight",] == 0)
    spans = collected.trace(trace, lambda spans: finished(spans) and len(spans) == 3)
    assert all(span.failed for span in spans)
    assert {named(spans, name).reason for name in ("chunk", "solve")} == {"cancelled"}


def test_an_unsampled_client_is_followed(server: Server, collected: Collector) -> None:
    first, second = f"{7:032x}", f"{8:032x}"
    ask(server, "moons/sample", {"n": 1}, traceparent=f"00-{first}-00f067aa0ba902b7-00")
    ask(server, "moons/sample", {"n": 1}, second)
    collected.trace(second, lambda spans: finished(spans) and len(spans) == 3)
    assert not any(span.trace == first for span in collected.spans)
    assert until(lambda: any(line.get("trace_id") == first for line in server.log))


def test_a_chunk_of_a_killed_worker_shows_that_it_was_tried_again(
    server: Server, collected: Collector
) -> None:
    trace, victim = f"{9:032x}", server.worker()
    assert until(lambda: rows_running(server) == 0)  # of an earlier test
    asking = threading.Thread(target=ask, args=(server, "positive/sample", SLOW, trace))
    asking.start()
    assert until(lambda: rows_running(server) > 0)
    os.kill(victim, signal.SIGKILL)
    asking.join()
    spans = collected.trace(trace, lambda spans: finished(spans) and len(spans) == 3)
    chunk, solve = named(spans, "chunk"), named(spans, "solve")
    assert (chunk.attributes["pushforward.attempts"], solve.attributes["pushforward.attempt"]) == (2, 2)
    assert solve.resource["process.pid"] != victim
    assert not named(spans, "POST").failed


def test_rows_that_break_the_engine_show_every_attempt(
    start: Start, moons: Path, collected: Collector, tmp_path: Path
) -> None:
    shutil.copytree(moons, tmp_path / "store")
    poison(tmp_path / "store" / "moons" / "1", "raise")
    server = starting(start, tmp_path / "store", collected.url)
    trace = f"{10:032x}"
    assert ask(server, "moons/log_density", {"x": [[1e9, 0]]}, trace).status_code == 500
    spans = collected.trace(
        trace, lambda spans: len(spans) == 5 and any(span.name.startswith("POST") for span in spans)
    )
    solves = [span for span in spans if span.name == "solve"]
    assert [span.attributes["pushforward.attempt"] for span in solves] == [1, 2, 3]
    assert len({span.resource["process.pid"] for span in solves}) == 3
    assert all(span.failed for span in spans)
    assert named(spans, "chunk").attributes["pushforward.attempts"] == 3
    server.stop()


def test_what_was_not_sent_is_sent_at_the_end(start: Start, moons: Path, collected: Collector) -> None:
    server = starting(start, moons, collected.url, OTEL_BSP_SCHEDULE_DELAY="3600000")
    trace = f"{11:032x}"
    ask(server, "moons/sample", {"n": 1}, trace)
    assert server.stop() == 0
    assert len([span for span in collected.spans if span.trace == trace]) == 3


def test_without_a_collector_answers_go_on_and_the_log_says_it_once(start: Start, moons: Path) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{nobody.getsockname()[1]}"
        server = starting(start, moons, url, OTEL_EXPORTER_OTLP_TIMEOUT="2")  # one repetition
        assert ask(server, "moons/sample", {"n": 1}).status_code == 200
        told = [server.wait_for("traces are lost"), server.wait_for("traces are lost")]
        assert {line["pid"] for line in told} == {server.process.pid, server.worker()}
        assert all("refused" in line["reason"] for line in told)
        for _ in range(3):
            assert ask(server, "moons/sample", {"n": 1}).status_code == 200
        assert server.stop() == 0
    assert [line["event"] for line in server.log].count("traces are lost") == 2


def test_nothing_is_traced_unless_it_is_switched_on(start: Start, moons: Path, collected: Collector) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collected.url)
        server = start(at=moons)
    trace = f"{12:032x}"
    ask(server, "moons/sample", {"n": 1}, trace)
    assert server.stop() == 0
    assert not any(span.trace == trace for span in collected.spans)
    assert not any("trace_id" in line for line in server.log)
