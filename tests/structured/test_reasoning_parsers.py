"""Reasoning and answer, told apart however the text is cut."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from parser_rig import FUNCTIONS, check_every_cut, events_of, merged

from octavo.structured.chat_output import output_parser
from octavo.structured.events import collect
from octavo.structured.reasoning.registry import REASONING_PARSERS, reasoning_marks

HARMONY = "<|channel|>analysis<|message|>hm, 2<|end|><|start|>assistant<|channel|>final<|message|>yes<|return|>"

# parser, end of the prompt, output, reasoning, content
CASES = [
    ("deepseek_r1", "", "<think>\nhm\n\nso\n</think>\n\nyes\n", "hm\n\nso", "yes\n"),
    ("deepseek_r1", "<think>\n", "hm\n</think>yes", "hm", "yes"),
    ("deepseek_r1", "", "hm, no end", "hm, no end", ""),
    ("deepseek_r1", "<think>\n\n</think>\n\n", "yes", "", "yes"),
    ("qwen3", "", "<think>\nhm\n</think>\n\nyes", "hm", "yes"),
    ("qwen3", "", "<think>\n\n</think>\n\nyes", "", "yes"),
    ("qwen3", "", "  yes, no <think>", "", "  yes, no <think>"),
    ("qwen3", "<think>\n", "hm\n</think>\n\nyes </think>", "hm", "yes </think>"),
    ("qwen3", "<think>\n\n</think>\n\n", "yes", "", "yes"),
    ("qwen3", "", "<think>cut o </thin", "cut o </thin", ""),
    ("mistral", "", "[THINK]hm[/THINK]yes", "hm", "yes"),
    ("mistral", "", "yes", "", "yes"),
    ("granite", "", "Here is my thought process:\nhm\nHere's my response: yes", "hm", "yes"),
    ("granite", "", "Here is my opinion", "", "Here is my opinion"),
    ("openai_gptoss", "", HARMONY, "hm, 2", "yes"),
    ("openai_gptoss", "", "<|channel|>analysis<|message|>cut o", "cut o", ""),
    ("openai_gptoss", "", f"<|channel|>analysis<|message|>so:<|end|><|start|>assistant{HARMONY}", "so:\nhm, 2", "yes"),
    (
        "openai_gptoss",
        "",
        "<|channel|>analysis<|message|>a\n\n<|end|><|channel|>analysis<|message|><|end|>"
        "<|channel|>commentary<|message|>b<|end|><|channel|>analysis<|message|>c",
        "a\n\n\nc",
        "b",
    ),
    ("openai_gptoss", "", "<|channel|>commentary<|message|>Let me see.<|end|>", "", "Let me see."),
]


@pytest.mark.parametrize(("name", "prompt", "text", "reasoning", "content"), CASES)
def test_reasoning_and_answer(name: str, prompt: str, text: str, reasoning: str, content: str) -> None:
    whole = collect(check_every_cut(lambda: REASONING_PARSERS[name](prompt), text))
    assert (whole.reasoning, whole.content, whole.calls) == (reasoning, content, [])


@pytest.mark.parametrize(
    ("name", "begun", "text", "reasoning", "content"),
    [
        ("qwen3", "<think>\nWell, ", "hm\n</think>\n\nyes", "hm", "yes"),
        ("qwen3", "<think>hm</think>So", " yes <think>", "", " yes <think>"),
        ("qwen3", "Sure", "<think>hm</think>", "", "<think>hm</think>"),
        ("qwen3", "", "<think>hm</think>yes", "hm", "yes"),
        ("deepseek_r1", "Sure, ", "yes", "", "yes"),
        ("deepseek_r1", "<think>Well", " hm</think>yes", "hm", "yes"),
        ("mistral", "[THINK]Well", " hm[/THINK]yes", "hm", "yes"),
        ("granite", "Here is my thought process: Well", " hm Here is my response: yes", "hm", "yes"),
        ("openai_gptoss", "Sure", ", yes", "", ", yes"),
    ],
)
def test_a_message_that_is_continued(name: str, begun: str, text: str, reasoning: str, content: str) -> None:
    whole = collect(check_every_cut(lambda: REASONING_PARSERS[name]("<assistant>" + begun, begun), text))
    assert (whole.reasoning, whole.content, whole.calls) == (reasoning, content, [])
    marks = reasoning_marks(name, "<assistant>" + begun, begun)
    assert (marks is not None and marks.is_open) == (bool(reasoning) and bool(begun))


def test_every_parser_is_tested() -> None:
    assert set(REASONING_PARSERS) == {case[0] for case in CASES}


PIECES = st.sampled_from(["<think>", "</think>", "[THINK]", "[/THINK]", "Here is my", " thought process:", "\n", " "])


@pytest.mark.parametrize("name", sorted(set(REASONING_PARSERS) - {"openai_gptoss"}))
@given(pieces=st.lists(PIECES | st.text(max_size=3), max_size=12))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_no_text_raises_and_none_is_lost(name: str, pieces: list[str]) -> None:
    text = "".join(pieces)
    story = events_of(REASONING_PARSERS[name](""), pieces)
    assert merged(story) == merged(events_of(REASONING_PARSERS[name](""), [text]))
    whole = collect(story)
    marks = ("", "<think>", "</think>", "[THINK]", "[/THINK]", "Here is my thought process:")
    left = {_squeezed(text.replace(a, "", 1).replace(b, "", 1)) for a in marks for b in marks}
    assert _squeezed(whole.reasoning + whole.content) in left


def _squeezed(text: str) -> str:
    return "".join(text.split())


def test_a_call_after_reasoning() -> None:
    text = (
        '<think>f? <tool_call></think>\n\nLook:\n<tool_call>\n{"name": "f", "arguments": {"text": "x"}}\n</tool_call>'
    )
    parser = output_parser("hermes", "qwen3", FUNCTIONS, "")
    assert parser is not None
    whole = collect(check_every_cut(lambda: output_parser("hermes", "qwen3", FUNCTIONS, ""), text))
    assert (whole.reasoning, whole.content) == ("f? <tool_call>", "Look:")
    assert [(call.name, call.arguments) for call in whole.calls] == [("f", '{"text": "x"}')]


def test_harmony_is_parsed_once_for_both() -> None:
    text = (
        "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>commentary to=functions.f "
        '<|constrain|>json<|message|>{"text":"x"}<|call|>'
    )
    for reasoning in (None, "openai_gptoss"):
        whole = collect(check_every_cut(lambda r=reasoning: output_parser("openai", r, FUNCTIONS, ""), text))
        assert (whole.reasoning, whole.content) == ("hm", "")
        assert [(call.name, call.arguments) for call in whole.calls] == [("f", '{"text":"x"}')]


def test_nothing_to_parse_needs_no_parser() -> None:
    assert output_parser(None, None, {}, "") is None
