"""The items of a response's input, and the messages of a chat that they are."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from octavo.server.openai.errors import invalid
from octavo.server.openai.schema import FunctionCall, FunctionName, Label, Message, TextPart, ToolCall

_Nothing = Annotated[list[Any], Meta(max_length=0)]


class InputPart(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """One part of a text. annotations and logprobs are what clients send back of an answer, which has none."""

    type: Literal["input_text", "output_text", "reasoning_text", "summary_text"]
    text: str
    annotations: _Nothing | None = None
    logprobs: _Nothing | None = None


_Parts = Annotated[list[InputPart], Meta(min_length=1)]


class InputItem(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """One item of the input; which of the fields it has depends on its type (_FIELDS).

    message: role, content. function_call, one that the model made: call_id, name, arguments (a JSON object as text).
    function_call_output: call_id of that call, output. reasoning, of what the model says next: content, or else
    summary.
    id and status are what clients send back of an answer's item; they change nothing. So are the null-only fields.
    """

    type: Literal["message", "function_call", "function_call_output", "reasoning"] = "message"
    role: Literal["user", "assistant", "system", "developer"] | None = None
    content: str | _Parts | None = None
    call_id: Label | None = None
    name: FunctionName | None = None
    arguments: str | None = None
    output: str | _Parts | None = None
    summary: list[InputPart] | None = None
    id: Label | None = None
    status: Literal["in_progress", "completed", "incomplete"] | None = None
    phase: None = None
    encrypted_content: None = None
    caller: None = None
    namespace: None = None


# Of each type: the fields that it needs, and those that it may have.
_FIELDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "message": (("role", "content"), ()),
    "function_call": (("call_id", "name", "arguments"), ()),
    "function_call_output": (("call_id", "output"), ()),
    "reasoning": ((), ("content", "summary")),
}
_ALL = ("role", "content", "call_id", "name", "arguments", "output", "summary")


def check_item(item: InputItem, at: str) -> None:
    """Raises APIError 400 for a field that its type needs or does not have."""
    needed, optional = _FIELDS[item.type]
    for name in _ALL:
        given = getattr(item, name) is not None
        if name in needed and not given:
            raise invalid(f"missing required field '{at}.{name}'", f"{at}.{name}", "missing_required_parameter")
        if given and name not in needed and name not in optional:
            raise invalid(f"{at}.{name} is not a field of a {item.type}", f"{at}.{name}", "unknown_parameter")
    if item.type == "reasoning" and isinstance(item.content, str):
        raise invalid(f"{at}.content is not a list of parts", f"{at}.content", "invalid_type")
    if item.arguments is not None:
        try:
            msgspec.json.decode(item.arguments, type=dict[str, msgspec.Raw])
        except (msgspec.DecodeError, RecursionError):
            raise invalid(f"{at}.arguments is not a JSON object", f"{at}.arguments") from None


def with_items(messages: list[Message], items: list[InputItem]) -> list[Message]:
    """The conversation and what the items add: what the assistant thought, said and then called is one message.

    For items that have been checked.
    """
    found = list(messages)
    reasoning = ""  # of the assistant's message that is to come
    for item in items:
        if item.type == "reasoning":
            reasoning += "".join(part.text for part in _parts(item.content or item.summary))
            continue
        calls = item.type == "function_call"
        if reasoning and not calls and item.role != "assistant":  # it had been cut off
            found.append(Message("assistant", "", reasoning=reasoning))
            reasoning = ""
        if calls:
            call = ToolCall(item.call_id or "", FunctionCall(item.name or "", item.arguments or ""))
            if not reasoning and found and found[-1].role == "assistant":
                found[-1] = msgspec.structs.replace(found[-1], tool_calls=[*(found[-1].tool_calls or ()), call])
            else:
                found.append(Message("assistant", tool_calls=[call], reasoning=reasoning or None))
        elif item.type == "function_call_output":
            found.append(Message("tool", _content(item.output), tool_call_id=item.call_id))
        else:
            found.append(Message(item.role or "user", _content(item.content), reasoning=reasoning or None))
        reasoning = ""
    return [*found, Message("assistant", "", reasoning=reasoning)] if reasoning else found


def shown_items(items: list[InputItem], response_id: str) -> list[dict[str, Any]]:
    """The items as a list of them has them: each with an id, texts in parts."""
    return [_shown(item, f"{response_id.removeprefix('resp')}_in{index}") for index, item in enumerate(items)]


_PREFIXES = {"message": "msg", "function_call": "fc", "function_call_output": "fco", "reasoning": "rs"}


def _shown(item: InputItem, suffix: str) -> dict[str, Any]:
    needed, optional = _FIELDS[item.type]
    fields = {name: getattr(item, name) for name in (*needed, *optional)}
    if item.type == "message":
        kind: Literal["input_text", "output_text"] = "output_text" if item.role == "assistant" else "input_text"
        if isinstance(item.content, str):
            fields["content"] = [InputPart(kind, item.content)]
    shown = {name: msgspec.to_builtins(value) for name, value in fields.items()}
    for part in shown.get("content") or ():
        for name in ("annotations", "logprobs"):
            if part[name] is None:
                del part[name]
        if part["type"] == "output_text":
            part.setdefault("annotations", [])
    if item.type == "reasoning":
        shown["summary"] = shown["summary"] or []
    own_id = item.id or _PREFIXES[item.type] + suffix
    return {"type": item.type, "id": own_id, "status": item.status or "completed", **shown}


def _parts(content: str | list[InputPart] | None) -> list[InputPart]:
    return content if isinstance(content, list) else []


def _content(content: str | list[InputPart] | None) -> str | list[TextPart]:
    return content or "" if not isinstance(content, list) else [TextPart("text", part.text) for part in content]
