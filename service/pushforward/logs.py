"""Structured logs: one line per event, as key=value text or as JSON, on standard error.

Modules log with the standard library: ``log.info("request", extra={"fields": {"rows": 3}})``.
"""

from __future__ import annotations

import logging
import re
import sys
from datetime import UTC, datetime
from typing import Any

import orjson

__all__ = ["configure", "fields"]


def configure(level: str, form: str) -> None:
    """Send the log lines of this process to standard error.

    Args:
        level: "debug", "info", "warning" or "error".
        form: "text" or "json".
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Json() if form == "json" else _Text())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    logging.getLogger("asyncio").setLevel(logging.WARNING)
    logging.logThreads = False  # nothing that the lines show


def fields(**values: Any) -> dict[str, dict[str, Any]]:
    """The ``extra`` argument of a logging call that adds these fields to the line."""
    return {"fields": values}


def _record(record: logging.LogRecord) -> dict[str, Any]:
    line: dict[str, Any] = {
        "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
        "level": record.levelname.lower(),
        "logger": record.name,
        "pid": record.process,
        "event": record.getMessage(),
        **getattr(record, "fields", {}),
    }
    if record.exc_info:
        line["traceback"] = logging.Formatter().formatException(record.exc_info)
    return line


class _Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return orjson.dumps(_record(record), default=str).decode()


class _Text(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line = _record(record)
        trace = line.pop("traceback", None)
        text = " ".join(f"{key}={_quoted(value)}" for key, value in line.items())
        return text if trace is None else f"{text}\n{trace}"


_PLAIN = re.compile(r"[!#-&(-<>-~]+")  # printable ASCII but for space, quotes and the equals sign


def _quoted(value: Any) -> str:
    text = str(value)
    if isinstance(value, int | float) or _PLAIN.fullmatch(text):
        return text
    return orjson.dumps(text).decode()
