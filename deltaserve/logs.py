"""What the processes write about themselves: lines for people, or JSON for collectors.

Every line that is written while a request is handled carries its id. Nothing that a client sent
is logged, but the address that it asked for.
"""

from __future__ import annotations

import json
import logging
from contextvars import ContextVar
from typing import Any

request_id: ContextVar[str | None] = ContextVar("request_id", default=None)
"""Of the request that is being handled."""

FIELDS = "fields"
"""The key of ``extra`` under which a record brings fields of its own."""


class JsonLines(logging.Formatter):
    """One JSON object for each record; times are Unix seconds."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": round(record.created, 3),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if (current := request_id.get()) is not None:
            line["request_id"] = current
        line |= getattr(record, FIELDS, {})
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)


class PlainLines(logging.Formatter):
    """``12:00:00 message``, and the request's id where the message does not tell it."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        current = request_id.get()
        return text if current is None or current in text else f"{text} [{current}]"


def set_up_logs(level: int, *, as_json: bool, who: str = "") -> None:
    """Once in a process. ``who``: begins each line for people."""
    handler = logging.StreamHandler()
    plain = PlainLines(f"%(asctime)s {who}%(message)s", datefmt="%H:%M:%S")
    handler.setFormatter(JsonLines() if as_json else plain)
    logging.basicConfig(level=level, handlers=[handler])


def logs_are_json() -> bool:
    """As this process was set up."""
    return any(isinstance(handler.formatter, JsonLines) for handler in logging.root.handlers)
