"""Outputs in every format, and parsers fed with them in every possible cut."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from typing import Any

from octavo.structured.events import ArgumentsText, ContentText, Event, OutputParser, ReasoningText, ToolCallBegun

Call = tuple[str, dict[str, Any]]

NAMES = ("get_weather", "f", "search-web", "Tool_9")
FUNCTIONS: dict[str, dict[str, Any]] = {
    name: {
        "type": "object",
        "properties": {
            "text": {"type": "string"},
            "other text": {"type": "string"},
            "count": {"type": "integer"},
            "share": {"type": "number"},
            "flag": {"type": "boolean"},
            "many": {"type": "array"},
            "deep": {"type": "object"},
            "maybe": {"type": ["integer", "null"]},
        },
    }
    for name in NAMES
}
_STRINGS = (
    *("", "Zürich", 'say "hi"', "it's", "a\nb\n\nc", "back\\slash \\n", "{not: json}", "[x](y)", "🙂 é"),
    *("</tool_cal", "<|call", "  spaces  ", "a = f(1, [2])", "; , : ]", "null", "true", "12", "\t\ttabs"),
    *("<b>bold</b>", "#no comment", "<param"),
)


# Every format's marks, where they are text; but for "</parameter>", which ends any text of Qwen3-Coder's.
MARKS_AS_TEXT = (
    *("<tool_call>", "</tool_call>", "<function=f>", "</function>", "<parameter=text>", "a </function> b", "\nb"),
    *("<|start|>assistant", "<|channel|>final<|message|>x", "<|message|>", "<|end|>", "<|call|>", "<|return|>"),
    *("to=functions.f", '{"name": "f", "arguments": {}}', "<think>", "[TOOL_CALLS]", "<｜tool▁calls▁end｜>", "[f()]"),
)


def random_arguments(rng: random.Random, strings: Sequence[str] = _STRINGS) -> dict[str, Any]:
    """Arguments as FUNCTIONS describe them, some of them, in some order."""
    values: dict[str, Any] = {
        "text": rng.choice(strings),
        "other text": "".join(rng.choice(strings) for _ in range(2)),
        "count": rng.choice((0, -1, 7, 10**20)),
        "share": rng.choice((0.5, -1.25e-7, 3.0)),
        "flag": rng.random() < 0.5,
        "many": rng.choice(([], [1, [2, "]"]], [{"a": None}, True], ["x"] * 5)),
        "deep": rng.choice(
            ({}, {"a": {"b": [rng.choice((*strings, "</parameter>", "</parameter>\n"))]}, "c": False}, {"": ""})
        ),
        "maybe": rng.choice((None, 3)),
    }
    return {key: values[key] for key in rng.sample(sorted(values), rng.randrange(5))}


def random_calls(rng: random.Random, most: int = 3, strings: Sequence[str] = _STRINGS) -> list[Call]:
    return [(rng.choice(NAMES), random_arguments(rng, strings)) for _ in range(rng.randint(1, most))]


def to_json(value: Any, rng: random.Random) -> str:
    """JSON as one model or another writes it."""
    style = rng.randrange(3)
    separators = (",", ":") if style == 0 else None
    return json.dumps(value, ensure_ascii=rng.random() < 0.3, separators=separators, indent=2 if style == 2 else None)


def events_of(parser: OutputParser, pieces: list[str]) -> list[Event]:
    events = [event for piece in pieces for event in parser.feed(piece)]
    return events + parser.finish()


def merged(events: list[Event]) -> list[Event]:
    """The same story in the fewest events, without what is random."""
    story: list[Event] = []
    for event in events:
        last = story[-1] if story else None
        if isinstance(event, ToolCallBegun):
            story.append(ToolCallBegun(event.index, "id", event.name))
        elif isinstance(event, ArgumentsText) and isinstance(last, ArgumentsText) and last.index == event.index:
            story[-1] = ArgumentsText(event.index, last.text + event.text)
        elif isinstance(event, ContentText | ReasoningText) and type(last) is type(event):
            story[-1] = type(event)(last.text + event.text)
        else:
            story.append(event)
    return story


def cut_at(text: str, places: Sequence[int]) -> list[str]:
    """`text` in pieces that end at these places, any whole numbers; a place twice makes an empty piece."""
    ends = sorted(place % (len(text) + 1) for place in places)
    return [text[start:end] for start, end in zip([0, *ends], [*ends, len(text)])]


def check_every_cut(new: Callable[[], OutputParser], text: str) -> list[Event]:
    """The events of the whole, after seeing that every cut gives the same."""
    whole = merged(events_of(new(), [text]))
    assert merged(events_of(new(), list(text))) == whole
    for at in range(1, len(text)):
        assert merged(events_of(new(), [text[:at], text[at:]])) == whole, at
    return whole
