"""Outputs in which a call is damaged and none is whole: all of their text comes out, and comes out once."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from parser_rig import FUNCTIONS, MARKS_AS_TEXT, check_every_cut, cut_at, events_of, random_calls
from test_parser_sweeps import _JUNK
from test_tool_parsers import TAKES_TEXT_BEFORE, WRITERS

from octavo.structured.chat_output import output_parser
from octavo.structured.events import OutputParser, collect
from octavo.structured.tools.base import Functions
from octavo.structured.tools.constrained import NamedCallParser, RequiredCallsParser
from octavo.structured.tools.registry import STRICT_PARSERS, TOOL_PARSERS

# One message in Harmony that is to be a call; of other messages only what they say is content.
_CHANNEL = r"(<\|channel\|>commentary)?"
_CALL = re.compile(
    rf"{_CHANNEL} to=functions\.[\w-]+{_CHANNEL}[ \w]*(<\|constrain\|>json)?<\|message\|>((?!<\|(start|channel)).)*",
    re.DOTALL,
)
_SAID = ("", "Let me look.", "a < b\n\n", "Now 🙂: ", "\n ")
PLACE = st.integers(0, 10_000)
# Without the marks that begin a message of Harmony, which are left out of the content.
_MARKS = tuple(mark for mark in MARKS_AS_TEXT if not mark.startswith(("<|start|>", "<|channel|>")))
# What a string that was left open may be followed by, up to the output's end.
AFTER = st.lists(st.sampled_from((*_MARKS, "}", "]", "\n", " ", "so on", "\\", "é")), max_size=4).map("".join)


def _opened(text: str, at: int) -> str:
    """`text` up to a place within the words of one of its strings, or to any place where it has none."""
    inside = [match.start() for match in re.finditer(r"\w(?=[^\W\d]*[\"'])", text)]
    return text[: inside[at % len(inside)] if inside else at % (len(text) + 1)]


def _damaged(text: str, seed: int, after: str, junk: str) -> str:
    """`text` with a string left open, or with a piece of it replaced."""
    rng = random.Random(seed)
    if rng.random() < 0.6:
        return _opened(text, rng.randrange(10_000)) + after
    at = rng.randrange(len(text))
    return text[:at] + junk + text[at + rng.randint(1, 30) :] + after.replace("\n", "")


def _written(name: str, seed: int) -> str:
    rng = random.Random(seed)
    said = rng.choice(_SAID) if name in TAKES_TEXT_BEFORE else ""
    return said + WRITERS[name](random_calls(rng, 1, ("a word", *_MARKS)), rng)


SWEPT = [(name, parser) for name in WRITERS for parser in dict.fromkeys((TOOL_PARSERS[name], STRICT_PARSERS[name]))]


@pytest.mark.parametrize(("name", "new"), SWEPT)
def test_damaged_calls_are_content_to_the_letter(
    name: str, new: Callable[[Functions], OutputParser], examples: int
) -> None:
    junks = st.sampled_from(("", *(junk for junk in _JUNK[name] if junk not in ("<|start|>", "<|channel|>"))))

    @settings(max_examples=50 * examples, deadline=None, derandomize=True, database=None)
    @given(seed=PLACE, after=AFTER, junk=junks, places=st.lists(PLACE, max_size=8))
    def sweep(seed: int, after: str, junk: str, places: list[int]) -> None:
        text = _damaged(_written(name, seed), seed, after, junk)
        assume(name != "openai" or _CALL.fullmatch(text))
        whole = collect(events_of(new(FUNCTIONS), cut_at(text, places)))
        assume(not whole.calls)
        assert (whole.reasoning, whole.content) == ("", text)

    sweep()


def test_what_follows_a_strict_call_without_its_brace_is_content() -> None:
    text = '{"name": "f", "parameters": {"text": "x"} ; so'
    whole = collect(check_every_cut(lambda: STRICT_PARSERS["llama3_json"](FUNCTIONS), text))
    assert (whole.calls, whole.content) == ([], text)


CONSTRAINED: dict[str, tuple[Callable[[], OutputParser], Callable[[int], str]]] = {
    "required": (
        lambda: RequiredCallsParser(FUNCTIONS),
        lambda seed: json.dumps([{"name": n, "parameters": a} for n, a in random_calls(random.Random(seed), 1)]),
    ),
    "named": (
        lambda: NamedCallParser(FUNCTIONS, "f"),
        lambda seed: json.dumps(random_calls(random.Random(seed), 1)[0][1]),
    ),
}


@pytest.mark.parametrize("name", CONSTRAINED)
def test_constrained_calls_that_are_damaged_are_content_to_the_letter(name: str, examples: int) -> None:
    new, write = CONSTRAINED[name]

    @settings(max_examples=50 * examples, deadline=None, derandomize=True, database=None)
    @given(seed=PLACE, after=AFTER, places=st.lists(PLACE, max_size=8))
    def sweep(seed: int, after: str, places: list[int]) -> None:
        text = _damaged(write(seed), seed, after, "")
        whole = collect(events_of(new(), cut_at(text, places)))
        assume(not whole.calls)
        assert whole.content == text

    sweep()


@pytest.mark.parametrize("name", sorted(set(WRITERS) - {"openai"}))
def test_a_damaged_call_after_reasoning_is_content_to_the_letter(name: str, examples: int) -> None:
    @settings(max_examples=30 * examples, deadline=None, derandomize=True, database=None)
    @given(seed=PLACE, after=AFTER, places=st.lists(PLACE, max_size=8))
    def sweep(seed: int, after: str, places: list[int]) -> None:
        text = _damaged(_written(name, seed), seed, after, "").lstrip()
        parser = output_parser(name, "qwen3", FUNCTIONS, "")
        assert parser is not None
        whole = collect(events_of(parser, cut_at(f"<think>\nhm {text[:9]}.\n</think>\n\n{text}", places)))
        assume(not whole.calls)
        assert (whole.reasoning, whole.content) == (f"hm {text[:9]}.", text)

    sweep()


def test_a_damaged_call_after_analysis_is_content_to_the_letter(examples: int) -> None:
    @settings(max_examples=50 * examples, deadline=None, derandomize=True, database=None)
    @given(seed=PLACE, after=AFTER, places=st.lists(PLACE, max_size=8))
    def sweep(seed: int, after: str, places: list[int]) -> None:
        text = _damaged(_written("openai", seed), seed, after, "")
        assume(_CALL.fullmatch(text))
        text = f"<|start|>assistant{text}"
        thought = "<|channel|>analysis<|message|>hm<|end|>"
        final = "<|start|>assistant<|channel|>final<|message|>so"
        whole = collect(events_of(TOOL_PARSERS["openai"](FUNCTIONS), cut_at(thought + text, places)))
        assume(not whole.calls)
        assert (whole.reasoning, whole.content) == ("hm", text)
        whole = collect(events_of(TOOL_PARSERS["openai"](FUNCTIONS), cut_at(thought + text + final, places)))
        assert whole.content in (text + "so", text + final)  # its open string may hold the rest

    sweep()
