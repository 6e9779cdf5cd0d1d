"""Whatever is sent, the answer is a problem that says what was wrong and where, and nothing else breaks."""

import json
import re
import shutil
import socket
from typing import Any

import httpx
import hypothesis.strategies as st
import pytest
from hypothesis import given, settings
from tests.api.conftest import ENDLESS, too_late
from tests.server import PATIENCE_S

from pushforward.api.answers import Problem

JSON = {"content-type": "application/json"}
DENSITY, SAMPLE, ANOMALY = "pair/log_density", "pair/sample", "pair/anomaly"
GIVEN, PATH = "given/log_density", "pair/transport"


def problem(answer: httpx.Response) -> Problem:
    assert answer.headers["content-type"] == "application/problem+json"
    told = Problem.model_validate_json(answer.content)
    assert told.status == answer.status_code
    assert told.type == f"urn:pushforward:error:{told.code}"
    assert told.request_id == answer.headers["x-request-id"]
    for secret in ("Traceback", "/work", "/tmp", "/usr", ".py", "site-packages"):
        assert secret not in answer.text
    return told


@pytest.mark.parametrize(
    ("path", "body", "status", "where", "says"),
    [
        (DENSITY, '{"x": [[1, 2], [3]]}', 422, "x[1]", "has 1 number; a row must have 2: 'age', 'dose'"),
        (DENSITY, '{"x": [[1, 2, 3]]}', 422, "x[0]", "has 3 numbers; a row must have 2"),
        (DENSITY, '{"x": [[]]}', 422, "x[0]", "has 0 numbers"),
        (DENSITY, '{"x": []}', 422, None, "no rows; give at least one"),
        (DENSITY, '{"x": [[1, 2], [3, "a"]]}', 422, "x[1][1]", "must be a number, not 'a'"),
        (DENSITY, '{"x": [["1.5", 2]]}', 422, "x[0][0]", "must be a number, not '1.5'"),
        (DENSITY, '{"x": [[true, 2]]}', 422, "x[0][0]", "must be a number, not true"),
        (DENSITY, '{"x": [[null, 2]]}', 422, "x[0][0]", "must be a number, not null"),
        (DENSITY, '{"x": [1, 2]}', 422, "x[0]", "must be a list, not 1"),
        (DENSITY, '{"x": {"age": 1}}', 422, "x", "must be a list, not an object"),
        (DENSITY, '{"x": [[1, NaN]]}', 422, "x[0][1]", "is nan; 'dose' must be a finite number"),
        (DENSITY, '{"x": [[1, 2], [-Infinity, 2]]}', 422, "x[1][0]", "is -inf; 'age' must be a finite"),
        (DENSITY, '{"x": [[1, 1e999]]}', 422, "x[0][1]", "is inf; 'dose' must be a finite number"),
        (DENSITY, f'{{"x": [[1, {10**400}]]}}', 422, "x[0][1]", "number"),
        (DENSITY, '{"rows": [{"age": 1}]}', 422, "rows[0]", "no value for 'dose'"),
        (DENSITY, '{"rows": [{"age": 1, "dose": 2}, {"age": 1, "dos": 2}]}', 422, "rows[1]", "names 'dos'"),
        (DENSITY, '{"rows": [{"age": 1, "dose": 2, "w": 3}]}', 422, "rows[0]", "names 'w', which the model"),
        (DENSITY, '{"rows": [{"age": 1, "dose": "2"}]}', 422, "rows[0].dose", "must be a number, not '2'"),
        (DENSITY, '{"rows": [{"age": NaN, "dose": 2}]}', 422, "rows[0].age", "is nan"),
        (DENSITY, '{"rows": [[1, 2]]}', 422, "rows[0]", "object"),
        (DENSITY, '{"x": [[1, 2]], "rows": [{"age": 1, "dose": 2}]}', 422, None, "not both"),
        (DENSITY, "{}", 422, None, "Give x (rows of numbers) or rows"),
        (DENSITY, "[]", 422, None, "object"),
        (DENSITY, '{"x": [[1, 2]], "rtoll": 1}', 422, "rtoll", "no field 'rtoll'; the fields are rtol,"),
        (DENSITY, '{"x": [[1, 2]], "rtol": 0}', 422, "rtol", "must be at least 1e-13, not 0"),
        (DENSITY, '{"x": [[1, 2]], "rtol": -1e-3}', 422, "rtol", "must be at least 1e-13"),
        (DENSITY, '{"x": [[1, 2]], "atol": 5}', 422, "atol", "must be at most 0.1, not 5"),
        (DENSITY, '{"x": [[1, 2]], "rtol": NaN}', 422, "rtol", "not nan"),
        (DENSITY, '{"x": [[1, 2]], "atol": "small"}', 422, "atol", "must be a number, not 'small'"),
        (DENSITY, '{"x": [[1, 2]], "max_steps": 0}', 422, "max_steps", "must be at least 1"),
        (DENSITY, '{"x": [[1, 2]], "precision": "float16"}', 422, "precision", "'float32' or 'float64'"),
        (DENSITY, '{"x": [[1, 2]], "timeout_ms": 0}', 422, "timeout_ms", "must be at least 1"),
        (DENSITY, '{"x": [[1, 2]], "timeout_ms": 99999999}', 422, "timeout_ms", "600000 at most"),
        (DENSITY, '{"x": [[1, 2]], "context": [[1]]}', 422, "context", "takes no context"),
        (GIVEN, '{"x": [[1, 2]]}', 422, "context", "is conditional: give context, with 'shift'"),
        (GIVEN, '{"x": [[1, 2]], "context": [[1], [2]]}', 422, "context", "must have 1, for all rows"),
        (GIVEN, '{"x": [[1, 2]], "context": [[1, 2]]}', 422, "context[0]", "a row must have 1: 'shift'"),
        (GIVEN, '{"x": [[1, 2]], "context": [{"c": 1}]}', 422, "context[0]", "no value for 'shift'"),
        (GIVEN, '{"x": [[1, 2]], "context": [["a"]]}', 422, "context[0][0]", "must be a number, not 'a'"),
        (GIVEN, '{"x": [[1, 2]], "context": [{"shift": "a"}]}', 422, "context[0].shift", "must be a number"),
        (GIVEN, '{"x": [[1, 2]], "context": []}', 422, "context", "context has 0 rows"),
        (SAMPLE, '{"n": 0}', 422, "n", "must be at least 1, not 0"),
        (SAMPLE, '{"n": -5}', 422, "n", "must be at least 1, not -5"),
        (SAMPLE, '{"n": 2.5}', 422, "n", "must be a whole number, not 2.5"),
        (SAMPLE, '{"n": "3"}', 422, "n", "must be a whole number, not '3'"),
        (SAMPLE, '{"n": 100001}', 422, "n", "may ask for 100000 samples at most"),
        (SAMPLE, f'{{"n": {10**30}}}', 422, "n", "100000 samples at most"),
        (SAMPLE, '{"seed": -1}', 422, "seed", "must be at least 0"),
        (SAMPLE, f'{{"seed": {2**64}}}', 422, "seed", "must be at most"),
        (SAMPLE, '{"temperature": 0}', 422, "temperature", "must be more than 0"),
        (SAMPLE, '{"return_log_density": 1}', 422, "return_log_density", "must be true or false, not 1"),
        (ANOMALY, '{"x": [[1, 2]], "alpha": 1}', 422, "alpha", "must be less than 1"),
        (ANOMALY, '{"x": [[1, 2]], "alpha": 0.1, "fdr": 0.1}', 422, "fdr", "alpha or fdr, not both"),
        (PATH, '{"x": [[1, 2]], "z": [[1, 2]]}', 422, None, "Give one of x, rows and z"),
        (PATH, '{"z": [[1, 2, 3]]}', 422, "z[0]", "has 3 numbers"),
        (PATH, '{"x": [[1, 2]], "times": [0.5, 1.5]}', 422, "times[1]", "times go from 0.0 to 1.0"),
        (PATH, '{"x": [[1, 2]], "times": [NaN]}', 422, "times[0]", "times go from"),
        (PATH, '{"x": [[1, 2]], "times": []}', 422, "times", "at least 1"),
        (PATH, '{"x": [[1, 2]], "times": [0.5], "return_log_density": true}', 422, None, "on the way"),
        (DENSITY, '{"x": [[1, 2]', 400, None, "not JSON"),
        (DENSITY, "", 400, None, "not JSON"),
        (DENSITY, "\ufeff{}", 400, None, "not JSON"),
        (DENSITY, '{"x": ' + "[" * 5000, 400, None, "not JSON"),
        ("pear/log_density", '{"x": [[1, 2]]}', 404, None, "no model 'pear': there is pair"),
        ("..%2f..%2fetc/log_density", '{"x": [[1, 2]]}', 404, None, "no"),
        ("pair/versions/9/log_density", '{"x": [[1, 2]]}', 404, None, "has no version or label '9'"),
        ("pair/versions/blue/sample", "{}", 404, None, "has no version or label 'blue': it has 1, 2, old"),
        ("pair/versions/-1/sample", "{}", 404, None, "'-1'"),
        ("pair/integrate", "{}", 404, None, "/docs describes what there is"),
    ],
)
def test_bad_input_is_a_clear_4xx(
    client: httpx.Client, path: str, body: str, status: int, where: str | None, says: str
) -> None:
    answer = client.post(f"/v1/models/{path}", content=body, headers=JSON)
    told = problem(answer)
    assert (told.status, told.where) == (status, where)
    assert says in told.detail


