"""What a server says no with: OpenAI's shape of an error, so that every client reads it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_TYPES = {
    401: "authentication_error",
    402: "insufficient_quota",
    404: "not_found_error",
    429: "rate_limit_error",
}


class Refused(Exception):
    """A request that is not served. ``hint`` says what to do; ``param`` names the field."""

    def __init__(
        self,
        status: int,
        message: str,
        hint: str = "",
        *,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
        details: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(f"{message}\nhint: {hint}" if hint else message)
        self.status = status
        self.code = code
        self.param = param
        self.headers = dict(headers or {})
        self.details = dict(details or {})
        """Of thrifty's own, beside OpenAI's fields."""

    def body(self) -> dict[str, Any]:
        kind = _TYPES.get(self.status)
        if kind is None:
            kind = "invalid_request_error" if self.status < 500 else "api_error"
        error = {"message": str(self), "type": kind, "param": self.param, "code": self.code}
        return {"error": {**error, **self.details}}
