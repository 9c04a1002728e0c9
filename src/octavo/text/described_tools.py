"""Tools for a chat template that knows none: described in words, and calls and results written out as text.

The convention is that of Hermes 2 Pro (NousResearch, "Function Calling Dataset and Prompt Format"), which
`structured.tools.hermes` reads: <tool_call>{"name": …, "arguments": {…}}</tool_call>, and <tool_response> around a
result.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

Message = Mapping[str, Any]

PARSER = "hermes"  # the tool parser that reads what `with_described_tools` asks for

_INSTRUCTIONS = """\
Functions are at hand that you may call, one JSON object a line:
<tools>
{tools}
</tools>
Call a function by writing its name and its arguments, which follow the JSON schema of its parameters, like this:
<tool_call>
{{"name": "the function's name", "arguments": {{"an argument's name": "its value"}}}}
</tool_call>
The result comes within <tool_response> and </tool_response>. Where no function helps, answer without a call."""


def with_described_tools(
    messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None, *, takes_system: bool
) -> list[dict[str, Any]]:
    """The conversation as system, user and assistant messages of plain text; messages that say nothing of tools stay.

    tools: as in the OpenAI API, shown in the first system message (a new one where there is none), or ahead of the
    first user message where the template takes no system message. Results stand in a turn of the user's, together
    with those next to them and with what the user says next, so that roles alternate if they did before.
    Raises ValueError for a call whose arguments are not a JSON object, and for content that is not text.
    """
    written: list[dict[str, Any]] = []
    among_results = False  # the last turn written began with a result
    for message in messages:
        role, calls = message.get("role"), message.get("tool_calls")
        if role == "tool" or (role == "user" and among_results):
            text = f"<tool_response>\n{_text(message)}\n</tool_response>" if role == "tool" else _text(message)
            if among_results:
                written[-1]["content"] += "\n" + text
            else:
                written.append({"role": "user", "content": text})
            among_results = True
            continue
        among_results = False
        plain = {key: value for key, value in message.items() if key != "tool_calls"}
        if calls:
            plain["content"] = "\n".join([*filter(None, [_text(message)]), *map(_call, calls)])
        written.append(plain)
    return _described(written, tools, takes_system) if tools else written


def _described(
    messages: list[dict[str, Any]], tools: Sequence[Mapping[str, Any]], takes_system: bool
) -> list[dict[str, Any]]:
    lines = [json.dumps(tool.get("function", tool), ensure_ascii=False) for tool in tools]
    instructions = _INSTRUCTIONS.format(tools="\n".join(lines))
    roles = ("system", "developer") if takes_system else ("user",)
    first = next((i for i, message in enumerate(messages) if message.get("role") in roles), None)
    if first is None or (takes_system and first > 0):
        return [{"role": roles[0], "content": instructions}, *messages]
    texts = [_text(messages[first]), instructions]
    messages[first]["content"] = "\n\n".join(filter(None, texts if takes_system else reversed(texts)))
    return messages


def _call(call: Mapping[str, Any]) -> str:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise ValueError(f"a tool call has no function with a name: {str(call)[:100]!r}")
    arguments = function.get("arguments")
    try:
        value = json.loads(arguments or "{}") if isinstance(arguments, str) or arguments is None else arguments
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the arguments of a tool call are not JSON: {error}") from None
    if not isinstance(value, Mapping):
        raise ValueError(f"the arguments of a tool call are not a JSON object: {str(value)[:100]!r}")
    body = json.dumps({"name": function["name"], "arguments": value}, ensure_ascii=False)
    return f"<tool_call>\n{body}\n</tool_call>"


def _text(message: Message) -> str:
    content = message.get("content")
    if isinstance(content, str) or content is None:
        return content or ""
    if not isinstance(content, list):
        raise ValueError("a message's content is neither a string nor a list of parts")
    texts = [part.get("text") if isinstance(part, Mapping) else part for part in content]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError("a content part beside tools is not text; supported: 'text'")
    return "\n".join(texts)