def test_not_found_lists_what_there_is(client: httpx.Client) -> None:
    told = json.loads(client.post("/v1/models/zzz/sample", json={}).content)
    assert told["known"] == ["given", "pair", "positive"]


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", "/v1/models/pair/sample", "POST"),
        ("PUT", "/v1/models/pair/versions/1/log_density", "POST"),
        ("POST", "/v1/models", "GET, HEAD"),
        ("DELETE", "/health/ready", "GET, HEAD"),
    ],
)
def test_a_wrong_method_is_told_the_right_one(
    client: httpx.Client, method: str, path: str, allowed: str
) -> None:
    answer = client.request(method, path)
    assert (problem(answer).status, answer.headers["allow"]) == (405, allowed)


@pytest.mark.parametrize("path", ["/", "/v1", "/v2/models/pair", "/docs/", "/v1/models/pair/", "/%00"])
def test_a_path_that_is_not_there_is_a_404(client: httpx.Client, path: str) -> None:
    assert problem(client.get(path)).code == "no-such-path"


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"content-type": "text/csv"}, 415),
        ({"content-type": "application/x-www-form-urlencoded"}, 415),
        ({"content-type": "application/json; charset=latin-1"}, 415),
        ({"content-type": "application/json", "content-encoding": "gzip"}, 415),
        ({"content-type": "application/json; charset=UTF-8"}, 200),
        ({"content-type": "application/json", "content-encoding": "identity"}, 200),
        ({}, 200),
    ],
)
def test_the_content_type_has_to_be_json(client: httpx.Client, headers: dict[str, str], status: int) -> None:
    answer = client.post("/v1/models/pair/log_density", content=b'{"x": [[1, 2]]}', headers=headers)
    assert answer.status_code == status
    if status == 415:
        assert "accept" in answer.headers or "accept-encoding" in answer.headers
        problem(answer)


