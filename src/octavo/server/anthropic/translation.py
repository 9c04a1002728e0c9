"""A body of the Messages API as the chat that it is."""

from __future__ import annotations

from itertools import groupby
from typing import Any

import msgspec

from octavo.server.anthropic.schema import (
    AnyChoice,
    AutoChoice,
    Block,
    CountBody,
    NoChoice,
    Role,
    TextBlock,
    Thinking,
    ThinkingAdaptive,
    ThinkingOff,
    ThinkingOn,
    ToolChoice,
    ToolResult,
    ToolUse,
    Turn,
)
from octavo.server.openai.errors import invalid
from octavo.server.openai.schema import (
    ChatBody,
    Function,
    FunctionCall,
    FunctionChoice,
    Message,
    NamedToolChoice,
    TextPart,
    Tool,
    ToolCall,
)
from octavo.server.openai.structured import JsonSchemaFormat, NamedSchema

# The blocks that a role's turn may have.
_BLOCKS: dict[Role, tuple[type[msgspec.Struct], ...]] = {
    "user": (TextBlock, ToolResult),
    "assistant": (TextBlock, ToolUse, Thinking),
    "system": (TextBlock,),
}


def as_chat(body: CountBody, reasons: bool, **fields: Any) -> ChatBody:
    """The body as a chat. A last turn of the assistant's is continued.

    reasons: whether the server tells reasoning from text. Raises APIError 400 for what it cannot be told of.
    """
    messages = [] if body.system is None else [Message("system", _content(body.system))]
    at = 0
    for role, turns in groupby(body.messages, key=lambda turn: turn.role):
        several = list(turns)
        _check_blocks(role, several, at)
        at += len(several)
        messages += _messages(role, several)
    continues = body.messages[-1].role == "assistant"
    if continues and messages[-1].tool_calls:
        raise invalid(
            "messages: the last turn is the assistant's and has a tool_use, which needs its result", "messages"
        )
    return ChatBody(
        model=body.model,
        messages=messages,
        continue_final_message=continues,
        add_generation_prompt=not continues,
        chat_template_kwargs=body.chat_template_kwargs,
        include_reasoning=_shows_reasoning(body, reasons),
        thinking_token_budget=body.thinking.budget_tokens if isinstance(body.thinking, ThinkingOn) else None,
        response_format=_response_format(body),
        **_of_tools(body),
        **fields,
    )


def _check_blocks(role: Role, turns: list[Turn], first: int) -> None:
    for index, turn in enumerate(turns, start=first):
        for number, block in enumerate(turn.content if isinstance(turn.content, list) else ()):
            if not isinstance(block, _BLOCKS[role]):
                kind = block.__struct_config__.tag
                path = f"messages[{index}].content[{number}].type"
                allowed = ", ".join(str(own.__struct_config__.tag) for own in _BLOCKS[role])
                raise invalid(f"{path}={kind!r} is not allowed for the role {role}; allowed: {allowed}", path)


def _messages(role: Role, turns: list[Turn]) -> list[Message]:
    """The messages of one role's neighbouring turns. Results come ahead of what is said beside them, as the API
    demands; what an assistant thought, said and called is one message."""
    if len(turns) == 1 and isinstance(turns[0].content, str):
        return [Message(role, turns[0].content)]
    blocks = [block for turn in turns for block in _blocks(turn)]
    results = [_result(block) for block in blocks if isinstance(block, ToolResult)]
    texts = [TextPart("text", block.text) for block in blocks if isinstance(block, TextBlock)]
    calls = [_call(block) for block in blocks if isinstance(block, ToolUse)]
    thoughts = "".join(block.thinking for block in blocks if isinstance(block, Thinking))
    if results and not texts:
        return results
    content = texts or (None if calls else "")
    return [*results, Message(role, content, tool_calls=calls or None, reasoning=thoughts or None)]


def _blocks(turn: Turn) -> list[Block]:
    return [TextBlock(turn.content)] if isinstance(turn.content, str) else turn.content


def _content(content: str | list[TextBlock]) -> str | list[TextPart]:
    return content if isinstance(content, str) else [TextPart("text", block.text) for block in content]


def _call(block: ToolUse) -> ToolCall:
    return ToolCall(block.id, FunctionCall(block.name, msgspec.json.encode(block.input).decode()))


def _result(block: ToolResult) -> Message:
    content = _content(block.content or "")
    if block.is_error:
        content = f"Error: {content}" if isinstance(content, str) else [TextPart("text", "Error: "), *content]
    return Message("tool", content, tool_call_id=block.tool_use_id)


def _of_tools(body: CountBody) -> dict[str, Any]:
    tools = [
        Tool("function", Function(tool.name, tool.description, tool.input_schema, tool.strict))
        for tool in body.tools or ()
    ]
    choice = body.tool_choice
    named = NamedToolChoice("function", FunctionChoice(choice.name)) if isinstance(choice, ToolChoice) else None
    words: dict[type, str | None] = {AnyChoice: "required", NoChoice: "none", AutoChoice: "auto" if tools else None}
    single = isinstance(choice, (AutoChoice, AnyChoice, ToolChoice)) and choice.disable_parallel_tool_use
    return {
        "tools": tools or None,
        "tool_choice": named or words.get(type(choice)),
        "parallel_tool_calls": False if single else None,
    }


def _shows_reasoning(body: CountBody, reasons: bool) -> bool | None:
    if isinstance(body.thinking, (ThinkingOn, ThinkingAdaptive)) and not reasons:
        kind = body.thinking.__struct_config__.tag
        message = f"thinking.type={kind!r} needs a server that tells reasoning from text (--reasoning-parser NAME)"
        raise invalid(f"{message}; allowed: disabled", "thinking.type")
    return False if isinstance(body.thinking, ThinkingOff) and reasons else None


def _response_format(body: CountBody) -> JsonSchemaFormat | None:
    wanted = None if body.output_config is None else body.output_config.format
    return None if wanted is None else JsonSchemaFormat(NamedSchema(wanted.schema))
