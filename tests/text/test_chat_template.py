"""Chat templates: the models' own against the reference library, and the rules of rendering."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from real_tokenizers import Pair, gguf_reference, pair_of

import octavo.text.chat_template
from octavo.text.chat_template import ChatTemplate, load_chat_template
from octavo.text.tokenizer import Tokenizer, load_tokenizer

USER = {"role": "user", "content": 'Hi <b>there</b> & "you" 你好\n'}
SYSTEM = {"role": "system", "content": " Be brief. "}
ASSISTANT = {"role": "assistant", "content": "<think>\nhm\n</think>\n\nHello  "}
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Wetter in Köln's <city>",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CALL = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": {"city": "Köln", "n": 2}}}
CONVERSATIONS = (
    [USER],
    [SYSTEM, USER],
    [USER, ASSISTANT, {"role": "user", "content": "And?"}],
    [SYSTEM, USER, ASSISTANT, {"role": "user", "content": ""}],
)


@pytest.mark.parametrize("add_generation_prompt", [False, True])
def test_equals_the_reference(chat_pair: Pair, add_generation_prompt: bool) -> None:
    template = ChatTemplate.of(chat_pair.ours)
    for messages in CONVERSATIONS:
        expected = chat_pair.reference.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt
        )
        assert template.render(messages, add_generation_prompt) == expected


def test_ids_equal_the_reference(chat_pair: Pair) -> None:
    text = ChatTemplate.of(chat_pair.ours).render(CONVERSATIONS[1])
    expected = chat_pair.reference.apply_chat_template(CONVERSATIONS[1], add_generation_prompt=True, return_dict=False)
    assert chat_pair.ours.encode(text, add_special_tokens=False) == expected


def test_tools_and_template_variables_equal_the_reference() -> None:
    pair = pair_of("qwen3")
    template = ChatTemplate.of(pair.ours)
    messages: list[dict[str, Any]] = [
        USER,
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "12 °C", "tool_call_id": "call_1"},
    ]
    for variables in ({}, {"enable_thinking": False}, {"enable_thinking": True}):
        expected = pair.reference.apply_chat_template(
            messages, tools=[TOOL], tokenize=False, add_generation_prompt=True, **variables
        )
        assert template.render(messages, tools=[TOOL], **variables) == expected
    as_text = copy.deepcopy(messages)
    as_text[1]["content"] = None  # as the OpenAI API has them
    as_text[1]["tool_calls"][0]["function"]["arguments"] = '{"city": "K\\u00f6ln", "n": 2}'
    sent = copy.deepcopy(as_text)
    assert template.render(as_text, tools=[TOOL], enable_thinking=True) == expected
    assert as_text == sent  # the caller's messages are left alone


def test_an_open_end_equals_the_reference(chat_pair: Pair) -> None:
    template = ChatTemplate.of(chat_pair.ours)
    for end in ("The answer", "The answer is ", "x"):
        messages = [USER, {"role": "assistant", "content": end}]
        expected = chat_pair.reference.apply_chat_template(messages, tokenize=False, continue_final_message=True)
        text = template.render(messages, add_generation_prompt=False, continue_final_message=True)
        assert text == expected
        assert text.rstrip().endswith(end.rstrip())


def test_smollm2_equals_the_reference(smollm2_path: Path) -> None:
    tokenizer = load_tokenizer(smollm2_path)
    reference = gguf_reference(smollm2_path)
    for messages in CONVERSATIONS:
        expected = reference.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert ChatTemplate.of(tokenizer).render(messages) == expected


# --- the form of messages ---------------------------------------------------------------------------------------

STRINGS = "{% for m in messages %}[{{ m['role'] }}:{{ m.content }}]{% endfor %}"
PARTS = "{% for m in messages %}{% for c in m['content'] %}<{{ c.type }}:{{ c.text }}>{% endfor %}{% endfor %}"
BOTH = (
    "{% for m in messages %}{% if m.content is string %}={{ m.content }}{% else %}"
    "{% set content = m.content %}{% for c in content %}<{{ c.text }}>{% endfor %}{% endif %}{% endfor %}"
)
MACRO = (
    "{% macro show(content) %}{% for c in content %}<{{ c.text }}>{% endfor %}{% endmacro %}"
    "{{ show(messages[0].content) }}"
)
TWO_PARTS = {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}
STRING = {"role": "user", "content": "ab"}
NOTHING = {"role": "assistant", "content": None}


@pytest.mark.parametrize(
    ("source", "message", "expected"),
    [
        (STRINGS, TWO_PARTS, "[user:a\nb]"),
        (STRINGS, STRING, "[user:ab]"),
        (STRINGS, NOTHING, "[assistant:]"),
        (STRINGS, {"role": "user", "content": ["x", "y"]}, "[user:x\ny]"),
        (STRINGS, {"role": "user"}, "[user:]"),
        (PARTS, TWO_PARTS, "<text:a><text:b>"),
        (PARTS, STRING, "<text:ab>"),
        (PARTS, NOTHING, ""),
        (BOTH, TWO_PARTS, "<a><b>"),
        (BOTH, STRING, "=ab"),
        (MACRO, TWO_PARTS, "<a><b>"),
    ],
)
def test_content_has_the_form_that_the_template_takes(source: str, message: dict[str, Any], expected: str) -> None:
    assert ChatTemplate(source).render([message]) == expected


def test_an_open_end_in_parts() -> None:
    text = ChatTemplate(PARTS).render([TWO_PARTS], add_generation_prompt=False, continue_final_message=True)
    assert text == "<text:a><text:b"


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "messages is empty"),
        (["hi"], "not an object with a role"),
        ([{"content": "x"}], "not an object with a role"),
        ([{"role": "user", "content": 5}], "neither a string nor a list"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], "type 'image_url' is not supported"),
        ([{"role": "user", "content": [{"type": "text"}]}], "'text' is not supported|type 'text'"),
        ([{"role": "user", "content": [7]}], "type None is not supported"),
        (
            [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}],
            "arguments of a tool call are not JSON",
        ),
    ],
)
def test_messages_of_the_wrong_form(messages: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ChatTemplate(STRINGS).render(messages)


def test_open_ends_that_cannot_be() -> None:
    template = ChatTemplate(STRINGS)
    with pytest.raises(ValueError, match="exclude each other"):
        template.render([STRING], continue_final_message=True)
    with pytest.raises(ValueError, match="no text to continue"):
        template.render([{"role": "assistant"}], add_generation_prompt=False, continue_final_message=True)
    with pytest.raises(ValueError, match="leaves out the last message"):
        ChatTemplate("x").render([STRING], add_generation_prompt=False, continue_final_message=True)


# --- the dialect ------------------------------------------------------------------------------------------------


def render(source: str, **variables: Any) -> str:
    return ChatTemplate(source, "<s>", None).render([STRING], **variables)


def test_the_dialect() -> None:
    assert render("{{ bos_token }}|{{ eos_token }}|{{ tools is none }}|{{ x }}", x=3) == "<s>||True|3"
    assert render("  {% if true %}\na\n  {% endif %}\n") == "a\n"  # trim_blocks, lstrip_blocks
    assert render("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}") == "01"
    assert render("{{ {'b': '<é>', 'a': 1} | tojson }}") == '{"b": "<é>", "a": 1}'
    assert render("{{ [1] | tojson(indent=2) }}") == "[\n  1\n]"
    assert render("{% generation %}{{ 'x' }}{% endgeneration %}y") == "xy"
    assert len(render("{{ strftime_now('%Y') }}")) == 4


def test_a_refusal_has_the_templates_words() -> None:
    with pytest.raises(ValueError, match=r"chat template: Roles must alternate"):
        render("{{ raise_exception('Roles must alternate') }}")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ ().__class__.__bases__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ messages[0].update(a=1) }}", "unsafe"),
        ("{% for i in range(10000000) %}{% endfor %}", "Range too big"),
        ("{{ nothing.at.all }}", "undefined"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ 'a' + 1 }}", "concatenate"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{% include 'x' %}", "no loader"),
    ],
)
def test_the_sandbox_holds(source: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        render(source)


def test_a_text_without_end_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(octavo.text.chat_template, "MAX_RENDERED_CHARACTERS", 100)
    assert len(render("{% for i in range(50) %}ab{% endfor %}")) == 100
    with pytest.raises(ValueError, match="longer than 100 characters"):
        render("{% for i in range(51) %}ab{% endfor %}")


def test_a_syntax_error_has_its_line() -> None:
    with pytest.raises(ValueError, match="error in line 2"):
        ChatTemplate("a\n{% if %}")


def test_threads_render_at_once() -> None:
    template = ChatTemplate(STRINGS)
    with ThreadPoolExecutor(4) as pool:
        texts = list(pool.map(lambda n: template.render([{"role": "u", "content": str(n)}]), range(200)))
    assert texts == [f"[u:{n}]" for n in range(200)]


# --- where the template comes from ------------------------------------------------------------------------------


def test_without_a_template_it_says_how_to_give_one(llama2: Tokenizer) -> None:
    with pytest.raises(ValueError, match="no chat template; give one with --chat-template"):
        ChatTemplate.of(llama2)
    assert ChatTemplate.of(llama2, "{{ bos_token }}{{ eos_token }}").render([STRING]) == "<s></s>"


def test_a_template_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "chat.jinja"
    path.write_text("é\n", encoding="utf-8")
    assert load_chat_template(path) == "é\n"
    path.write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"chat\.jinja is not UTF-8"):
        load_chat_template(path)
    with pytest.raises(FileNotFoundError, match=r"none\.jinja"):
        load_chat_template(tmp_path / "none.jinja")


# As DeepSeek-V3's template writes calls: it tells them by a content of none, and joins the arguments as text.
TEXT_ARGUMENTS = (
    "{% for m in messages %}{% if m['content'] is none %}{% for c in m['tool_calls'] %}"
    "{{ c['function']['name'] + ' ' + c['function']['arguments'] }}{% endfor %}"
    "{% else %}{{ m['content'] }};{% endif %}{% endfor %}"
)


def test_a_template_gets_content_and_arguments_in_the_form_that_it_takes() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a":1}'}}
    messages = [USER, {"role": "assistant", "content": None, "tool_calls": [call]}]
    assert ChatTemplate(TEXT_ARGUMENTS).render(messages) == f'{USER["content"]};f {{"a":1}}'
    parsed = "{% for m in messages %}[{{ m.content }}]{{ m.tool_calls[0].function.arguments.a }}{% endfor %}"
    assert ChatTemplate(parsed).render(messages[1:]) == "[]1"


@pytest.mark.parametrize(
    ("source", "shows"),
    [
        ("{% if tools %}{{ tools | tojson }}{% endif %}", True),
        ("{% for tool in tools %}{{ tool.name }}{% endfor %}", True),
        ("{{ messages[0].tool_calls }} tools", False),
    ],
)
def test_whether_a_template_shows_tools(source: str, shows: bool) -> None:
    assert ChatTemplate(source).shows_tools is shows
    assert ChatTemplate(source).source == source


def test_the_form_of_contents_may_be_given() -> None:
    source = "{% for m in messages %}{% for part in m.content %}<{{ part.text }}>{% endfor %}{% endfor %}"
    parts = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    whole = "{{ messages[0].content }}"
    assert ChatTemplate(source).render(parts) == ChatTemplate(source, content_format="openai").render(parts) == "<a><b>"
    assert ChatTemplate(whole).render(parts) == "a\nb"
    assert ChatTemplate(source, content_format="string").render(parts) == "<><><>"  # the letters have no text
    assert ChatTemplate(whole, content_format="openai").render(parts) == str(parts[0]["content"])
    with pytest.raises(ValueError, match="chat_template_content_format='x' is unknown; allowed: auto, string, openai"):
        ChatTemplate(whole, content_format="x")  # type: ignore[arg-type]
