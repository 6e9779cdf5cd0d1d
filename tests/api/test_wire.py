"""What happens to a request between its bytes and its handler, and when the handler fails."""

import asyncio
import json
from typing import Any

import pytest

from pushforward.api.schemas import SampleRequest
from pushforward.api.wire import Call, Endpoint

SCOPE = {
    "type": "http",
    "method": "POST",
    "path": "/v1/models/m/sample",
    "path_params": {"model": "m"},
    "headers": [(b"content-type", b"application/json")],
}


def ask(endpoint: Endpoint[SampleRequest], *messages: dict[str, Any]) -> tuple[int, dict[bytes, bytes], Any]:
    sent: list[Any] = []

    async def run() -> None:
        waiting = iter(messages)

        async def receive() -> Any:
            return next(waiting)

        async def send(message: Any) -> None:
            sent.append(message)

        await endpoint(SCOPE, receive, send)
        await asyncio.sleep(0)  # the log's turn

    asyncio.run(run())
    start, body = sent
    return start["status"], dict(start["headers"]), json.loads(body["body"])


def part(body: bytes, more: bool) -> dict[str, Any]:
    return {"type": "http.request", "body": body, "more_body": more}


async def echo(call: Call, query: SampleRequest) -> Any:
    return {"n": query.n, "model": call.path["model"]}


def test_a_body_may_come_in_parts() -> None:
    endpoint = Endpoint(echo, SampleRequest, 100)
    status, headers, content = ask(endpoint, part(b'{"n"', True), part(b"", True), part(b": 3}", False))
    assert (status, content) == (200, {"n": 3, "model": "m"})
    assert int(headers[b"content-length"]) == len(b'{"n":3,"model":"m"}\n')


def test_a_body_whose_sender_leaves_is_not_taken_for_a_whole_one() -> None:
    endpoint = Endpoint(echo, SampleRequest, 100)
    status, _, content = ask(endpoint, part(b'{"n": 3}', True), {"type": "http.disconnect"})
    assert (status, content["code"]) == (400, "incomplete-body")


def test_parts_are_counted_together() -> None:
    endpoint = Endpoint(echo, SampleRequest, 100)
    status, headers, content = ask(endpoint, part(b" " * 60, True), part(b" " * 60, True))
    assert (status, content["code"]) == (413, "body-too-large")
    assert headers[b"connection"] == b"close"


def test_a_mistake_of_ours_is_logged_and_not_told(caplog: pytest.LogCaptureFixture) -> None:
    async def mistaken(call: Call, query: SampleRequest) -> Any:
        raise ZeroDivisionError("the secret")

    status, headers, content = ask(Endpoint(mistaken, SampleRequest, 100), part(b"{}", False))
    assert (status, content["code"]) == (500, "internal-error")
    assert "secret" not in json.dumps(content)
    assert headers[b"content-type"] == b"application/problem+json"
    (record,) = [record for record in caplog.records if record.exc_info]
    assert record.exc_info is not None
    assert isinstance(record.exc_info[1], ZeroDivisionError)
    assert record.fields["request"] == content["request_id"]  # type: ignore[attr-defined]
