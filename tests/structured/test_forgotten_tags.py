"""Calls of Qwen3-Coder in which closing tags were forgotten, and tags that are text."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from parser_rig import FUNCTIONS, Call, check_every_cut, cut_at, events_of, merged, random_calls, to_json

from octavo.structured.events import collect
from octavo.structured.tools.qwen3_coder import Qwen3CoderParser, StrictQwen3CoderParser


def _new() -> Qwen3CoderParser:
    return Qwen3CoderParser(FUNCTIONS)


def _write(calls: list[Call], rng: random.Random) -> str:
    """Calls without some of the tags that close them; a value may be followed by the next tag at once."""
    written = []
    for name, arguments in calls:
        text = f"<function={name}>\n"
        for key, value in arguments.items():
            said = value if isinstance(value, str) else to_json(value, rng)
            text += f"<parameter={key}>\n{said}" + rng.choice(("\n</parameter>\n", "</parameter>", "\n", ""))
        ends = ("</function>\n</tool_call>", "</function></tool_call>", "</tool_call>", "</function>")
        written.append(rng.choice(("<tool_call>\n", "")) + text + rng.choice(ends))
    return "\n".join(written)


def _calls_of(parser: Qwen3CoderParser, text: str) -> tuple[str, list[Call]]:
    whole = collect(check_every_cut(lambda: type(parser)(FUNCTIONS), text))
    return whole.content, [(call.name, json.loads(call.arguments)) for call in whole.calls]


def test_calls_without_closing_tags_cut_anywhere(examples: int) -> None:
    for seed in range(5 * examples):
        rng = random.Random(seed)
        calls = random_calls(rng)
        before = rng.choice(("", "Let me look.\n"))
        assert _calls_of(_new(), before + _write(calls, rng)) == (before.strip(), calls)


def test_calls_without_closing_tags_cut_in_many_pieces(examples: int) -> None:
    place = st.integers(0, 10_000)

    @settings(max_examples=30 * examples, deadline=None, derandomize=True, database=None)
    @given(seed=place, places=st.lists(place, max_size=12))
    def sweep(seed: int, places: list[int]) -> None:
        rng = random.Random(seed)
        calls = random_calls(rng)
        story = merged(events_of(_new(), cut_at(_write(calls, rng), places)))
        assert [(call.name, json.loads(call.arguments)) for call in collect(story).calls] == calls

    sweep()


def F(**arguments: Any) -> Call:
    return "f", arguments


# output, content, calls
FORGOTTEN: list[tuple[str, str, list[Call]]] = [
    ("<tool_call><function=f><parameter=text>a b</function></tool_call>", "", [F(text="a b")]),
    ("<tool_call><function=f><parameter=text>a b</tool_call>", "", [F(text="a b")]),
    ("<function=f><parameter=text>a<parameter=count>1<parameter=flag>true</function>", "", [
        F(text="a", count=1, flag=True),
    ]),
    ("<function=f>\n<parameter=text>\na\n\n<parameter=count>\n1\n</tool_call> so", " so", [F(text="a\n", count=1)]),
    ("<function=f><parameter=text>a</function> </tool_call>\n\nso", "\n\nso", [F(text="a")]),
    ("<function=f><parameter=text>a</function>\n<function=f><parameter=count>2</tool_call>", "", [
        F(text="a"),
        F(count=2),
    ]),
    ("<function=f><parameter=text>a</tool_call>\n<tool_call><function=f></tool_call>", "", [F(text="a"), F()]),
    ("<function=f><parameter=count>2</function> so", " so", [F(count=2)]),
    ("<function=f><parameter=count>2<parameter=new>x</function>", "", [F(count=2, new="x")]),
    ('<function=f><parameter=deep>{"a": "<parameter=text>"}<parameter=text>b</function>', "", [
        F(deep={"a": "<parameter=text>"}, text="b"),
    ]),
    ('<function=f><parameter=many>["</function></tool_call>", "</tool_call>"]</function></tool_call>', "", [
        F(many=["</function></tool_call>", "</tool_call>"]),
    ]),
    ("<tool_call><function=f></tool_call></tool_call>", "</tool_call>", [F()]),
]  # fmt: skip


@pytest.mark.parametrize(("text", "content", "calls"), FORGOTTEN)
def test_values_end_with_the_next_tag(text: str, content: str, calls: list[Call]) -> None:
    assert _calls_of(_new(), text) == (content, calls)


# Texts that end with their own tag, and hold others.
TEXTS = (
    *("<a>\n  <function>x</function>\n</a>", "</function> ends a call, </tool_call> a block", "</function>"),
    *("<parameter=unknown>x", "<parameter=text>", "<parameter=>", "<parameter=te", "</function>\n\nb", "</tool_call>"),
    *("</function></tool_call>", "a</function> </tool_call>\n", "</tool_call><tool_call>", "</function><function=f>"),
)


@pytest.mark.parametrize("said", TEXTS)
@pytest.mark.parametrize("new", [Qwen3CoderParser, StrictQwen3CoderParser])
def test_a_tag_within_a_line_may_be_text(new: type[Qwen3CoderParser], said: str) -> None:
    text = f"<tool_call>\n<function=f>\n<parameter=text>\n{said}\n</parameter>\n</function>\n</tool_call>"
    assert _calls_of(new(FUNCTIONS), text) == ("", [F(text=said)])


def test_in_a_strict_call_tags_that_the_grammar_lets_pass_are_text() -> None:
    said = "a</function></tool_call>, <parameter=count>, </tool_call>\n<tool_call>\n</tool_call>"
    text = f"<function=f>\n<parameter=text>\n{said}\n</parameter>\n</function>"
    assert _calls_of(StrictQwen3CoderParser(FUNCTIONS), text) == ("", [F(text=said)])
