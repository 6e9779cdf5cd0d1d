"""What happens to a request between its bytes and its handler, and when the handler fails."""

import asyncio
import json
from typing import Any

import pytest

from pushforward.api.reader import Reader
from pushforward.api.schemas import SampleRequest
from pushforward.api.wire import Call, Door, Endpoint
from pushforward.dataplane import Admission, Limits
from pushforward.metrics import Metrics

SCOPE = {
    "type": "http",
    "method": "POST",
    "path": "/v1/models/m/sample",
    "path_params": {"model": "m"},
    "headers": [(b"content-type", b"application/json")],
}


def door(**limits: Any) -> Door:
    admission = Admission(1000, 1000)
    known = {"rows": 10, "samples": 10, "timeout_ms": 60_000, "max_timeout_ms": 90_000}
    chunks = {"chunk_rows": 8, "interactive_rows": 8}
    return Door(admission, Limits(**(known | chunks | limits)), Metrics(admission), 100, Reader())


def send(
    endpoint: Endpoint[SampleRequest],
    *messages: dict[str, Any],
    headers: tuple[Any, ...] = (),
    others: int = 0,
) -> list[Any]:
    """What comes of a request; after its messages the client stays, and is silent."""
    sent: list[Any] = []

    async def run() -> None:
        waiting = iter(messages)

        async def receive() -> Any:
            for message in waiting:
                return message
            return await asyncio.get_running_loop().create_future()

        async def send(message: Any) -> None:
            sent.append(message)

        await endpoint({**SCOPE, "headers": [*SCOPE["headers"], *headers]}, receive, send)
        await asyncio.sleep(0)  # the log's turn

    asyncio.run(run())
    admission = endpoint._door.admission
    assert (admission.rows, admission.nbytes) == (0, others)
    return sent


def ask(
    endpoint: Endpoint[SampleRequest],
    *messages: dict[str, Any],
    headers: tuple[Any, ...] = (),
    others: int = 0,
) -> tuple[int, dict[bytes, bytes], Any]:
    start, body = send(endpoint, *messages, headers=headers, others=others)
    return start["status"], dict(start["headers"]), json.loads(body["body"])


def part(body: bytes, more: bool) -> dict[str, Any]:
    return {"type": "http.request", "body": body, "more_body": more}


CHUNKED = ((b"transfer-encoding", b"chunked"),)


async def echo(call: Call, query: SampleRequest) -> Any:
    return {"n": query.n, "model": call.path["model"]}


def test_a_body_may_come_in_parts() -> None:
    endpoint = Endpoint(echo, door(), SampleRequest)
    parts = part(b'{"n"', True), part(b"", True), part(b": 3}", False)
    status, headers, content = ask(endpoint, *parts, headers=CHUNKED)
    assert (status, content) == (200, {"n": 3, "model": "m"})
    assert int(headers[b"content-length"]) == len(b'{"n":3,"model":"m"}\n')


def test_a_body_whose_sender_leaves_is_not_taken_for_a_whole_one() -> None:
    endpoint = Endpoint(echo, door(), SampleRequest)
    assert send(endpoint, part(b'{"n": 3}', True), {"type": "http.disconnect"}, headers=CHUNKED) == []
    assert endpoint._door.metrics.requests.outcomes == {("echo", "cancelled", ""): 1}


def test_a_body_that_does_not_come_is_waited_for_until_the_deadline() -> None:
    endpoint = Endpoint(echo, door(timeout_ms=50), SampleRequest)
    status, _, content = ask(endpoint, part(b'{"n"', True), headers=CHUNKED)
    assert (status, content["code"]) == (504, "deadline-exceeded")
    assert "The deadline of 50 ms passed before the whole body had arrived" in content["detail"]
    assert endpoint._door.metrics.requests.outcomes == {("echo", "expired", "deadline-exceeded"): 1}


