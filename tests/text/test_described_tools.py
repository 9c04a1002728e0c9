"""Tools in front of a template that knows none."""

from __future__ import annotations

import json
from typing import Any

import pytest

from octavo.text.chat_template import ChatTemplate
from octavo.text.described_tools import with_described_tools

PLAIN = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
# As the first Mistral models: no system message, and roles alternate.
STRICT = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
)
SILENT = "{% for m in messages if m.role != 'system' %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
FUNCTIONS = [{"name": "f", "description": "Größe", "parameters": {"type": "object"}}, {"name": "g"}]
TOOLS = [{"type": "function", "function": function} for function in FUNCTIONS]
USER = {"role": "user", "content": "hi"}


def call(name: str, arguments: Any) -> dict[str, Any]:
    return {"id": "1", "type": "function", "function": {"name": name, "arguments": arguments}}


HISTORY = [
    USER,
    {"role": "assistant", "content": "Let me see.", "tool_calls": [call("f", '{"a": "ö"}'), call("g", {})]},
    {"role": "tool", "tool_call_id": "1", "content": "5"},
    {"role": "tool", "tool_call_id": "2", "content": [{"type": "text", "text": "6"}, {"type": "text", "text": "7"}]},
    {"role": "user", "content": "And?"},
]
WRITTEN = (
    '<assistant>Let me see.\n<tool_call>\n{"name": "f", "arguments": {"a": "ö"}}\n</tool_call>\n'
    '<tool_call>\n{"name": "g", "arguments": {}}\n</tool_call>\n'
    "<user><tool_response>\n5\n</tool_response>\n<tool_response>\n6\n7\n</tool_response>\nAnd?\n"
)


def test_tools_are_described_in_the_system_message() -> None:
    for opening in ([], [{"role": "system", "content": "Be kind."}], [{"role": "developer", "content": "Be kind."}]):
        text = ChatTemplate(PLAIN).render([*opening, USER], tools=TOOLS)
        system, _, rest = text.partition("<user>")
        role = opening[0]["role"] if opening else "system"
        assert system.startswith(f"<{role}>Be kind.\n\n" if opening else "<system>")
        assert rest == "hi\n"
        listed = system[system.index("<tools>\n") + 8 : system.index("\n</tools>")]
        assert [json.loads(line) for line in listed.splitlines()] == FUNCTIONS
        assert "Größe" in listed
        assert '<tool_call>\n{"name": ' in system


@pytest.mark.parametrize("source", [STRICT, SILENT])
def test_without_a_system_message_they_stand_before_the_first_question(source: str) -> None:
    text = ChatTemplate(source).render(HISTORY, tools=TOOLS)
    assert text.startswith("<user>Functions")
    assert text.endswith("without a call.\n\nhi\n" + WRITTEN)


def test_calls_and_results_are_text_with_tools_and_without() -> None:
    for tools in (TOOLS, None):
        assert ChatTemplate(PLAIN).render(HISTORY, tools=tools).endswith("<user>hi\n" + WRITTEN)
    only_results = [USER, {"role": "assistant", "tool_calls": [call("g", None)]}, HISTORY[2]]
    assert ChatTemplate(PLAIN).render(only_results) == (
        '<user>hi\n<assistant><tool_call>\n{"name": "g", "arguments": {}}\n</tool_call>\n'
        "<user><tool_response>\n5\n</tool_response>\n"
    )


def test_a_template_that_writes_calls_keeps_to_its_own_way() -> None:
    source = PLAIN.replace(
        "{{ m.content }}", "{% for c in m.tool_calls %}{{ c.function.name }}{% endfor %}{{ m.content }}"
    )
    assert ChatTemplate(source).render(HISTORY).startswith("<user>hi\n<assistant>fgLet me see.\n<tool>5\n")


def test_the_callers_messages_are_left_alone_and_other_fields_come_through() -> None:
    kept = json.dumps(HISTORY)
    rewritten = with_described_tools([{**HISTORY[1], "reasoning": "hm"}], TOOLS, takes_system=True)
    assert (rewritten[1]["reasoning"], "tool_calls" in rewritten[1]) == ("hm", False)
    assert json.dumps(HISTORY) == kept


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ({"role": "assistant", "tool_calls": [call("f", "[1]")]}, "not a JSON object"),
        ({"role": "assistant", "tool_calls": [call("f", "{")]}, "not JSON"),
        ({"role": "assistant", "tool_calls": [5]}, "no function with a name"),
        ({"role": "tool", "content": [{"type": "image"}]}, "not text"),
        ({"role": "tool", "content": 5}, "neither a string nor a list"),
        (5, "not an object with a role"),
    ],
)
def test_what_cannot_be_written(message: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ChatTemplate(PLAIN).render([USER, message], tools=TOOLS)
