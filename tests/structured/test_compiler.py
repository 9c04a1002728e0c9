"""The checker process: verdicts, the cache, and what happens to a grammar that takes too much."""

from __future__ import annotations

import io
import os
import signal
import time
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
from structured_rig import EOS, OTHER_EOS, SPECIAL, TOKENS, VOCABULARY

from octavo.protocol.structured import StructuredOutputsParams
from octavo.structured import checker
from octavo.structured.compiler import GrammarCompiler
from octavo.structured.frames import Verdict, read_frame, write_frame
from octavo.structured.vocabulary import vocabulary_of

S = StructuredOutputsParams


class Source:
    vocab_size = len(TOKENS)
    special_ids = frozenset(SPECIAL)
    eos_token_ids = (EOS, OTHER_EOS)

    def token_bytes(self, token_id: int) -> bytes | None:
        return TOKENS[token_id] if token_id < len(TOKENS) else None


@pytest.fixture(scope="module")
def compiler() -> Iterator[GrammarCompiler]:
    made = GrammarCompiler(Source(), len(TOKENS))
    yield made
    made.close()


def test_a_grammar_comes_back_and_is_kept(compiler: GrammarCompiler) -> None:
    text = compiler.compile(S(regex="a+"))
    assert "a+" in text
    process = compiler._checker
    assert process is not None
    process.process.send_signal(signal.SIGSTOP)  # what is answered now is answered without it
    try:
        assert compiler.compile(S(regex="a+")) == text
    finally:
        process.process.send_signal(signal.SIGCONT)


def test_one_that_was_started_ahead_starts_nothing_at_its_first_grammar() -> None:
    compiler = GrammarCompiler(Source(), len(TOKENS))
    try:
        compiler.start()
        started = compiler._checker
        assert started is not None
        compiler.start()
        assert compiler.compile(S(regex="a"))
        assert compiler._checker is started
    finally:
        compiler.close()


def test_a_refusal_names_kind_and_reason_every_time(compiler: GrammarCompiler) -> None:
    for _ in range(2):
        with pytest.raises(ValueError, match=r"structured_outputs\.json cannot be used: .*uniqueItems"):
            compiler.compile(S(json={"type": "array", "uniqueItems": True}))


def test_what_needs_a_text_that_no_tokens_spell_is_refused() -> None:
    class Poor(Source):
        def token_bytes(self, token_id: int) -> bytes | None:
            found = super().token_bytes(token_id)
            return None if found is None or 0xF1 in found else found

    compiler = GrammarCompiler(Poor(), len(TOKENS))
    try:
        bad, good = "\U0006e51b", "\U0001f600"
        for text, others in ((bad, False), (f"ab{bad}c", False), (good, True), (f"ab{good}", True)):
            needing: list[dict[str, Any]] = [
                {"choice": ["a", text]},
                {"regex": f"{text}+"},
                {"grammar": f'start: "{text}" /x*/'},
                {"grammar": f'root ::= "{text}"'},
                {"json": {"const": text}},
                {"json": {"enum": [f"{text}1", f"{text}2"]}},
            ]
            for wish in needing:
                [kind] = wish
                if others:
                    assert compiler.compile(S(**wish))
                    continue
                with pytest.raises(ValueError, match=rf"structured_outputs\.{kind} cannot be used: no tokens of the"):
                    compiler.compile(S(**wish))
        assert compiler.compile(S(regex=f"a|{bad}"))  # the model may do without
    finally:
        compiler.close()


@pytest.mark.parametrize(
    "wish",
    [
        S(grammar="start: start"),
        S(grammar='start: x "c"\nx: x "a"'),
        S(json={"$ref": "#"}),
        S(regex=r"[^\x00-\x{10FFFF}]"),
    ],
    ids=lambda wish: wish.kind,
)
def test_what_no_text_satisfies_is_refused_in_words(compiler: GrammarCompiler, wish: StructuredOutputsParams) -> None:
    with pytest.raises(ValueError, match=rf"structured_outputs\.{wish.kind} cannot be used: no text satisfies it"):
        compiler.compile(wish)


SELF = {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}


