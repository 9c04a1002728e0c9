"""GET /v1/models and /v1/models/{id}."""

from __future__ import annotations

import time

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from octavo.server.context import ServerState
from octavo.server.openai.decode import read_query


class ModelCard(msgspec.Struct, frozen=True):
    id: str
    created: int
    root: str
    max_model_len: int
    object: str = "model"
    owned_by: str = "octavo"
    parent: str | None = None


class ModelList(msgspec.Struct, frozen=True):
    data: list[ModelCard]
    object: str = "list"


class Models:
    """The names this server answers to; all are the same model."""

    def __init__(self, state: ServerState) -> None:
        self._state = state
        names, length = state.context.served_model_names, state.context.max_model_len
        created = int(time.time())
        self._cards = {name: ModelCard(name, created, names[0], length) for name in names}

    async def list_all(self, request: Request) -> Response:
        read_query(request.scope, self._state.context.options.strict)
        return _json(ModelList(list(self._cards.values())))

    async def get(self, request: Request) -> Response:
        read_query(request.scope, self._state.context.options.strict)
        name = request.path_params["model"]
        self._state.check_model(name)
        return _json(self._cards[name])


def _json(value: msgspec.Struct) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json")
