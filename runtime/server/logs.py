"""Logs of the server: one JSON object per line on stderr, never a prompt, an answer or a key.

Formats records of the standard ``logging`` module; decides nothing about what is logged.
"""

from __future__ import annotations

import json
import logging
import sys
from datetime import datetime, timezone
from typing import Any, TextIO

LOGGER = logging.getLogger("edgelm.server")
_FIELDS = "edgelm_fields"


def log_event(event: str, level: int = logging.INFO, /, **fields: Any) -> None:
    """Log ``event`` with its facts. Facts that are None are left out."""
    LOGGER.log(level, event, extra={_FIELDS: {name: item for name, item in fields.items() if item is not None}})


class JsonLines(logging.Formatter):
    """``{"time", "level", "event", ...facts}`` on one line; an exception becomes one escaped string."""

    def format(self, record: logging.LogRecord) -> str:
        document = {
            "time": datetime.fromtimestamp(record.created, timezone.utc).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "event": record.getMessage().strip(),
            **getattr(record, _FIELDS, {}),
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
