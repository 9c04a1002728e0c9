"""POST /v1/responses: a chat in the shape of OpenAI's Responses API, with its events."""

from __future__ import annotations

import time
import uuid
from typing import Any, ClassVar

import msgspec

from octavo.server.context import ServerState
from octavo.server.openai.conversation import ConversationEndpoint
from octavo.server.openai.decode import Ignored, decode
from octavo.server.openai.errors import APIError, invalid
from octavo.server.openai.response_schema import (
    SHARED,
    IncompleteDetails,
    InputTokensDetails,
    OutputMessage,
    OutputText,
    OutputTokensDetails,
    Response,
    ResponseError,
    ResponseRequest,
    ResponsesBody,
    ResponseUsage,
    Status,
)
from octavo.server.openai.response_store import ResponseStore
from octavo.server.openai.runner import Choice, Run
from octavo.server.openai.schema import Message
from octavo.server.openai.sse import Frames
from octavo.text.generation import Delta


class Responses(ConversationEndpoint[ResponseRequest]):
    """The endpoint. Without a store where there are several API processes: each would know its own responses only."""

    body_type = ResponseRequest
    names: ClassVar[dict[str, str]] = {"max_tokens": "max_output_tokens", "prompt": "input"}

    def __init__(self, state: ServerState, store: ResponseStore | None = None) -> None:
        """store: for tests; else one with the default bounds."""
        super().__init__(state)
        self._store = None if state.context.group.count > 1 else store or ResponseStore()

    def read(self, raw: bytes, ignored: Ignored) -> ResponseRequest:
        source = decode(raw, ResponsesBody, ignored)
        given = (
            [Message("user", source.input)]
            if isinstance(source.input, str)
            else [item.as_message() for item in source.input]
        )
        conversation = self._previous(source) + given
        opening = [] if source.instructions is None else [Message("system", source.instructions)]
        return ResponseRequest(
            **{name: getattr(source, name) for name in SHARED},
            messages=opening + conversation,
            max_tokens=source.max_output_tokens,
            source=source,
            # Not the request's id, which a client may choose: who knows it may read on.
            response_id=f"resp_{uuid.uuid4().hex}",
            conversation=conversation,
            stores=self._stores(source),
        )

    def _previous(self, source: ResponsesBody) -> list[Message]:
        name = source.previous_response_id
        if name is None:
            return []
        if self._store is None:
            raise invalid("previous_response_id needs a server with one API process", "previous_response_id")
        found = self._store.get(name)
        if found is None:
            message = f"there is no response {name!r} here: it was not stored, or it has made room for others"
            raise invalid(message, "previous_response_id", "previous_response_not_found")
        return found

    def _stores(self, source: ResponsesBody) -> bool:
        if self._store is None and source.store:
            raise invalid("store=true needs a server with one API process; allowed: false", "store")
        return self._store is not None and source.store is not False

    def answer(self, body: ResponseRequest, run: Run, request_id: str) -> Response:  # noqa: ARG002 (see response_id)
        return self.finished(body, run, int(time.time()))

    def frames(self, body: ResponseRequest, run: Run, request_id: str) -> ResponseFrames:  # noqa: ARG002
        return ResponseFrames(self, body, run)

    def finished(self, body: ResponseRequest, run: Run, created: int) -> Response:
        """The answer of a run that is complete, stored if it is to be."""
        text = run.choices[0].generation.text
        if body.stores and self._store is not None:
            self._store.put(body.response_id, [*body.conversation, Message("assistant", text)])
        cut = run.choices[0].generation.finish_reason == "length"
        status: Status = "incomplete" if cut else "completed"
        usage = run.usage()
        return self.response(
            body,
            run,
            created,
            status,
            output=[message(body, status, text)],
            incomplete_details=IncompleteDetails("max_output_tokens") if cut else None,
            usage=ResponseUsage(
                usage.prompt_tokens,
                InputTokensDetails(usage.prompt_tokens_details.cached_tokens),
                usage.completion_tokens,
                OutputTokensDetails(),
                usage.total_tokens,
            ),
        )

    def response(self, body: ResponseRequest, run: Run, created: int, status: Status, **rest: Any) -> Response:
        """The response as it now stands; `rest` are fields of Response that are not the request's."""
        source, sampling = body.source, run.choices[0].request.sampling
        return Response(
            id=body.response_id,
            created_at=created,
            status=status,
            model=self.context.served_model_names[0],
            instructions=source.instructions,
            previous_response_id=source.previous_response_id,
            max_output_tokens=source.max_output_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            store=body.stores,
            metadata=source.metadata or {},
            user=source.user,
            safety_identifier=source.safety_identifier,
            prompt_cache_key=source.prompt_cache_key,
            parallel_tool_calls=source.parallel_tool_calls is not False,
            **rest,
        )


def message(body: ResponseRequest, status: Status, text: str | None) -> OutputMessage:
    """The one item of the output; without content where text is None."""
    content = [] if text is None else [OutputText(text)]
    return OutputMessage(body.response_id.replace("resp_", "msg_"), status, content)


class ResponseFrames(Frames):
    """The events of one streamed response, numbered from 0. Its stream ends with its last event."""

    done = b""

    def __init__(self, endpoint: Responses, body: ResponseRequest, run: Run) -> None:
        self._endpoint = endpoint
        self._body = body
        self._run = run
        self._created = int(time.time())
        self._number = 0  # of the next event
        item_id = message(body, "in_progress", None).id
        self._part: dict[str, Any] = {"item_id": item_id, "output_index": 0, "content_index": 0}
        head = msgspec.json.encode({"type": "response.output_text.delta", **self._part, "logprobs": []})[:-1]
        self._delta_head = (
            b"event: response.output_text.delta\ndata: " + head + b',"sequence_number":%d,"delta":%b}\n\n'
        )

    def frame(self, choice: Choice, delta: Delta) -> bytes:
        """See Frames.frame."""
        events = b"" if self._number else self._opening()
        if delta.text:
            events += self._delta_head % (self._number, msgspec.json.encode(delta.text))
            self._number += 1
        if delta.finish_reason is not None:
            events += self._closing(
                choice.generation.text, "incomplete" if delta.finish_reason == "length" else "completed"
            )
        return events

    def last(self) -> bytes:
        """See Frames.last."""
        response = self._endpoint.finished(self._body, self._run, self._created)
        return self._event(f"response.{response.status}", response=response)

    def failed(self, error: APIError) -> bytes:
        """See Frames.failed."""
        failure = ResponseError("server_error", error.message)
        response = self._endpoint.response(self._body, self._run, self._created, "failed", error=failure)
        return self._event("response.failed", response=response)

    def _opening(self) -> bytes:
        response = self._endpoint.response(self._body, self._run, self._created, "in_progress")
        return b"".join(
            (
                self._event("response.created", response=response),
                self._event("response.in_progress", response=response),
                self._event(
                    "response.output_item.added", output_index=0, item=message(self._body, "in_progress", None)
                ),
                self._event("response.content_part.added", **self._part, part=OutputText("")),
            )
        )

    def _closing(self, text: str, status: Status) -> bytes:
        return b"".join(
            (
                self._event("response.output_text.done", **self._part, text=text, logprobs=[]),
                self._event("response.content_part.done", **self._part, part=OutputText(text)),
                self._event("response.output_item.done", output_index=0, item=message(self._body, status, text)),
            )
        )

    def _event(self, kind: str, **fields: Any) -> bytes:
        data = msgspec.json.encode({"type": kind, "sequence_number": self._number, **fields})
        self._number += 1
        return b"event: %b\ndata: %b\n\n" % (kind.encode(), data)
