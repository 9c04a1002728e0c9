"""What LLM.chat takes besides a conversation, with tools above all."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from octavo.text.chat_rendering import rendered_chats

QUESTION = [{"role": "user", "content": "What is the weather in Oslo?"}]
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
SOURCE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% if not loop.last %};{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}{{ mood }}"
)
TOKENIZER: Any = SimpleNamespace(
    chat_template=SOURCE, bos_token="<s>", eos_token=None, encode=lambda text, **_: list(text.encode())
)


def prompt(messages: Any, **rendering: Any) -> str:
    [found] = rendered_chats(TOKENIZER, [messages], rendering)  # type: ignore[arg-type]
    assert found.text is not None
    assert found.token_ids == list(found.text.encode())
    return found.text


def test_tools_are_shown_where_the_template_knows_none() -> None:
    text = prompt(QUESTION, tools=TOOLS)
    assert text.startswith("<system>Functions")
    assert '{"name": "weather", "parameters": {"type": "object"}}' in text
    call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
    history = [
        *QUESTION,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "Snow"},
    ]
    assert prompt(history, tools=TOOLS).endswith(
        '<assistant><tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>;'
        "<user><tool_response>\nSnow\n</tool_response><assistant>"
    )


def test_a_template_of_the_callers_gets_the_tools_and_its_variables() -> None:
    source = (
        "{{ bos_token }}{{ tools[0].function.name }} {{ messages[0].content }} {{ mood }}{{ add_generation_prompt }}"
    )
    parts = [{"role": "user", "content": [{"type": "text", "text": "x"}]}]
    rendering: dict[str, Any] = {"chat_template": source, "chat_template_kwargs": {"mood": "!"}, "tools": TOOLS}
    assert prompt(parts, **rendering) == "<s>weather x !True"
    given = prompt(parts, chat_template_content_format="openai", add_generation_prompt=False, **rendering)
    assert given == f"<s>weather {parts[0]['content']} !False"
    opened = [*QUESTION, {"role": "assistant", "content": "It is"}]
    text = prompt(opened, tools=[], add_generation_prompt=False, continue_final_message=True)
    assert text.endswith("?;<assistant>It is")


@pytest.mark.parametrize(
    ("rendering", "error", "words"),
    [
        ({"lora_request": None}, TypeError, "no argument 'lora_request'"),
        ({"mm_processor_kwargs": {}}, ValueError, "mm_processor_kwargs={} is not supported"),
        ({"chat_template_content_format": "x"}, ValueError, "chat_template_content_format='x'"),
        ({"chat_template_kwargs": {"tools": []}}, ValueError, "chat_template_kwargs has 'tools'"),
        ({"continue_final_message": True}, ValueError, "exclude each other"),
        ({"tools": TOOLS * 2}, ValueError, r"tools\[1\]\.function\.name='weather' is there twice"),
        ({"tools": [{"name": "f"}]}, ValueError, r"tools\[0\] is not"),
        ({"tools": "f"}, ValueError, "tools=f is not a list"),
        ({"tool": []}, TypeError, "no argument 'tool'; did you mean 'tools'"),
        ({"tool_choice": "auto"}, TypeError, "no argument 'tool_choice'"),
    ],
)
def test_what_is_refused(rendering: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        prompt(QUESTION, **rendering)
