"""What routes that answer with one JSON object and run no generation share: read, check, admit, answer."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from typing import ClassVar, Generic, TypeVar

import msgspec
from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from octavo.server.adapters import ServedModel
from octavo.server.context import ServerState
from octavo.server.limits import ClientGone, read_json_body
from octavo.server.openai.decode import decode, read_query

B = TypeVar("B", bound=msgspec.Struct)


class JsonEndpoint(ABC, Generic[B]):
    """An ASGI app for one route. Subclasses give the body's type and the answer."""

    body_type: type[B]
    query_names: ClassVar[tuple[str, ...]] = ()  # parameters of the query that may be there

    def __init__(self, state: ServerState) -> None:
        self.state = state
        self.context = state.context

    @abstractmethod
    async def answer(self, body: B, model: ServedModel) -> msgspec.Struct | str:
        """The answer to a body, and what its model stands for. A string is answered as plain text. Raises APIError."""

    def places(self, body: B) -> tuple[int, str]:  # noqa: ARG002 (others depend on it)
        """How many sequences' places in the queue a body takes, and the field that decides it. Raises APIError 400.

        At least one, even where the engine does nothing: what waits for the threads for text has no other bound.
        """
        return 1, "model"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with contextlib.suppress(ClientGone):
            limit = self.context.options.max_body_bytes
            raw = await read_json_body(Headers(scope=scope), receive, limit, self.context.timeouts)
            ignored = read_query(scope, self.context.options.strict, self.query_names)
            body = decode(raw, self.body_type, ignored, self.context.vocab_size)
            model = self.state.find_model(getattr(body, "model", None))
            with self.state.admission.hold(*self.places(body)):
                value = await self.state.lifecycle.run(receive, self.answer(body, model))
            if isinstance(value, str):
                answer = Response(value, media_type="text/plain")
            else:
                answer = Response(msgspec.json.encode(value), media_type="application/json")
            await answer(scope, receive, send)
