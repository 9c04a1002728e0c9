"""Generated outputs of every format, cut at every character and every byte; junk of every format's marks.

`pytest tests/structured/test_parser_sweeps.py --examples N` takes N outputs of each, and 50 N junk texts.
"""

from __future__ import annotations

import codecs
import random
from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from parser_rig import FUNCTIONS, check_every_cut, events_of, merged, random_calls
from test_tool_parsers import WRITERS

from octavo.structured.events import OutputParser, collect
from octavo.structured.reasoning.registry import REASONING_PARSERS
from octavo.structured.tools.registry import TOOL_PARSERS

_THOUGHTS = ("hm", "2 < 3", "</thin", "it's\n\nso", "Zürich 🙂", "<tool_call>{", "[/THIN", "Here is my", "\\n", "日本")
_TAGS = {
    "deepseek_r1": ("<think>\n", "\n</think>\n\n"),
    "qwen3": ("<think>\n", "\n</think>\n\n"),
    "mistral": ("[THINK]", "[/THINK]"),
    "granite": ("Here is my thought process:\n", "\nHere is my response:\n"),
    "openai_gptoss": (
        "<|channel|>analysis<|message|>",
        "<|end|><|start|>assistant<|channel|>final<|message|>",
    ),
}
_JUNK = {
    "hermes": ("<tool_call>", "</tool_call>", '{"name": "f", "arguments": ', '{"a": "b"}', "}"),
    "llama3_json": ("<|python_tag|>", '{"name": "f", "parameters": ', '{"a": 1}', "}", "; "),
    "mistral": ("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "f", '{"a": 1}', '[{"name": "f", "arguments": {}}', ", ", "]"),
    "deepseek_v3": (
        *(
            "<｜tool▁calls▁begin｜>",
            "<｜tool▁call▁begin｜>",
            "<｜tool▁sep｜>",
            "<｜tool▁call▁end｜>",
            "<｜tool▁calls▁end｜>",
        ),
        *("function", "f", "\n```json\n", '{"a": 1}', "\n```"),
    ),
    "pythonic": ("<|python_start|>", "<|python_end|>", "[", "f(", "text=", "'a'", '"', "\\", ", ", ")", "]", "None"),
    "qwen3_coder": (
        *("<tool_call>", "</tool_call>", "<function=f>", "<function=", ">", "</function>", "<parameter=text>"),
        *("<parameter=", "many", "</parameter>", "\n", "[1, None]"),
    ),
    "openai": (
        *("<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|call|>", "<|return|>", "assistant", "analysis"),
        *("final", "commentary", " to=functions.f", " <|constrain|>json", '{"a": 1}'),
    ),
    **{
        name: (*tags, *(tag.strip() for tag in tags), "\n", "think")
        for name, tags in _TAGS.items()
        if name != "mistral"
    },
    "mistral reasoning": ("[THINK]", "[/THINK]", "THINK", "[", "/"),
}
_COMMON = ('"', "{", "}", "\\", "\n", " ", "<", "|", "1", "null", "é", "🙂", "\ud7ff", "\x00")


def _parsers() -> dict[str, Callable[[], OutputParser]]:
    made: dict[str, Callable[[], OutputParser]] = {}
    for name, parser in TOOL_PARSERS.items():
        if name in WRITERS:
            made[name] = lambda parser=parser: parser(FUNCTIONS)
    for name, opened in REASONING_PARSERS.items():
        made["mistral reasoning" if name == "mistral" else name] = lambda opened=opened: opened("")
    return made


PARSERS = _parsers()


def _cut_at_bytes(new: Callable[[], OutputParser], text: str) -> None:
    """Fed byte by byte through an incremental UTF-8 decoder, the events are those of the whole."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    pieces = [decoder.decode(bytes([byte])) for byte in text.encode()] + [decoder.decode(b"", True)]
    assert "".join(pieces) == text
    assert merged(events_of(new(), pieces)) == merged(events_of(new(), [text]))


def _thoughts(rng: random.Random) -> str:
    return " ".join(rng.choice(_THOUGHTS) for _ in range(rng.randint(1, 4)))


@pytest.mark.parametrize("name", WRITERS)
def test_calls_cut_anywhere(name: str, examples: int) -> None:
    for seed in range(1000, 1000 + examples):
        rng = random.Random(seed)
        text = WRITERS[name](random_calls(rng, most=2), rng) + rng.choice(("", "\n", " and so on 🙂"))
        check_every_cut(PARSERS[name], text)
        _cut_at_bytes(PARSERS[name], text)


@pytest.mark.parametrize("name", _TAGS)
def test_reasoning_cut_anywhere(name: str, examples: int) -> None:
    opening, closing = _TAGS[name]
    new = PARSERS["mistral reasoning" if name == "mistral" else name]
    for seed in range(examples):
        rng = random.Random(seed)
        reasoning, answer = _thoughts(rng), _thoughts(rng)
        text = opening + reasoning + closing + answer
        whole = collect(check_every_cut(new, text))
        assert (whole.reasoning.strip(), whole.content.strip()) == (reasoning.strip(), answer.strip())
        _cut_at_bytes(new, text)


def test_every_parser_is_swept() -> None:
    assert set(_JUNK) == set(PARSERS)
    assert set(_TAGS) == set(REASONING_PARSERS)


@pytest.mark.parametrize("name", PARSERS)
def test_junk_of_a_format_raises_nothing(name: str, examples: int) -> None:
    pieces = st.lists(st.sampled_from(_JUNK[name] + _COMMON) | st.text(max_size=3), max_size=16)
    quiet = [HealthCheck.too_slow, HealthCheck.data_too_large]

    @settings(
        max_examples=50 * examples,
        deadline=None,
        derandomize=True,
        suppress_health_check=quiet,
        database=None,
    )
    @given(pieces)
    def sweep(parts: list[str]) -> None:
        text = "".join(parts)
        story = merged(events_of(PARSERS[name](), parts))
        assert story == merged(events_of(PARSERS[name](), [text]))
        collect(story)

    sweep()
