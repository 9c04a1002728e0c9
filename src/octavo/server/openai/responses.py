"""POST /v1/responses: a chat in the shape of OpenAI's Responses API."""

from __future__ import annotations

import re
import time
import uuid
from typing import Any, ClassVar

from octavo.server.openai.blocks import Blocks
from octavo.server.openai.chat import ChatCompletions
from octavo.server.openai.conversation import ConversationEndpoint
from octavo.server.openai.decode import Ignored, decode
from octavo.server.openai.errors import APIError, invalid
from octavo.server.openai.response_events import ResponseFrames, item_of, status_of
from octavo.server.openai.response_input import InputItem, check_item, shown_items, with_items
from octavo.server.openai.response_schema import (
    SHARED,
    IncompleteDetails,
    InputTokensDetails,
    JsonObjectFormat,
    JsonSchemaFormat,
    OutputTokensDetails,
    Response,
    ResponseRequest,
    ResponsesBody,
    ResponseUsage,
    Status,
    TextConfig,
)
from octavo.server.openai.response_store import ResponseStore, StoredResponse
from octavo.server.openai.runner import Run
from octavo.server.openai.schema import Function, FunctionChoice, Message, NamedToolChoice, Tool
from octavo.server.openai.structured import JsonObjectFormat as ChatObjectFormat
from octavo.server.openai.structured import JsonSchemaFormat as ChatSchemaFormat
from octavo.server.openai.structured import NamedSchema

_BUILT_IN = re.compile(r"(tools\[\d+\]|tool_choice)\.type")


class Responses(ConversationEndpoint[ResponseRequest]):
    """The endpoint. Without a store where there are several API processes: each would know its own responses only."""

    body_type = ResponseRequest
    names: ClassVar[tuple[tuple[str, str], ...]] = (
        (r"messages.*", "input"),
        (r"max_tokens", "max_output_tokens"),
        (r"response_format(\.json_schema)?", "text.format"),
        (r"(tools\[\d+\])\.function", r"\1"),
        (r"tool_choice\.function", "tool_choice"),
    )

    def __init__(self, chat: ChatCompletions, store: ResponseStore | None = None) -> None:
        """store: for tests; else one with the default bounds."""
        super().__init__(chat)
        self.store = None if self.context.group.count > 1 else store or ResponseStore()

    def read(self, raw: bytes, ignored: Ignored) -> ResponseRequest:
        source = _decoded(raw, ignored, self.context.vocab_size)
        items = [InputItem("message", "user", source.input)] if isinstance(source.input, str) else source.input
        for index, item in enumerate(items):
            check_item(item, f"input[{index}]")
        conversation = with_items(self._previous(source), items)
        opening = [] if source.instructions is None else [Message("system", source.instructions)]
        return ResponseRequest(
            **{name: getattr(source, name) for name in SHARED},
            **_of_tools(source),
            response_format=_response_format(source.text),
            messages=opening + conversation,
            max_tokens=source.max_output_tokens,
            source=source,
            # Not the request's id, which a client may choose: who knows it may read on.
            response_id=f"resp_{uuid.uuid4().hex}",
            conversation=conversation,
            items=items,
            stores=self._stores(source),
        )

    def _previous(self, source: ResponsesBody) -> list[Message]:
        name = source.previous_response_id
        if name is None:
            return []
        if self.store is None:
            raise invalid("previous_response_id needs a server with one API process", "previous_response_id")
        found = self.store.get(name)
        if found is None:
            message = f"there is no response {name!r} here: it was not stored, or it has made room for others"
            raise invalid(message, "previous_response_id", "previous_response_not_found")
        return found.conversation

    def _stores(self, source: ResponsesBody) -> bool:
        if self.store is None and source.store:
            raise invalid("store=true needs a server with one API process; allowed: false", "store")
        return self.store is not None and source.store is not False

    def answer(self, body: ResponseRequest, run: Run, request_id: str) -> Response:  # noqa: ARG002 (see response_id)
        blocks = self.blocks(body, run)
        blocks.read(run.choices[0].generation.text)
        return self.finished(body, run, int(time.time()), blocks)

    def frames(self, body: ResponseRequest, run: Run, request_id: str) -> ResponseFrames:  # noqa: ARG002
        return ResponseFrames(self, body, run)

    def blocks(self, body: ResponseRequest, run: Run) -> Blocks:
        """What the run's output is to be read into."""
        return Blocks(self.chat.tool_calling.format(body).parser(run.choices[0].prompt), body)

    def finished(self, body: ResponseRequest, run: Run, created: int, blocks: Blocks) -> Response:
        """The answer of a run that is complete, stored if it is to be."""
        cut = run.choices[0].generation.finish_reason == "length"
        usage = run.usage()
        response = self.response(
            body,
            run,
            created,
            "incomplete" if cut else "completed",
            output=[item_of(body, block, status_of(block, blocks, cut)) for block in blocks.row],
            incomplete_details=IncompleteDetails("max_output_tokens") if cut else None,
            usage=ResponseUsage(
                usage.prompt_tokens,
                InputTokensDetails(usage.prompt_tokens_details.cached_tokens),
                usage.completion_tokens,
                OutputTokensDetails(self._num_tokens(blocks.joined("reasoning"))),
                usage.total_tokens,
            ),
        )
        if body.stores and self.store is not None:
            conversation = [*body.conversation, blocks.as_message()]
            self.store.put(StoredResponse(response, conversation, shown_items(body.items, body.response_id)))
        return response

    def response(self, body: ResponseRequest, run: Run, created: int, status: Status, **rest: Any) -> Response:
        """The response as it now stands; `rest` are fields of Response that are not the request's."""
        source, sampling = body.source, run.choices[0].request.sampling
        return Response(
            id=body.response_id,
            created_at=created,
            status=status,
            model=run.model.name,
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
            text=source.text or TextConfig(),
            tools=source.tools or [],
            tool_choice=source.tool_choice or "auto",
            **rest,
        )

    def _num_tokens(self, text: str) -> int:
        tokenizer = self.context.tokenizer
        return len(tokenizer.encode(text, False)) if text and tokenizer is not None else 0


def _decoded(raw: bytes, ignored: Ignored, vocab_size: int) -> ResponsesBody:
    try:
        return decode(raw, ResponsesBody, ignored, vocab_size)
    except APIError as error:
        if error.param is not None and _BUILT_IN.fullmatch(error.param):
            error.message += " (the server has no tools of its own)"
            error.code = "unsupported_parameter"
        raise


def _of_tools(source: ResponsesBody) -> dict[str, Any]:
    """A chat's fields for the tools. An empty list is none."""
    tools = [
        Tool("function", Function(tool.name, tool.description, tool.parameters, tool.strict))
        for tool in source.tools or ()
    ]
    choice = source.tool_choice
    if choice is not None and not isinstance(choice, str):
        return {"tools": tools or None, "tool_choice": NamedToolChoice("function", FunctionChoice(choice.name))}
    return {"tools": tools or None, "tool_choice": None if choice == "auto" and not tools else choice}


def _response_format(text: TextConfig | None) -> ChatObjectFormat | ChatSchemaFormat | None:
    wanted = None if text is None else text.format
    if isinstance(wanted, JsonObjectFormat):
        return ChatObjectFormat()
    if isinstance(wanted, JsonSchemaFormat):
        return ChatSchemaFormat(NamedSchema(wanted.schema, wanted.name, wanted.description, wanted.strict))
    return None
