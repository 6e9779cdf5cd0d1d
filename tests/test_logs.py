import json
import logging

import pytest

from pushforward import logs


@pytest.fixture(autouse=True)
def restore_logging() -> object:
    root = logging.getLogger()
    before = root.handlers[:], root.level
    yield
    root.handlers[:], root.level = before


def test_lines_are_json_with_their_fields(capfd: pytest.CaptureFixture[str]) -> None:
    logs.configure("info", "json")
    logging.getLogger("pushforward.test").info("request", extra=logs.fields(rows=3, model="a b"))
    logging.getLogger("pushforward.test").debug("unseen")
    (line,) = capfd.readouterr().err.splitlines()
    told = json.loads(line)
    assert (told["event"], told["rows"], told["model"], told["level"]) == ("request", 3, "a b", "info")
    assert told["logger"] == "pushforward.test"


def test_lines_are_key_value_text_that_cannot_be_forged(capfd: pytest.CaptureFixture[str]) -> None:
    logs.configure("debug", "text")
    logging.getLogger("t").info("odd", extra=logs.fields(plain="x", spaced="a b", broken='a\nlevel=error"'))
    (line,) = capfd.readouterr().err.splitlines()
    assert line.endswith(r' event=odd plain=x spaced="a b" broken="a\nlevel=error\""')


def test_a_traceback_follows_its_line(capfd: pytest.CaptureFixture[str]) -> None:
    logs.configure("info", "text")
    try:
        raise ValueError("inside")
    except ValueError:
        logging.getLogger("t").exception("failed")
    text = capfd.readouterr().err
    assert "event=failed" in text.splitlines()[0]
    assert text.rstrip().endswith("ValueError: inside")
