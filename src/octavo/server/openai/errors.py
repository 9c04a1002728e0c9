"""Errors in OpenAI's shape: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import msgspec
from starlette.responses import Response

RETRY_AFTER_SECONDS = "1"


class ErrorDetail(msgspec.Struct, frozen=True):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(msgspec.Struct, frozen=True):
    error: ErrorDetail


class APIError(Exception):
    """An answer other than 200. `param` names the field at fault, as a path such as messages[0].content."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.kind = kind
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    def body(self) -> bytes:
        """The error as JSON, also what an SSE error frame carries."""
        return msgspec.json.encode(ErrorBody(ErrorDetail(self.message, self.kind, self.param, self.code)))

    def response(self) -> Response:
        return Response(self.body(), self.status, self.headers, "application/json")


def invalid(message: str, param: str | None = None, code: str | None = "invalid_value") -> APIError:
    return APIError(400, message, param=param, code=code)


def unsupported(param: str, value: object, harmless: Iterable[object]) -> APIError:
    """harmless: the values that ask for nothing, and pass."""
    shown, *allowed = (msgspec.json.encode(each).decode() for each in (value, None, *harmless))
    shown = shown if len(shown) <= 64 else f"{shown[:64]}…"
    message = f"{param}={shown} is not supported by this server yet; allowed: {', '.join(allowed)}"
    return invalid(message, param, "unsupported_parameter")


def context_too_long(message: str, param: str) -> APIError:
    return invalid(message, param, "context_length_exceeded")


def model_not_found(name: str) -> APIError:
    return APIError(404, f"The model {name!r} does not exist", param="model", code="model_not_found")


def too_busy(message: str) -> APIError:
    headers = {"Retry-After": RETRY_AFTER_SECONDS}
    return APIError(429, message, kind="rate_limit_error", code="rate_limit_exceeded", headers=headers)


def unavailable(message: str) -> APIError:
    headers = {"Retry-After": RETRY_AFTER_SECONDS}
    return APIError(503, message, kind="server_error", code="service_unavailable", headers=headers)


def internal(message: str) -> APIError:
    return APIError(500, message, kind="server_error", code="internal_error")


def timed_out(message: str) -> APIError:
    return APIError(408, message, code="request_timeout")
