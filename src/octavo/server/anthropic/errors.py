"""Errors in Anthropic's shape: {"type": "error", "error": {"type", "message", "param"}}."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import msgspec

from octavo.server.openai.errors import APIError

_KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


class MessagesError(APIError):
    """An APIError as clients of the Messages API read it. `param` is ours: theirs says it in the message only."""

    def __init__(self, error: APIError) -> None:
        kind = _KINDS.get(error.status, "api_error" if error.status >= 500 else "invalid_request_error")
        super().__init__(
            error.status, error.message, kind=kind, param=error.param, code=error.code, headers=error.headers
        )

    def body(self) -> bytes:
        error = {"type": self.kind, "message": self.message, "param": self.param}
        return msgspec.json.encode({"type": "error", "error": error})


@contextlib.contextmanager
def as_messages_error() -> Iterator[None]:
    """An APIError from the block leaves it as a MessagesError."""
    try:
        yield
    except APIError as error:
        raise MessagesError(error) from error
