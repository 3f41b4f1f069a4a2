"""Errors of the server, in the form that clients of OpenAI read."""

from __future__ import annotations

from typing import Any

from fastapi.responses import JSONResponse


INVALID_REQUEST = "invalid_request_error"
_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error", 504: "timeout_error"}


class ApiError(Exception):
    """Raised to answer a request with an error.

    Args:
        message: What was found, what was expected, and what to do.
        status: HTTP status.
        code: Name of the error for programs.
        param: Name of the parameter that is wrong.
        retry_after: Seconds after which the client may try again.
    """

    def __init__(
        self,
        message: str,
        status: int = 400,
        code: str | None = None,
        param: str | None = None,
        retry_after: int | None = None,
    ):
        super().__init__(message)
        self.message = message
        self.status = status
        self.code = code
        self.param = param
        self.retry_after = retry_after

    def body(self) -> dict[str, Any]:
        kind = _TYPES.get(self.status, INVALID_REQUEST if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        headers = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return JSONResponse(self.body(), self.status, headers)


def try_again(message: str, status: int = 503, retry_after: int = 1) -> ApiError:
    """Return the error of a request that may succeed later."""
    return ApiError(message, status, code="try_again", retry_after=retry_after)
