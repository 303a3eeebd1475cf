"""Errors as OpenAI's clients expect them: `{"error": {message, type, param, code}}`."""

import re
from typing import Any

import msgspec
from starlette.responses import Response

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "service_unavailable_error",
}


MAX_MESSAGE_CHARS = 600
"""What a client sent is quoted, but not without end."""


class ApiError(Exception):
    """A request that is answered with an error status; `message` is one sentence."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = _shorten(message)
        self.param = None if param is None else _shorten(param)
        self.code = code
        self.headers = headers or {}

    def body(self) -> dict[str, Any]:
        """The JSON object, also for an error in mid-stream."""
        kind = _TYPES.get(self.status, "invalid_request_error")
        return {
            "error": {
                "message": self.message,
                "type": kind,
                "param": self.param,
                "code": self.code,
            }
        }

    def response(self) -> Response:
        return Response(
            msgspec.json.encode(self.body()),
            status_code=self.status,
            headers=self.headers,
            media_type="application/json",
        )


def _shorten(text: str) -> str:
    return text if len(text) <= MAX_MESSAGE_CHARS else text[: MAX_MESSAGE_CHARS - 1] + "…"


def retry_later(message: str, status: int = 503, after_s: int = 5) -> ApiError:
    """Overload, loading, drain: OpenAI's clients obey `retry-after`."""
    return ApiError(status, message, headers={"retry-after": str(after_s)})


def invalid(message: str, param: str | None = None) -> ApiError:
    return ApiError(400, message, param)


def from_validation(error: msgspec.ValidationError) -> ApiError:
    """msgspec names the field in its message; hand it on as `param` too."""
    message = str(error)
    found = re.search(r"`\$\.([^`]+)`", message) or re.search(
        r"(?:unknown|required) field `([^`]+)`", message
    )
    return ApiError(400, message, found.group(1) if found else None)