@pytest.mark.parametrize(
    ("value", "status", "says"),
    [
        (b"soon", 422, "X-Timeout-Ms is 'soon'; it must be a whole number of milliseconds, at least 1."),
        (b"0", 422, "X-Timeout-Ms is '0'; it must be"),
        (b"-5", 422, "X-Timeout-Ms is '-5'; it must be"),
        (b"1.5", 422, "X-Timeout-Ms is '1.5'; it must be"),
        (b"\xb2", 422, "it must be"),
        (b"9" * 5000, 422, "it must be"),
        (b"90001", 422, "X-Timeout-Ms is 90001; it may be 90000 at most."),
        (b" 90000 ", 200, ""),
    ],
)
def test_a_deadline_in_the_headers_is_a_number_of_milliseconds(value: bytes, status: int, says: str) -> None:
    endpoint = Endpoint(echo, door(), SampleRequest)
    headers = ((b"x-timeout-ms", value), *CHUNKED)
    got, _, content = ask(endpoint, part(b'{"n": 3}', False), headers=headers)
    assert got == status
    if status != 200:
        assert content["where"] == "X-Timeout-Ms"
        assert says in content["detail"]


def test_bytes_are_held_before_they_are_read() -> None:
    held: list[int] = []

    async def look(call: Call, query: SampleRequest) -> Any:
        held.append(shared.admission.nbytes)
        return {}

    shared = door()
    ask(Endpoint(look, shared, SampleRequest), part(b'{"n": 3}', False), headers=CHUNKED)
    assert held == [8]  # once it is known
    with shared.admission.admit(0, 901):
        for headers in (CHUNKED, ((b"content-length", b"100"),)):
            status, told, content = ask(Endpoint(look, shared, SampleRequest), headers=headers, others=901)
            assert (status, content["reason"], told[b"retry-after"]) == (503, "bytes", b"1")
            assert (content["asked"], content["depth"], content["limit"]) == (100, 901, 1000)
    assert held == [8]  # nothing was read


def test_parts_are_counted_together() -> None:
    endpoint = Endpoint(echo, door(), SampleRequest)
    status, headers, content = ask(endpoint, part(b" " * 60, True), part(b" " * 60, True), headers=CHUNKED)
    assert (status, content["code"]) == (413, "body-too-large")
    assert headers[b"connection"] == b"close"


def test_a_client_that_hangs_up_ends_its_handler_and_is_sent_nothing() -> None:
    ended: list[str] = []

    async def endless(call: Call, query: SampleRequest) -> Any:
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            ended.append(call.id)

    endpoint = Endpoint(endless, door(), SampleRequest)
    assert send(endpoint, part(b"{}", False), {"type": "http.disconnect"}, headers=CHUNKED) == []
    assert len(ended) == 1
    assert endpoint._door.metrics.requests.outcomes == {("endless", "cancelled", ""): 1}


def test_a_request_that_is_cancelled_from_within_is_no_hang_up() -> None:
    async def cancelled(call: Call, query: SampleRequest) -> Any:
        raise asyncio.CancelledError

    endpoint = Endpoint(cancelled, door(), SampleRequest)
    with pytest.raises(asyncio.CancelledError):
        send(endpoint, part(b"{}", False), headers=CHUNKED)
    assert endpoint._door.metrics.requests.in_flight == 0


def test_a_mistake_of_ours_is_logged_and_not_told(caplog: pytest.LogCaptureFixture) -> None:
    async def mistaken(call: Call, query: SampleRequest) -> Any:
        raise ZeroDivisionError("the secret")

    status, headers, content = ask(
        Endpoint(mistaken, door(), SampleRequest), part(b"{}", False), headers=CHUNKED
    )
    assert (status, content["code"]) == (500, "internal-error")
    assert "secret" not in json.dumps(content)
    assert headers[b"content-type"] == b"application/problem+json"
    (record,) = [record for record in caplog.records if record.exc_info]
    assert record.exc_info is not None
    assert isinstance(record.exc_info[1], ZeroDivisionError)
    assert record.fields["request"] == content["request_id"]  # type: ignore[attr-defined]
