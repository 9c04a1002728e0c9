"""What every request passes: an id, a log line, HTTP counters, a header check, and the key check."""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
import time
import uuid
from collections.abc import Sequence

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from octavo.server.lifecycle import Lifecycle
from octavo.server.limits import MAX_HEADER_BYTES, MAX_HEADERS
from octavo.server.metrics import MetricsRegistry
from octavo.server.openai.decode import Ignored
from octavo.server.openai.errors import APIError, internal

logger = logging.getLogger("octavo.server")
access_log = logging.getLogger("octavo.access")

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
_CLIENT_CLOSED = 499  # logged for a request whose client went before the answer began

# Probes: no key, no log line, no place in the HTTP counters. Everything else needs the key, where one is set.
PUBLIC_PATHS = frozenset({"/health", "/ping", "/version"})
_QUIET_PATHS = PUBLIC_PATHS | {"/metrics"}


class AccessMiddleware:
    """Gives the request its id (the client's, if it is well formed) and records what became of it.

    A bug behind it is a 500 without details; the log has them."""

    def __init__(self, app: ASGIApp, metrics: MetricsRegistry) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start = time.monotonic()
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        scope["state"]["request_id"] = request_id
        status = _CLIENT_CLOSED

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["X-Request-Id"] = request_id
                ignored: Ignored | None = scope["state"].get("ignored")
                if ignored is not None and ignored.names:
                    headers["X-Octavo-Ignored-Fields"] = ignored.header
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except Exception:
            logger.exception("request %s failed", request_id)
            if status != _CLIENT_CLOSED:
                raise
            await internal("internal server error").response()(scope, receive, send_with_id)
        finally:
            if scope["path"] not in _QUIET_PATHS:
                self._record(scope, status, time.monotonic() - start, request_id)

    def _record(self, scope: Scope, status: int, seconds: float, request_id: str) -> None:
        route = scope.get("route")
        handler = getattr(route, "path", "none")  # the route's pattern: a client cannot add label values
        self._metrics.http_request(handler, scope["method"], status, seconds)
        client = scope["client"][0] if scope["client"] else "-"
        path = scope["path"].encode("unicode_escape").decode()
        access_log.info("%s %s %s %d %.3fs %s", client, scope["method"], path[:256], status, seconds, request_id)


class GuardMiddleware:
    """Refuses requests with too many headers (431), without a key (401), and, while draining, work (503)."""

    def __init__(self, app: ASGIApp, keys: Sequence[str], lifecycle: Lifecycle) -> None:
        self._app = app
        self._digests = [_digest(key.encode()) for key in keys]
        self._lifecycle = lifecycle

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            error = self._refusal(scope)
            if error is not None:
                await error.response()(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _refusal(self, scope: Scope) -> APIError | None:
        size = sum(len(name) + len(value) for name, value in scope["headers"]) + len(scope["raw_path"])
        if len(scope["headers"]) > MAX_HEADERS or size > MAX_HEADER_BYTES:
            message = f"the request has more than {MAX_HEADERS} headers or {MAX_HEADER_BYTES} bytes of them"
            return APIError(431, message, headers={"Connection": "close"})
        if self._digests and scope["path"] not in PUBLIC_PATHS and not self._authorized(scope):
            return APIError(
                401,
                "a valid API key is needed: Authorization: Bearer <key>, or x-api-key: <key>",
                kind="authentication_error",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        return self._lifecycle.refusal() if scope["method"] == "POST" else None

    def _authorized(self, scope: Scope) -> bool:
        token = _key(scope)
        if token is None:
            return False
        digest = _digest(token)
        # Every key is compared, each in constant time, so that timing tells nothing about any of them.
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        return any(matches)


def _key(scope: Scope) -> bytes | None:
    """The key of a request: its bearer token or, where there is no Authorization, its x-api-key, which Anthropic's
    clients send. None where there are several."""
    found = {name: [v for n, v in scope["headers"] if n == name] for name in (b"authorization", b"x-api-key")}
    bearer, plain = found.values()
    if not bearer:
        return plain[0].strip() if len(plain) == 1 else None
    scheme, _, token = (bearer[0] if len(bearer) == 1 else b"").partition(b" ")
    return token.strip() if scheme.lower() == b"bearer" else None


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
