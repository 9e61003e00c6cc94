"""Logs of the server: one JSON object per line on stderr, never a prompt, an answer or a key.

Formats records of the standard ``logging`` module; decides nothing about what is logged.
"""

from __future__ import annotations

import json
import logging
import sys
import threading
from collections.abc import Mapping
from datetime import datetime, timezone
from typing import TextIO

LOGGER = logging.getLogger("edgelm.server")
_FACTS = "edgelm_facts"


def log_event(event: str, facts: Mapping[str, object] | None = None, *, level: int = logging.INFO) -> None:
    """Log ``event`` with its facts. Facts that are None are left out."""
    told = {name: fact for name, fact in (facts or {}).items() if fact is not None}
    LOGGER.log(level, event, extra={_FACTS: told})


class JsonLines(logging.Formatter):
    """``{"time", "level", "event", ...facts}`` on one line; an exception becomes one escaped string."""

    def format(self, record: logging.LogRecord) -> str:
        document = {
            "time": datetime.fromtimestamp(record.created, timezone.utc).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "event": record.getMessage().strip(),
            **getattr(record, _FACTS, {}),
        }
        if record.exc_info:
            document["exception"] = self.formatException(record.exc_info)
        return json.dumps(document, default=str)


def start_logging(stream: TextIO | None = None) -> None:
    """Send the server's records, and warnings of the HTTP library, to ``stream`` (stderr)."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonLines())
    for logger, level in ((LOGGER, logging.INFO), (logging.getLogger("uvicorn.error"), logging.WARNING)):
        logger.handlers = [handler]
        logger.setLevel(level)
        logger.propagate = False
    threading.excepthook = _log_thread_fault


def _log_thread_fault(fault: threading.ExceptHookArgs) -> None:
    """A thread that dies of a mistake of ours is told in one line, too."""
    cause = (fault.exc_type, fault.exc_value or fault.exc_type(), fault.exc_traceback)
    LOGGER.critical("thread failed", exc_info=cause)
