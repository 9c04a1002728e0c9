"""What the two generation endpoints share: read, check, admit, run, answer."""

from __future__ import annotations

import contextlib
import time
from abc import ABC, abstractmethod
from typing import ClassVar, Generic, TypeVar

import msgspec
from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from octavo.protocol.fields import COMPLETIONS
from octavo.server.context import ServerState
from octavo.server.limits import ClientGone, read_json_body
from octavo.server.openai.beam_run import BeamRun
from octavo.server.openai.decode import Ignored, decode, read_query
from octavo.server.openai.errors import invalid
from octavo.server.openai.logprobs import LogprobsFormatter
from octavo.server.openai.prompts import encode_text
from octavo.server.openai.runner import Run
from octavo.server.openai.schema import GenerationBody, StreamOptions
from octavo.server.openai.sse import Frames, send_events
from octavo.server.openai.structured import Wish, wish_of

B = TypeVar("B", bound=GenerationBody)


class GenerationEndpoint(ABC, Generic[B]):
    """An ASGI app for one route. Subclasses give the body's type, the preparation, and the two answers."""

    body_type: type[B]
    query_names: ClassVar[tuple[str, ...]] = ()  # parameters of the query that may be there

    def __init__(self, state: ServerState) -> None:
        self.state = state
        self.context = state.context
        self.formatter = LogprobsFormatter(state.context.tokenizer)

    def read(self, raw: bytes, ignored: Ignored) -> B:
        """The body of a request. Raises APIError 400."""
        return decode(raw, self.body_type, ignored, self.context.vocab_size)

    @abstractmethod
    def num_prompts(self, body: B) -> int:
        """How many prompts the body holds."""

    @abstractmethod
    async def prepare(self, body: B, run: Run) -> None:
        """Tokenize, and add each prompt to `run`. Raises APIError 400."""

    @abstractmethod
    def frames(self, body: B, run: Run, request_id: str) -> Frames:
        """How the streamed answer is written."""

    @abstractmethod
    def answer(self, body: B, run: Run, request_id: str) -> msgspec.Struct:
        """The whole answer of a run that is complete."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        arrival = time.monotonic()
        with contextlib.suppress(ClientGone):
            limit = self.context.options.max_body_bytes
            raw = await read_json_body(Headers(scope=scope), receive, limit, self.context.timeouts)
            ignored = read_query(scope, self.context.options.strict, self.query_names)
            body = self.read(raw, ignored)
            model = self.state.find_model(body.model)
            self._check(body)
            self.state.check_alive()
            request_id: str = scope["state"]["request_id"]
            num_sequences = (body.best_of or body.n or 1) * self.num_prompts(body)
            with self.state.admission.hold(num_sequences, "best_of" if body.best_of else "n"):
                run = (BeamRun if body.use_beam_search else Run)(self.state, body, model, arrival, request_id)
                if body.stream:

                    async def prepared() -> tuple[Run, Frames]:
                        await self._prepare(body, run)
                        return run, self.frames(body, run, request_id)

                    await send_events(self.state.lifecycle, prepared, scope, receive, send)
                else:
                    value = await self.state.lifecycle.run(receive, self._whole(body, run, request_id))
                    await Response(msgspec.json.encode(value), media_type="application/json")(scope, receive, send)

    def wish(self, body: B) -> Wish | None:
        """What constrains the output's text. Raises APIError 400."""
        return wish_of(body)

    async def _prepare(self, body: B, run: Run) -> None:
        """Compile the grammar, where the body asks for one, and tokenize. Raises APIError 400."""
        run.wish = wish = self.wish(body)
        if wish is not None:
            try:
                run.grammar = await self.state.compile(wish.params)
            except ValueError as error:
                raise wish.refusal(error) from None
        await self.prepare(body, run)

    async def _whole(self, body: B, run: Run, request_id: str) -> msgspec.Struct:
        await self._prepare(body, run)
        await run.complete()
        return self.answer(body, run, request_id)

    def _check(self, body: B) -> None:
        if self.context.outputs.head != "tokens":
            made_for = "scores, at /v1/score and /v1/rerank" if self.context.outputs.head == "scores" else "embeddings"
            raise invalid(
                f"{body.model} has no language head and generates no text; it is made for {made_for}", "model"
            )
        if body.best_of is not None and body.best_of < (body.n or 1):
            span = f"{body.n or 1}..{COMPLETIONS.high}"
            raise invalid(f"best_of={body.best_of} is out of range; allowed: {span}", "best_of")
        if body.stream and (body.best_of or 1) > (body.n or 1):
            raise invalid(f"best_of={body.best_of} is not available with stream; allowed: n={body.n or 1}", "best_of")
        if body.stream and body.use_beam_search:
            raise invalid("use_beam_search is not available with stream", "use_beam_search")
        if body.stream_options is not None and not body.stream:
            raise invalid("stream_options is only allowed with stream", "stream_options")
        if body.prompt_logprobs is not None and body.stream:
            raise invalid("prompt_logprobs is not available with stream", "prompt_logprobs")
        if body.priority and self.context.scheduling_policy != "priority":
            raise invalid("priority needs a server that runs with --scheduling-policy priority", "priority")

    def stream_options(self, body: B) -> StreamOptions:
        return body.stream_options or StreamOptions()

    async def encode(self, text: str, add_special_tokens: bool, param: str) -> list[int]:
        """Token ids of a prompt. One that cannot fit the context is refused before it is tokenized.

        Raises APIError 400.
        """
        return await encode_text(self.state, text, add_special_tokens, param)

    @property
    def fingerprint(self) -> str:
        return f"octavo-{self.context.version}"
