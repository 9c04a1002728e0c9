"""The ASGI application: routes, and what stands around them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from octavo.config import api_keys
from octavo.server.anthropic.messages import CountTokens, Messages
from octavo.server.context import ServerContext, ServerState
from octavo.server.metrics import CONTENT_TYPE
from octavo.server.middleware import AccessMiddleware, GuardMiddleware
from octavo.server.openai.adapters import LoadAdapter, UnloadAdapter
from octavo.server.openai.chat import ChatCompletions
from octavo.server.openai.completions import Completions
from octavo.server.openai.embeddings import Embeddings
from octavo.server.openai.errors import APIError
from octavo.server.openai.models import Models
from octavo.server.openai.responses import Responses
from octavo.server.openai.scoring import Rerank, Scores
from octavo.server.openai.stored_responses import StoredResponses
from octavo.server.openai.tokenize import Detokenize, Tokenize
from octavo.server.openapi import ADAPTER_OPERATIONS, OPERATIONS, document
from octavo.server.statistics_log import log_statistics

_QUIET_SECONDS = 1.0  # after the start, in which the first requests may come


def build_app(context: ServerContext) -> Starlette:
    """The application over one engine. `app.state.server` is its ServerState.

    Where API keys are set, every path but /health, /ping and /version needs one, /metrics included
    (Prometheus sends it with `authorization: credentials`).
    """
    state = ServerState(context)
    models, probes = Models(state), _Probes(state)
    chat = ChatCompletions(state)
    messages, responses = Messages(chat), Responses(chat)
    stored = StoredResponses(responses.store)
    app = Starlette(
        routes=[
            Route("/v1/chat/completions", chat, methods=["POST"]),
            Route("/v1/completions", Completions(state), methods=["POST"]),
            Route("/v1/responses", responses, methods=["POST"]),
            Route("/v1/responses/{response_id}", stored.get, methods=["GET"]),
            Route("/v1/responses/{response_id}", stored.delete, methods=["DELETE"]),
            Route("/v1/responses/{response_id}/input_items", stored.input_items, methods=["GET"]),
            Route("/v1/messages", messages, methods=["POST"]),
            Route("/v1/messages/count_tokens", CountTokens(messages), methods=["POST"]),
            Route("/v1/embeddings", Embeddings(state), methods=["POST"]),
            *(Route(path, Scores(state), methods=["POST"]) for path in ("/v1/score", "/score")),
            *(Route(path, Rerank(state), methods=["POST"]) for path in ("/v1/rerank", "/v2/rerank", "/rerank")),
            Route("/tokenize", Tokenize(chat), methods=["POST"]),
            Route("/detokenize", Detokenize(state), methods=["POST"]),
            *(_adapter_routes(state) if context.options.allow_runtime_lora else ()),
            Route("/v1/models", models.list_all, methods=["GET"]),
            Route("/v1/models/{model:path}", models.get, methods=["GET"]),
            Route("/health", probes.health, methods=["GET"]),
            Route("/ping", probes.health, methods=["GET"]),
            Route("/version", probes.version, methods=["GET"]),
            Route("/metrics", probes.metrics, methods=["GET"]),
            Route("/openapi.json", probes.openapi, methods=["GET"]),
        ],
        middleware=[
            Middleware(AccessMiddleware, metrics=state.metrics),
            Middleware(GuardMiddleware, keys=api_keys(context.options), lifecycle=state.lifecycle),
        ],
        exception_handlers={APIError: _api_error, HTTPException: _http_error},
        lifespan=_lifespan,
    )
    app.router.redirect_slashes = False
    app.state.server = state
    return app


def _adapter_routes(state: ServerState) -> list[Route]:
    return [
        Route("/v1/load_lora_adapter", LoadAdapter(state), methods=["POST"]),
        Route("/v1/unload_lora_adapter", UnloadAdapter(state), methods=["POST"]),
    ]


class _Probes:
    def __init__(self, state: ServerState) -> None:
        self._state = state

    async def health(self, request: Request) -> Response:  # noqa: ARG002 (the route's signature)
        """200 with an empty body while requests are taken and the engine lives, else 503."""
        self._state.check_alive()
        return Response()

    async def version(self, request: Request) -> Response:  # noqa: ARG002
        return Response(msgspec.json.encode({"version": self._state.context.version}), media_type="application/json")

    async def metrics(self, request: Request) -> Response:  # noqa: ARG002
        return Response(await self._state.metrics_exchange.render(), headers={"Content-Type": CONTENT_TYPE})

    async def openapi(self, request: Request) -> Response:  # noqa: ARG002
        context = self._state.context
        names = [*context.served_model_names, *(adapter.lora.lora_name for adapter in context.adapters.served)]
        operations = OPERATIONS + (ADAPTER_OPERATIONS if context.options.allow_runtime_lora else ())
        described = document(context.version, names, bool(api_keys(context.options)), operations)
        return Response(msgspec.json.encode(described), media_type="application/json")


@contextlib.asynccontextmanager
async def _lifespan(app: Starlette) -> AsyncIterator[None]:
    state: ServerState = app.state.server
    await state.metrics_exchange.open()
    # One log line for all API processes: each hears the same of the engine.
    quiet = asyncio.get_running_loop().call_later(_QUIET_SECONDS, state.start_compiler)
    log = asyncio.create_task(log_statistics(state.metrics)) if state.context.group.index == 0 else None
    try:
        yield
    finally:
        quiet.cancel()
        if log is not None:
            log.cancel()
        state.metrics_exchange.close()
        state.close()


async def _api_error(request: Request, error: Exception) -> Response:  # noqa: ARG001
    assert isinstance(error, APIError)
    return error.response()


async def _http_error(request: Request, error: Exception) -> Response:
    """Starlette's own 404 and 405."""
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path} is not a route of this server"
    if error.status_code == 405:
        message = f"{request.url.path} does not take {request.method}"
    code = "method_not_allowed" if error.status_code == 405 else "not_found"
    return APIError(error.status_code, message, code=code, headers=error.headers).response()
