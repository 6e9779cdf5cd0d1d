"""The tree of errors: codes, details, and the way across a process boundary."""

from __future__ import annotations

import json
import pickle
import re

import pytest

from pushforward import errors
from pushforward.errors import PushforwardError, from_code

KINDS = [getattr(errors, name) for name in errors.__all__ if name not in ("brief", "from_code")]


@pytest.mark.parametrize("kind", KINDS)
def test_every_error_survives_the_way_to_another_process(kind: type[PushforwardError]) -> None:
    error = kind("Something is wrong.", detail={"where": "x[0]", "known": ["a"], "limit": 3})
    code, message, detail = json.loads(json.dumps([error.code, error.message, error.detail]))
    there = from_code(code, message, detail)
    assert type(there) is kind
    assert (str(there), there.detail) == ("Something is wrong.", error.detail)
    copy = pickle.loads(pickle.dumps(error))
    assert (type(copy), str(copy), copy.detail) == (kind, str(error), error.detail)


def test_codes_are_distinct_and_kebab_case() -> None:
    codes = [kind.code for kind in KINDS]
    assert len(set(codes)) == len(codes)
    assert all(re.fullmatch(r"[a-z]+(-[a-z]+)*", code) for code in codes)


def test_the_tree_in_the_documentation_is_the_tree() -> None:
    drawn = dict(re.findall(r"^    (?:[├└]── )?(\w+) +([a-z-]+)  ", errors.__doc__ or "", flags=re.MULTILINE))
    assert drawn == {kind.__name__: kind.code for kind in KINDS}


def test_named_facts_go_into_the_detail() -> None:
    assert errors.InvalidInput("No.", where="x[3][1]").detail == {"where": "x[3][1]"}
    assert errors.InvalidInput("No.").where is None
    assert errors.NotFound("No.", known=("a", "b")).detail == {"known": ["a", "b"]}
    assert errors.NotFound("No.", known=[]).known == []
    assert errors.InvalidModel("No.", file="m/1/a.onnx", detail={"field": "f"}).detail == {
        "field": "f",
        "file": "m/1/a.onnx",
    }
    limit = errors.LimitExceeded("No.", limit=10, where="n")
    assert (limit.limit, limit.detail) == (10, {"limit": 10, "where": "n"})
    assert errors.Unavailable("No.", retry_after=1.5).retry_after == 1.5


def test_an_unknown_code_becomes_the_root() -> None:
    error = from_code("from-a-newer-release", "Something else.")
    assert type(error) is PushforwardError
    assert error.code == "internal-error"


def test_the_detail_is_a_copy() -> None:
    given = {"a": 1}
    error = PushforwardError("No.", detail=given)
    error.detail["b"] = 2
    assert given == {"a": 1}
