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
    """The names this server answers to: the model's own, and its adapters."""

    def __init__(self, state: ServerState) -> None:
        self._state = state
        self._created = int(time.time())

    async def list_all(self, request: Request) -> Response:
        read_query(request.scope, self._state.context.options.strict)
        return _json(ModelList(list(self._cards().values())))

    async def get(self, request: Request) -> Response:
        read_query(request.scope, self._state.context.options.strict)
        name = request.path_params["model"]
        self._state.find_model(name)
        return _json(self._cards()[name])

    def _cards(self) -> dict[str, ModelCard]:
        context = self._state.context
        names, length = context.served_model_names, context.max_model_len
        cards = {name: ModelCard(name, self._created, names[0], length) for name in names}
        for adapter in context.adapters.served:
            name, path = adapter.lora.lora_name, adapter.lora.lora_path
            cards[name] = ModelCard(name, adapter.created, path, length, parent=adapter.parent or names[0])
        return cards


def _json(value: msgspec.Struct) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json")