def test_a_body_that_is_too_large_is_refused_before_it_is_sent(server: Any, start: Any) -> None:
    small = start("--max-body-bytes", "2048")
    host, port = small.url.removeprefix("http://").split(":")
    head = "POST /v1/models/pair/log_density HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    for rest in (
        f"{head}content-length: 1000000000\r\n\r\n",  # of which not a byte is sent
        f"{head}transfer-encoding: chunked\r\n\r\n" + f"1000\r\n{' ' * 4096}\r\n",  # and no end
    ):
        with socket.create_connection((host, int(port)), timeout=PATIENCE_S) as connection:
            connection.sendall(rest.encode())
            answer = b""
            while piece := connection.recv(65536):  # the server closes: it does not want the rest
                answer += piece
        status, _, body = answer.partition(b"\r\n\r\n")
        assert status.startswith(b"HTTP/1.1 413 ")
        assert b"connection: close" in status.lower()
        told = json.loads(body)
        assert told["code"] == "body-too-large"
        assert "2048 bytes" in told["detail"]
    with small.client() as client:
        assert client.post("/v1/models/pair/log_density", json={"x": [[1, 2]]}).status_code == 200
    small.stop()


def test_more_rows_than_allowed_are_refused_however_they_are_made(start: Any) -> None:
    small = start("--max-rows", "20", "--max-samples", "10")
    with small.client() as client:

        def refused(path: str, **body: Any) -> str:
            answer = client.post(f"/v1/models/{path}", json=body)
            assert answer.status_code == 422
            assert problem(answer).code == "limit-exceeded"
            return problem(answer).detail

        rows = [[0.0, 0.0]] * 21
        assert refused("pair/log_density", x=rows) == (
            "21 rows are more than one request may have integrated: 20."
        )
        assert "2 rows, each 11 times" in refused("pair/anomaly", x=rows[:2], explain=True)
        assert "7 rows, each 3 times" in refused("pair/transport", z=rows[:7], times=[0.1, 0.2, 0.3])
        assert "10 samples at most" in refused("pair/sample", n=11)
        assert client.post("/v1/models/pair/log_density", json={"x": rows[:20]}).status_code == 200
    small.stop()