@pytest.mark.parametrize(
    "wish",
    [
        S(grammar='start: "a" start'),
        S(grammar='start: "ab" x\nx: "cd" start'),
        S(grammar='start: "x"? start'),
        S(grammar='root ::= "a" root'),
        S(json=SELF, disable_any_whitespace=True, disable_additional_properties=True),
    ],
    ids=lambda wish: wish.kind,
)
def test_what_only_endless_texts_satisfy_is_refused(compiler: GrammarCompiler, wish: StructuredOutputsParams) -> None:
    with pytest.raises(ValueError, match=rf"structured_outputs\.{wish.kind} cannot be used: every text of it is end"):
        compiler.compile(wish)


def test_what_is_long_or_may_go_on_for_ever_is_none_of_that(compiler: GrammarCompiler) -> None:
    for wish in (
        S(choice=["b" * 70_000]),
        S(json={"const": "b" * 70_000}),
        S(grammar='start: x{20000} "c"?\nx: "ab"'),
        S(grammar='start: "a" start | "b"'),
        S(grammar='start: ""'),
        S(json={"type": "object", "properties": {"a": {"$ref": "#"}}}),
    ):
        assert compiler.compile(wish)


def test_options_are_part_of_what_is_remembered(compiler: GrammarCompiler) -> None:
    loose, tight = S(json_object=True), S(json_object=True, disable_any_whitespace=True)
    assert compiler.compile(loose) != compiler.compile(tight)


def test_nesting_without_end_is_refused(compiler: GrammarCompiler) -> None:
    deep = '{"type": "object", "properties": ' * 3000 + "{}" + "}" * 3000
    with pytest.raises(ValueError, match=r"structured_outputs\.json cannot be used"):
        compiler.compile(S(json=deep))
    assert compiler.compile(S(regex="still here"))


def test_one_that_takes_too_long_is_ended_and_the_next_goes_on() -> None:
    compiler = GrammarCompiler(Source(), len(TOKENS), seconds=0.05)
    try:
        began = time.monotonic()
        with pytest.raises(ValueError, match=r"regex cannot be used: it takes more than 0\.05 s to compile"):
            compiler.compile(S(regex="(a{1000}){1000}"))
        assert time.monotonic() - began < 20
        assert compiler._checker is None
        assert not compiler._verdicts  # another time it may be in time
        compiler._seconds = 30.0
        assert compiler.compile(S(regex="b"))
    finally:
        compiler.close()


def test_a_checker_that_dies_costs_one_request(compiler: GrammarCompiler) -> None:
    compiler.compile(S(regex="c"))
    assert compiler._checker is not None
    process = compiler._checker.process
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    with pytest.raises(ValueError, match="too much memory"):
        compiler.compile(S(regex="d"))
    assert compiler.compile(S(regex="d"))


def test_few_verdicts_are_kept(compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("octavo.structured.compiler._MAX_VERDICTS", 2)
    for pattern in ("x1", "x2", "x1", "x3"):
        compiler.compile(S(regex=pattern))
    kept = [msgspec.json.decode(key)["regex"] for key in compiler._verdicts]
    assert kept == ["x1", "x3"]


def test_closing_ends_the_process() -> None:
    compiler = GrammarCompiler(Source(), len(TOKENS))
    compiler.compile(S(regex="a"))
    assert compiler._checker is not None
    process = compiler._checker.process
    compiler.close()
    assert process.poll() is not None
    compiler.close()


def test_the_process_s_own_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("resource.setrlimit", lambda *_: None)  # this process keeps its own
    source, target = io.BytesIO(), io.BytesIO()
    for message in (VOCABULARY, S(choice=["a", "b"]), S(regex="(")):
        write_frame(source, message)
    source.seek(0)
    assert checker.main(source, target) == 0
    target.seek(0)
    verdicts = []
    while (frame := read_frame(target)) is not None:
        verdicts.append(msgspec.msgpack.decode(frame, type=Verdict))
    assert verdicts[0] == Verdict()
    assert verdicts[1].grammar is not None
    assert "unclosed" in (verdicts[2].error or "")


def test_a_vocabulary_is_cut_or_filled_to_the_model_s() -> None:
    assert vocabulary_of(Source(), 310).tokens[300:] == [*SPECIAL.values(), *[b""] * 7]
    cut = vocabulary_of(Source(), 301)
    assert (len(cut.tokens), cut.special_ids, cut.eos_ids) == (301, [EOS], [EOS])
    with pytest.raises(ValueError, match="end-of-sequence"):
        vocabulary_of(Source(), 300)
