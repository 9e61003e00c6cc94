"""Failures as an OpenAI client expects them: a status and ``{"error": {message, type, param, code}}``.

Knows the shape, not the reasons.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class ApiError(Exception):
    """A request that ends in an error response. ``param`` names the field at fault, dotted when it is nested."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    @property
    def document(self) -> dict[str, Any]:
        """The JSON body of the error response, also sent as the last event of a stream that failed."""
        return {
            "error": {"message": self.message, "type": _error_type(self.status), "param": self.param, "code": self.code}
        }


def _error_type(status: int) -> str:
    if status == 401:
        return "authentication_error"
    if status == 403:
        return "permission_error"
    if status == 429:
        return "rate_limit_error"
    return "invalid_request_error" if status < 500 else "server_error"