def test_a_deadline_that_passes_is_a_504_that_says_how_far_it_came(client: httpx.Client) -> None:
    body = ENDLESS | {"n": 100_000}

    def ask(timeout_ms: int) -> httpx.Response:
        return client.post("/v1/models/positive/sample", json=body | {"timeout_ms": timeout_ms})

    answer, _ = too_late(ask, "nfe")
    told = problem(answer)
    assert told.code == "deadline-exceeded"
    assert "Raise timeout_ms" in told.detail
    content = answer.json()
    assert content["rows"] == 100_000
    assert 0 <= content["solved"] < 100_000


def test_a_model_that_was_edited_is_not_served_and_the_others_are(
    start: Any, store: Any, tmp_path: Any
) -> None:
    copy = tmp_path / "store"
    shutil.copytree(store, copy)
    weights = copy / "given" / "1" / "programs" / "decode.onnx"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\0")
    (copy / "positive" / "1" / "manifest.json").write_text("{}")
    broken = start("--store", str(copy), at=copy)
    with broken.client() as client:
        told = problem(client.post("/v1/models/given/log_density", json={"x": [[0, 0]], "context": [[0]]}))
        assert (told.status, told.code) == (503, "invalid-model")
        assert "given/1/programs/decode.onnx" in told.detail
        assert problem(client.get("/v1/models/positive")).code == "invalid-model"
        listed = {model["name"]: model for model in client.get("/v1/models").json()["models"]}
        assert "positive/1/manifest.json" in listed["positive"]["fault"]
        assert client.post("/v1/models/pair/log_density", json={"x": [[0, 0]]}).status_code == 200
    events = [line["event"] for line in broken.log]
    assert "model failed to load" in events
    assert "model cannot be served" in events
    broken.stop()


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=8,
)
FIELDS = ["x", "rows", "z", "context", "n", "seed", "times", "alpha", "fdr", "explain", "rtol", "timeout_ms"]


@settings(max_examples=150)
@given(
    operation=st.sampled_from(["log_density", "anomaly", "sample", "transport"]),
    body=st.dictionaries(st.sampled_from(FIELDS), json_values, max_size=4)
    | st.fixed_dictionaries({"x": st.lists(st.lists(st.floats(), max_size=3), max_size=3)}),
    cut=st.none() | st.integers(0, 60),
)
def test_no_body_is_a_server_error(
    client: httpx.Client, operation: str, body: dict[str, Any], cut: int | None
) -> None:
    text = json.dumps(body)[:cut]
    answer = client.post(f"/v1/models/pair/{operation}", content=text, headers=JSON)
    statuses = (200, 400, 422, 504) if "timeout_ms" in body else (200, 400, 422)
    assert answer.status_code in statuses, text
    if answer.status_code != 200:
        assert re.search(r"\w", problem(answer).detail)
