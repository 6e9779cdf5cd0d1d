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

__all__ = ["audit", "configure", "fields"]

_audit = logging.getLogger("pushforward.audit")
_audit.setLevel(logging.INFO)  # whatever else is logged


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


def audit(action: str, **values: Any) -> None:
    """Write the line of an order to the control plane: who gave it, what for, and what came of it."""
    _audit.info("audit", extra=fields(action=action, **values))


def without_keys(text: str) -> str:
    """Text in which no API key can be read, wherever a client put one.

    >>> without_keys("/v1/pf_0123456789ab_" + "5" * 48)
    '/v1/pf_0123456789ab_…'
    """
    return _KEY.sub(r"\1…", text)


_KEY = re.compile(r"(pf_[0-9a-f]{12}_)[0-9a-f]{8,}")


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
        return without_keys(orjson.dumps(_record(record), default=str).decode())


class _Text(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line = _record(record)
        trace = line.pop("traceback", None)
        text = " ".join(f"{key}={_quoted(value)}" for key, value in line.items())
        return without_keys(text if trace is None else f"{text}\n{trace}")


_PLAIN = re.compile(r"[!#-&(-<>-~]+")  # printable ASCII but for space, quotes and the equals sign


def _quoted(value: Any) -> str:
    text = str(value)
    if isinstance(value, int | float) or _PLAIN.fullmatch(text):
        return text
    return orjson.dumps(text).decode()
