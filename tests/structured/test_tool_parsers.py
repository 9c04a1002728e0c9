"""Calls in every format, cut everywhere; and texts that are no calls."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from parser_rig import FUNCTIONS, Call, check_every_cut, events_of, merged, random_calls, to_json

from octavo.structured.events import ArgumentsText, ContentText, ToolCallBegun, ToolCallBroken, collect
from octavo.structured.tools.constrained import NamedCallParser, RequiredCallsParser
from octavo.structured.tools.registry import TOOL_PARSERS

Writer = Callable[[list[Call], random.Random], str]


def _write_hermes(calls: list[Call], rng: random.Random) -> str:
    body = [{"name": n, "arguments": a} if rng.random() < 0.8 else {"arguments": a, "name": n} for n, a in calls]
    return "\n".join(f"<tool_call>\n{to_json(call, rng)}\n</tool_call>" for call in body)


def _write_llama3(calls: list[Call], rng: random.Random) -> str:
    tag = rng.choice(("", "<|python_tag|>"))
    return tag + "; ".join(to_json({"name": n, "parameters": a}, rng) for n, a in calls)


def _write_mistral(calls: list[Call], rng: random.Random) -> str:
    if rng.random() < 0.5:
        body = [{"name": n, "arguments": a, "id": f"abcdefgh{i}"} for i, (n, a) in enumerate(calls)]
        return "[TOOL_CALLS]" + to_json(body, rng)
    return "".join(f"[TOOL_CALLS]{n}{rng.choice(('', '[ARGS]'))}{to_json(a, rng)}" for n, a in calls)


def _write_deepseek(calls: list[Call], rng: random.Random) -> str:
    if rng.random() < 0.5:
        body = [
            f"<｜tool▁call▁begin｜>function<｜tool▁sep｜>{n}\n```json\n{to_json(a, rng)}\n```<｜tool▁call▁end｜>"
            for n, a in calls
        ]
    else:
        body = [f"<｜tool▁call▁begin｜>{n}<｜tool▁sep｜>{to_json(a, rng)}<｜tool▁call▁end｜>" for n, a in calls]
    return "<｜tool▁calls▁begin｜>" + rng.choice(("", "\n")).join(body) + "<｜tool▁calls▁end｜>"


def _write_pythonic(calls: list[Call], rng: random.Random) -> str:
    calls = [(n, {k.replace(" ", "_"): v for k, v in a.items()}) for n, a in calls]
    body = ", ".join(f"{n}({', '.join(f'{k}={v!r}' for k, v in a.items())})" for n, a in calls)
    start, end = rng.choice((("", ""), ("<|python_start|>", "<|python_end|>")))
    return f"{start}[{body}]{end}"


def _write_qwen3_coder(calls: list[Call], rng: random.Random) -> str:
    written = []
    for name, arguments in calls:
        values = [v if isinstance(v, str) else to_json(v, rng) for v in arguments.values()]
        inner = "".join(f"<parameter={k}>\n{v}\n</parameter>\n" for k, v in zip(arguments, values))
        text = f"<function={name}>\n{inner}</function>"
        written.append(text if rng.random() < 0.2 else f"<tool_call>\n{text}\n</tool_call>")
    return "\n".join(written)


def _write_openai(calls: list[Call], rng: random.Random) -> str:
    written = []
    for name, arguments in calls:
        header = rng.choice(
            (
                f"<|channel|>commentary to=functions.{name} <|constrain|>json",
                f" to=functions.{name}<|channel|>commentary json",
            )
        )
        written.append(f"<|start|>assistant{header}<|message|>{to_json(arguments, rng)}<|call|>")
    return "".join(written).removeprefix("<|start|>assistant")


WRITERS: dict[str, Writer] = {
    "hermes": _write_hermes,
    "llama3_json": _write_llama3,
    "mistral": _write_mistral,
    "deepseek_v3": _write_deepseek,
    "pythonic": _write_pythonic,
    "qwen3_coder": _write_qwen3_coder,
    "openai": _write_openai,
}
TAKES_TEXT_BEFORE = ("hermes", "llama3_json", "mistral", "deepseek_v3", "qwen3_coder")


def parse(name: str, text: str) -> Any:
    return collect(events_of(TOOL_PARSERS[name](FUNCTIONS), [text]))


def parsed_calls(name: str, text: str) -> list[Call]:
    return [(call.name, json.loads(call.arguments)) for call in parse(name, text).calls]


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("seed", range(30))
def test_calls_are_read_however_they_are_cut(name: str, seed: int) -> None:
    rng = random.Random(seed)
    calls = random_calls(rng, most=1 + seed % 2)
    before = rng.choice(("", "Let me look.\n\nNow:\n")) if name in TAKES_TEXT_BEFORE else ""
    text = before + WRITERS[name](calls, rng)
    story = check_every_cut(lambda: TOOL_PARSERS[name](FUNCTIONS), text)
    whole = collect(story)
    if name == "pythonic":
        calls = [(n, {k.replace(" ", "_"): v for k, v in a.items()}) for n, a in calls]
    assert [(call.name, json.loads(call.arguments)) for call in whole.calls] == calls
    assert whole.content == before.rstrip()
    assert [e.index for e in story if isinstance(e, ToolCallBegun)] == list(range(len(calls)))


def test_every_parser_is_tested() -> None:
    assert set(TOOL_PARSERS) - {"qwen3_xml"} == set(WRITERS)
    assert TOOL_PARSERS["qwen3_xml"] is TOOL_PARSERS["qwen3_coder"]


@pytest.mark.parametrize("name", sorted(set(WRITERS) - {"pythonic"}))
def test_arguments_come_while_they_are_written(name: str) -> None:
    text = WRITERS[name]([("f", {"text": "a very long letter"})], random.Random(1))
    parser = TOOL_PARSERS[name](FUNCTIONS)
    events = parser.feed(text[: text.index("long")])
    assert [e.name for e in events if isinstance(e, ToolCallBegun)] == ["f"]
    assert "".join(e.text for e in events if isinstance(e, ArgumentsText)).endswith('"a very ')


def test_ids_are_unique_and_short_for_mistral() -> None:
    assert len({call.id for call in parse("hermes", _write_hermes([("f", {})] * 3, random.Random(0))).calls}) == 3
    for call in parse("mistral", '[TOOL_CALLS]f{}[TOOL_CALLS]f[ARGS]{"a":1}').calls:
        assert len(call.id) == 9
        assert call.id.isalnum()
    assert parse("mistral", "[TOOL_CALLS]f[CALL_ID]123456789[ARGS]{}").calls[0].id == "123456789"


def F(**arguments: Any) -> Call:
    return "f", arguments


CALLS_F = "<|channel|>commentary to=functions.f<|message|>"


# name, output, content, calls
TOLERATED: list[tuple[str, str, str, list[Call]]] = [
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": 1}}', "", [("f", {"a": 1})]),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": 1}\n</tool_call>', "", [("f", {"a": 1})]),
    ("hermes", '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>', "", [("f", {"a": 1})]),
    ("hermes", '<tool_call>{"name": "f", "arguments": null}</tool_call>', "", [("f", {})]),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": "x\ny"}}</tool_call>', "", [("f", {"a": "x\ny"})]),
    ("hermes", '<tool_call>{"name": "unknown", "arguments": {}}</tool_call> so', " so", [("unknown", {})]),
    ("llama3_json", '{"type": "function", "name": "f", "parameters": {}}', "", [("f", {})]),
    ("llama3_json", 'I call {"name": "f", "parameters": {"a": 1}} now', "I call now", [("f", {"a": 1})]),
    ("mistral", '[TOOL_CALLS] [{"name": "f", "arguments": {}}', "", [("f", {})]),
    ("qwen3_coder", "<function=f><parameter=text>a\n<parameter=count>1\n</function>", "", [F(text="a", count=1)]),
    ("qwen3_coder", "<tool_call><function=f></tool_call>", "", [("f", {})]),
    ("qwen3_coder", "<tool_call>\n<function=f>\n<parameter=text>\na\n</tool_call> so", " so", [F(text="a")]),
    ("qwen3_coder", "<function=f>\n<parameter=count>\n2\n</tool_call>\n<function=f></function>", "", [
        F(count=2),
        F(),
    ]),
    ("qwen3_coder", "<function=f><parameter=count>\nmany\n</parameter></function>", "", [("f", {"count": "many"})]),
    ("qwen3_coder", "<function=f><parameter=many>['a', None]</parameter></function>", "", [F(many=["a", None])]),
    ("qwen3_coder", "<function=f><parameter=flag>True</parameter></function>", "", [("f", {"flag": True})]),
    ("qwen3_coder", "<function=f><parameter=maybe>None</parameter></function>", "", [("f", {"maybe": None})]),
    ("qwen3_coder", "<function=f><parameter=new>5</parameter></function>", "", [("f", {"new": "5"})]),
    ("qwen3_coder", '<function=f><parameter=deep>{"a": "</parameter>"}</parameter></function>', "", [
        F(deep={"a": "</parameter>"}),
    ]),
    ("qwen3_coder", '<function=f><parameter=deep>{"a": "\n</parameter></function>', "", [F(deep='{"a": "')]),
    ("mistral", '[TOOL_CALLS][\n{"name": "f", "arguments": {}}\n] so', " so", [("f", {})]),
    ("pythonic", "[f(text=\"it's\", flag=true, many=(1, 2)), f()]", "", [F(text="it's", flag=True, many=[1, 2]), F()]),
    ("openai", '<|channel|>commentary to=functions.f<|message|>{"a":1}', "", [("f", {"a": 1})]),
    ("openai", '<|channel|>commentary to=functions.f<|message|>\n{"a":1} \n\n<|call|>', "", [("f", {"a": 1})]),
    ("openai", f'{CALLS_F}{{"a":1}} <|start|>assistant{CALLS_F}{{}}\n', "", [("f", {"a": 1}), ("f", {})]),
    ("openai", f'{CALLS_F}{{"a":1}}\n<|channel|>final<|message|>Hi.<|return|>', "Hi.", [("f", {"a": 1})]),
    ("openai", f'{CALLS_F}{{"a":1}}}}<|call|><|start|>assistant{CALLS_F}{{}}', "}", [("f", {"a": 1}), ("f", {})]),
    ("openai", f"{CALLS_F}{{}} no<|channel|>final<|message|>Hi.", "noHi.", [("f", {})]),
    ("openai", f"{CALLS_F}{{oops<|end|><|channel|>final<|message|>Hi.", f"{CALLS_F}{{oops<|end|>Hi.", []),
    ("openai", "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>Hi. ", "Hi. ", []),
    ("openai", "plain", "plain", []),
]  # fmt: skip


@pytest.mark.parametrize(("name", "text", "content", "calls"), TOLERATED)
def test_what_models_get_slightly_wrong(name: str, text: str, content: str, calls: list[Call]) -> None:
    check_every_cut(lambda: TOOL_PARSERS[name](FUNCTIONS), text)
    assert parsed_calls(name, text) == calls
    assert parse(name, text).content == content


# Outputs that are no calls: all of it is content.
DEGRADED: list[tuple[str, str]] = [
    *[
        ("hermes", f"<tool_call>{body}</tool_call>")
        for body in (
            "",
            "{}",
            "hello",
            '{"name": "f"}',
            '{"name": 5, "arguments": {}}',
            '{"name": "two words", "arguments": {}}',
            '{"name": "f", "arguments": [1]}',
            '{"name": "f", "arguments": {"a": tru}}',
            '{"name": "f", "arguments": {"a": 01}}',
            '{"name": "f", "arguments": {"a": "\\x"}}',
            "{'name': 'f', 'arguments': {}}",
        )
    ],
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": "cut o'),
    ("hermes", "a < b <tool_ca"),
    ("llama3_json", '{"name": "Bob", "parameters": {}}'),
    ("llama3_json", '{"answer": {"name": "f"}}'),
    ("llama3_json", "int main() { return 0; }"),
    ("llama3_json", '<|python_tag|>search(query="x")'),
    ("mistral", "[TOOL_CALLS]"),
    ("mistral", "[TOOL_CALLS]f[ARGS]x"),
    ("mistral", "[TOOL_CALLS][1]"),
    ("deepseek_v3", "<｜tool▁calls▁begin｜>x"),
    ("deepseek_v3", "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>f\nno"),
    ("qwen3_coder", "<tool_call>x</tool_call>"),
    ("qwen3_coder", "<function=f><parameter=text>cut o"),
    ("qwen3_coder", "<function=f>x</function>"),
    ("qwen3_coder", "<function=two words></function>"),
    ("pythonic", "[1, 2, 3]"),
    ("pythonic", "[f(1)]"),
    ("pythonic", "[f(**a)]"),
    ("pythonic", "[f(a=g())]"),
    ("pythonic", "[f(a=1e999)]"),
    ("pythonic", "[f(a={1, 2})]"),
    ("pythonic", "[f(a=" + "[" * 100),
    ("pythonic", "[unknown(a=1)]"),
    ("pythonic", "Use [f(a=1)] for that"),
    ("openai", "<|channel|>commentary to=functions.f<|message|>no"),
    ("openai", '<|start|>assistant<|channel|>commentary to=functions.f<|message|>{"a": "cut o'),
    ("openai", "<|channel|>commentary to=python<|message|>print(1)<|call|>"),
    ("openai", "<|channel|>fin"),
]


@pytest.mark.parametrize(("name", "text"), DEGRADED)
def test_what_is_no_call_is_content(name: str, text: str) -> None:
    check_every_cut(lambda: TOOL_PARSERS[name](FUNCTIONS), text)
    whole = parse(name, text)
    assert whole.calls == []
    assert whole.content == text


def test_a_call_that_breaks_off_is_content_and_the_next_one_counts() -> None:
    bad, good = '<tool_call>{"name": "f", "arguments": {"a": ?', '<tool_call>{"name": "f", "arguments": {}}</tool_call>'
    story = check_every_cut(lambda: TOOL_PARSERS["hermes"](FUNCTIONS), bad + good)
    assert story[:3] == [
        ToolCallBegun(0, "id", "f"),
        ArgumentsText(0, '{"a": '),
        ToolCallBroken(0, bad[:-1]),
    ]
    assert story[3:] == [ContentText("?"), ToolCallBegun(1, "id", "f"), ArgumentsText(1, "{}")]


_PIECES = st.sampled_from(
    [
        *("<tool_call>", "</tool_call>", "<function=f>", "<function=", "<parameter=text>", "</parameter>"),
        *("</function>", "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "<|python_tag|>", "<|python_start|>", "<|python_end|>"),
        *("<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"),
        *("<｜tool▁calls▁end｜>", "[", "]", "{", "<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|call|>"),
        *("analysis", "final", " to=functions.f"),
        *('{"name": "f", "arguments": ', '"', "\\", "}", ",", ":", "1", "null", "f", "(", ")", "a="),
        *("'", "\n", " ", "x", "\ud7ff", "\x00", "🙂", "```json", '{"a": "b"}'),
    ]
)  # fmt: skip
OUTPUTS = st.lists(_PIECES | st.text(max_size=3), max_size=14)


@pytest.mark.parametrize("name", WRITERS)
@given(pieces=OUTPUTS)
@settings(max_examples=150, deadline=None, derandomize=True)
def test_no_text_raises_and_none_is_lost(name: str, pieces: list[str]) -> None:
    text = "".join(pieces)
    story = events_of(TOOL_PARSERS[name](FUNCTIONS), pieces)
    assert merged(story) == merged(events_of(TOOL_PARSERS[name](FUNCTIONS), [text]))
    whole = collect(story)
    for call in whole.calls:
        assert isinstance(json.loads(call.arguments), dict)
    if not whole.calls and name != "openai":  # which leaves out the frames of messages
        assert whole.content == text
    rest = iter(text)
    assert all(character in rest for character in whole.content)  # each once, in order


@pytest.mark.parametrize("schema", [{}, {"properties": 5}, {"properties": {"text": 5}}, {"properties": {"text": True}}])
@pytest.mark.parametrize("key", ["type", "anyOf", "oneOf", "enum"])
@pytest.mark.parametrize("value", [None, 5, "string", [5], [None], {}, [{"type": ["string", "null"]}], ["a", "b"]])
def test_a_schema_may_be_anything(schema: dict[str, Any], key: str, value: Any) -> None:
    schema = schema or {"properties": {"text": {key: value}}}
    parser = TOOL_PARSERS["qwen3_coder"]({"f": schema})
    whole = collect(events_of(parser, ["<function=f><parameter=text>\nx y\n</parameter></function>"]))
    assert [json.loads(call.arguments) for call in whole.calls] == [{"text": "x y"}]


def test_required_calls_are_read() -> None:
    calls = [("f", {"text": "a, b"}), ("get_weather", {})]
    text = json.dumps([{"name": name, "parameters": arguments} for name, arguments in calls])
    whole = collect(check_every_cut(lambda: RequiredCallsParser(FUNCTIONS), text))
    assert [(call.name, json.loads(call.arguments)) for call in whole.calls] == calls
    assert whole.content == ""
    for cut in (0, 5, 25):
        whole = collect(check_every_cut(lambda: RequiredCallsParser(FUNCTIONS), text[:cut] or "no"))
        assert (whole.calls, whole.content) == ([], text[:cut] or "no")
    whole = collect(check_every_cut(lambda: RequiredCallsParser(FUNCTIONS), text[:-20]))
    assert [call.name for call in whole.calls] == ["f"]


def test_a_named_call_is_read() -> None:
    whole = collect(check_every_cut(lambda: NamedCallParser(FUNCTIONS, "f"), '{"text": "x"} '))
    assert ([(c.name, c.arguments) for c in whole.calls], whole.content) == ([("f", '{"text": "x"}')], "")
    for text in ('{"text": "x', "no", '{"text": ?} so'):
        whole = collect(check_every_cut(lambda: NamedCallParser(FUNCTIONS, "f"), text))
        assert (whole.calls, whole.content) == ([], text)


UNITS = ["[", "{", '{"name":', "<tool_call>", " ", "(", "[f(", "<function=f>", "<|channel|>", "\\"]


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("unit", UNITS)
def test_forty_thousand_characters_take_no_two_seconds(name: str, unit: str) -> None:
    parser = TOOL_PARSERS[name](FUNCTIONS)
    pieces = [unit] * (40_000 // len(unit))
    start = time.process_time()
    events_of(parser, pieces)
    assert time.process_time() - start < 2.0
