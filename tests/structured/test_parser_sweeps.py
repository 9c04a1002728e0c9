"""Generated outputs of every format, cut at every character and every byte; junk of every format's marks.

`pytest tests/structured/test_parser_sweeps.py --examples N` takes N outputs of each, and 50 N junk texts.
"""

from __future__ import annotations

import codecs
import json
import random
import re
from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from parser_rig import FUNCTIONS, MARKS_AS_TEXT, Call, check_every_cut, cut_at, events_of, merged, random_calls
from test_tool_parsers import TAKES_TEXT_BEFORE, WRITERS

from octavo.structured.events import OutputParser, ParsedOutput, collect
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
_CUT_MARK = re.compile(r"\n?<(\|[a-z|]*)?\Z")  # with nothing after it, it is text
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


Meant = tuple[str, str, list[Call]]  # content, reasoning, calls


def _meant(whole: ParsedOutput) -> Meant:
    return whole.content, whole.reasoning, [(call.name, json.loads(call.arguments)) for call in whole.calls]


def _texts_and_calls(name: str, rng: random.Random) -> tuple[str, Meant]:
    """Calls with text before them, between them and after them."""
    text, content, calls = "", "", []
    for _ in range(rng.randint(1, 3)):
        said = rng.choice(("", "Let me look.", "a < b", "<tool", "<functio", "Now 🙂,\n\nthen:"))
        some = random_calls(rng, 2, MARKS_AS_TEXT)
        text += said + rng.choice(("", "\n", " ")) * bool(said) + WRITERS[name](some, rng)
        content, calls = content + said, calls + some
    after = rng.choice(("", " and so on 🙂", "\n\nDone. \n"))
    return text + after, (content + after, "", calls)


def _messages(name: str, rng: random.Random) -> tuple[str, Meant]:
    """Messages of every channel and calls."""
    text, content, reasoning, calls = "", "", [], []
    for _ in range(rng.randint(1, 5)):
        channel = rng.choice(("analysis", "commentary", "final", "call"))
        if channel == "call":
            [call] = random_calls(rng, 1, MARKS_AS_TEXT)
            written = WRITERS[name]([call], rng)
            calls.append(call)
        else:
            said = rng.choice(("", "hm", "2 < 3 <|en", "Zürich 🙂", "a\n\nb", "to=functions.f", '{"a": 1}'))
            kind = rng.choice(("", " <|constrain|>json"))
            written = f"<|channel|>{channel}{kind}<|message|>{said}{rng.choice(('<|end|>', '<|return|>', ''))}"
            content += said * (channel != "analysis")
            reasoning += [said] * (channel == "analysis" and said != "")
        text += "<|start|>assistant" + written
    return text.removeprefix("<|start|>assistant"), (content, "\n".join(reasoning), calls)


_MIXED = {**dict.fromkeys(TAKES_TEXT_BEFORE, _texts_and_calls), "openai": _messages}


@pytest.mark.parametrize("name", _MIXED)
def test_calls_among_other_text_cut_anywhere(name: str, examples: int) -> None:
    for seed in range(examples):
        text, meant = _MIXED[name](name, random.Random(seed))
        assert _meant(collect(check_every_cut(PARSERS[name], text))) == meant
        _cut_at_bytes(PARSERS[name], text)


@pytest.mark.parametrize("name", _MIXED)
def test_outputs_that_end_anywhere(name: str, examples: int) -> None:
    for seed in range(examples):
        rng = random.Random(seed)
        text, (_, reasoning, calls) = _MIXED[name](name, rng)
        for size in range(len(text)):
            story = merged(events_of(PARSERS[name](), [text[:size]]))
            for at in (rng.randrange(size + 1), max(size - 24, 0)):
                assert merged(events_of(PARSERS[name](), [text[:at], *text[at:size]])) == story, size
            _, begun_reasoning, whole_calls = _meant(collect(story))
            assert reasoning.startswith(_CUT_MARK.sub("", begun_reasoning))
            assert whole_calls == calls[: len(whole_calls)]


@pytest.mark.parametrize("name", _MIXED)
def test_damaged_outputs_cut_in_many_pieces(name: str, examples: int) -> None:
    place = st.integers(0, 10_000)
    damage = st.lists(st.tuples(place, st.integers(0, 30), st.sampled_from(("", *_JUNK[name], *_COMMON))), max_size=3)

    @settings(max_examples=30 * examples, deadline=None, derandomize=True, database=None)
    @given(seed=place, damages=damage, places=st.lists(place, max_size=12))
    def sweep(seed: int, damages: list[tuple[int, int, str]], places: list[int]) -> None:
        text, _ = _MIXED[name](name, random.Random(seed))
        for at, size, junk in damages:
            at %= len(text) + 1
            text = text[:at] + junk + text[at + size :]
        story = merged(events_of(PARSERS[name](), [text]))
        assert merged(events_of(PARSERS[name](), cut_at(text, places))) == story
        assert merged(events_of(PARSERS[name](), list(text))) == story
        whole = collect(story)
        assert all(isinstance(json.loads(call.arguments), dict) for call in whole.calls)
        rest = iter(text)
        assert all(character in rest for character in whole.content)  # each once, in order

    sweep()


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
