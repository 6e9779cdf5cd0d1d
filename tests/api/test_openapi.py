"""The OpenAPI document says what the server does, neither more nor less."""

import re
from typing import Any

import httpx
import pytest
from jsonschema import Draft202012Validator

from pushforward.api.app import operations
from pushforward.api.routes import Routes

NAMES = {"model": "pair", "version": "1"}


@pytest.fixture(scope="session")
def document(client: httpx.Client) -> dict[str, Any]:
    return client.get("/openapi.json").json()


def validator(document: dict[str, Any], schema: dict[str, Any]) -> Draft202012Validator:
    """Checks against a schema of the document, whose references point into the document."""
    return Draft202012Validator({**schema, "components": document["components"]})


def operations_of(document: dict[str, Any]) -> list[tuple[str, str, dict[str, Any]]]:
    return [
        (method, path, operation)
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    ]


def test_every_operation_is_described(document: dict[str, Any]) -> None:
    served = {(one.method.lower(), one.path) for one in operations(Routes(None))}  # type: ignore[arg-type]
    assert {(method, path) for method, path, _ in operations_of(document)} == served
    ids = [operation["operationId"] for _, _, operation in operations_of(document)]
    assert len(ids) == len(set(ids))
    for schema in document["components"]["schemas"].values():
        Draft202012Validator.check_schema(schema)


def test_examples_are_valid_and_their_answers_are_as_described(
    client: httpx.Client, document: dict[str, Any]
) -> None:
    asked = 0
    for method, path, operation in operations_of(document):
        if "200" not in operation["responses"]:
            continue  # an order, which would change what the other tests find
        answer_schema = operation["responses"]["200"]["content"]["application/json"]["schema"]
        bodies: list[Any] = [None]
        if "requestBody" in operation:
            reference = operation["requestBody"]["content"]["application/json"]["schema"]
            schema = document["components"]["schemas"][reference["$ref"].rpartition("/")[2]]
            bodies = schema["examples"]
            for body in bodies:
                validator(document, reference).validate(body)
        for body in bodies:
            answer = client.request(method, path.format(**NAMES), json=body)
            assert answer.status_code == 200, answer.text
            validator(document, answer_schema).validate(answer.json())
            asked += 1
    assert asked >= 15


@pytest.mark.parametrize(
    "answer",
    [
        ("pair/log_density", {"x": [[1e300, 0], [0, 0]]}),
        ("positive/anomaly", {"x": [[-1, 1], [1, 1]], "explain": True, "fdr": 0.1}),
        ("pair/transport", {"x": [[1e300, 0], [0, 0]], "times": [0.5]}),
        ("positive/transport", {"x": [[-1, 1], [1, 1]], "return_log_density": True}),
        ("pair/log_density", {"x": [[1, 2, 3]]}),
        ("pear/log_density", {"x": [[1, 2, 3]]}),
    ],
)
def test_failing_rows_and_errors_are_as_described(
    client: httpx.Client, document: dict[str, Any], answer: tuple[str, dict[str, Any]]
) -> None:
    path, body = answer
    got = client.post(f"/v1/models/{path}", json=body)
    operation = document["paths"][f"/v1/models/{{model}}/{path.partition('/')[2]}"]["post"]
    described = operation["responses"][str(got.status_code)]
    if "$ref" in described:
        described = document["components"]["responses"][described["$ref"].rpartition("/")[2]]
    (kind, content), *_ = described["content"].items()
    assert got.headers["content-type"] == kind
    validator(document, content["schema"]).validate(got.json())


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("log_density", {}),
        ("log_density", {"x": [[0, 0]], "rows": [{"age": 0, "dose": 0}]}),
        ("log_density", {"x": [["0", 0]]}),
        ("log_density", {"x": [[0, 0]], "rtol": 0}),
        ("log_density", {"x": [[0, 0]], "tolerance": 0}),
        ("sample", {"n": 0}),
        ("sample", {"n": 2.5}),
        ("anomaly", {"x": [[0, 0]], "alpha": 1}),
        ("transport", {"x": [[0, 0]], "z": [[0, 0]]}),
    ],
)
def test_what_the_schema_forbids_the_server_refuses(
    client: httpx.Client, document: dict[str, Any], path: str, body: dict[str, Any]
) -> None:
    operation = document["paths"][f"/v1/models/{{model}}/{path}"]["post"]
    schema = operation["requestBody"]["content"]["application/json"]["schema"]
    assert not validator(document, schema).is_valid(body)
    assert client.post(f"/v1/models/pair/{path}", json=body).status_code == 422


def test_the_documentation_page_needs_no_other_host(client: httpx.Client) -> None:
    page = client.get("/docs")
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert "openapi.json" in page.text
    assert not re.findall(r"(?:https?:)?//[a-z]", re.sub(r"^\s*//.*$", "", page.text, flags=re.MULTILINE))


def test_fields_say_what_they_mean(document: dict[str, Any]) -> None:
    for name, schema in document["components"]["schemas"].items():
        if name.endswith("Request"):
            assert all("description" in field for field in schema["properties"].values()), name
