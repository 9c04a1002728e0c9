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


class MessagesErrorDetail(msgspec.Struct, frozen=True):
    type: str
    message: str
    param: str | None


class MessagesErrorBody(msgspec.Struct, frozen=True, tag_field="type", tag="error"):
    error: MessagesErrorDetail


class MessagesError(APIError):
    """An APIError as clients of the Messages API read it. `param` is ours: theirs says it in the message only."""

    def __init__(self, error: APIError) -> None:
        kind = _KINDS.get(error.status, "api_error" if error.status >= 500 else "invalid_request_error")
        super().__init__(
            error.status, error.message, kind=kind, param=error.param, code=error.code, headers=error.headers
        )

    def body(self) -> bytes:
        return msgspec.json.encode(MessagesErrorBody(MessagesErrorDetail(self.kind, self.message, self.param)))


@contextlib.contextmanager
def as_messages_error() -> Iterator[None]:
    """An APIError from the block leaves it as a MessagesError."""
    try:
        yield
    except APIError as error:
        raise MessagesError(error) from error
