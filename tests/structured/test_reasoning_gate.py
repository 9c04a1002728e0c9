"""Reasoning ahead of a grammar, and reasoning that is cut short, token by token."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from structured_rig import EOS, OTHER_EOS, TOKENS, VOCABULARY, allowed, ids, matcher, request, took

from octavo.protocol.reasoning import ReasoningMarks
from octavo.protocol.structured import StructuredOutputsParams
from octavo.structured.grammar import grammar_of
from octavo.structured.grammars import Constraint, Grammars
from octavo.structured.reasoning.registry import REASONING_PARSERS, reasoning_marks
from octavo.structured.vocabulary import Vocabulary

# Tokens besides those of the rig: both marks whole, as Qwen3 has them, and some that go on beyond a mark's end.
OPEN, CLOSE, BREAK, BRACE, WHOLE = range(303, 308)
MORE = [b"<think>", b"</think>", b">\n\n", b">{", b"x</think> {"]
SINGLE = Vocabulary(TOKENS + MORE, VOCABULARY.special_ids, VOCABULARY.eos_ids)
SPELLED = Vocabulary([*TOKENS, b"", b"", *MORE[2:]], VOCABULARY.special_ids, VOCABULARY.eos_ids)
EVERYTHING = set(range(8 * -(-len(SINGLE.tokens) // 8)))
ENDS = {EOS, OTHER_EOS}
JSON = StructuredOutputsParams(regex=r'\{"a":(true|false)\}')
THINK = ReasoningMarks(("<think>",), ("</think>",), is_open=True)
MAYBE = ReasoningMarks(("<think>",), ("</think>",), is_open=False)


def made(
    marks: ReasoningMarks, wish: StructuredOutputsParams | None = None, single: bool = True, **sampling: object
) -> Constraint:
    """A gate over tokens in which the marks are a token each, or are spelled by bytes."""
    vocabulary, whole = (SINGLE, {"<think>": [OPEN], "</think>": [CLOSE]}) if single else (SPELLED, {})
    grammar = None if wish is None else grammar_of(wish, vocabulary)
    store = Grammars(lambda: (vocabulary, lambda text: whole.get(text, list(text.encode()))))
    asked = request(grammar, marks, max_tokens=None, structured_outputs=wish, **sampling)
    store.compile(asked)
    found = store.find(asked)
    assert found is not None
    return found


def mask_of(state: Constraint) -> set[int]:
    return EVERYTHING if state.mask is None else allowed(state.mask)


def run(state: Constraint, tokens: list[int]) -> None:
    """Take tokens, each of which the mask must allow."""
    for token in tokens:
        assert token in mask_of(state), token
        assert took(state, [token]) is None
    assert state.error is None


@pytest.mark.parametrize("close", [[CLOSE], ids("</think>"), [*ids("</think"), BREAK]])
def test_reasoning_is_free_and_the_grammar_begins_after_its_end(close: list[int]) -> None:
    state = made(THINK, JSON)
    assert EVERYTHING - mask_of(state) == {*ENDS, WHOLE}
    run(state, [*ids('{"no </thi> '), OPEN, *close])
    assert state.num_accepted == 13 + len(close)
    assert mask_of(state) == allowed(matcher(JSON).mask)
    run(state, ids('{"a":true}'))
    assert mask_of(state) == ENDS


def test_no_token_carries_text_past_the_end_of_the_reasoning() -> None:
    state = made(THINK, JSON, single=False)
    run(state, ids("hm</think"))
    assert EVERYTHING - mask_of(state) == {*ENDS, WHOLE, BRACE}
    run(state, [BREAK])
    assert mask_of(state) == allowed(matcher(JSON).mask)


def test_the_output_itself_may_open_the_reasoning_or_not() -> None:
    first = allowed(matcher(JSON).mask)
    state = made(MAYBE, JSON)
    assert mask_of(state) == first | {OPEN}
    run(state, ids('{"a":true}'))
    assert mask_of(state) == ENDS
    state = made(MAYBE, JSON)
    run(state, [OPEN])
    assert EVERYTHING - mask_of(state) == {*ENDS, WHOLE}
    run(state, [*ids("hm"), CLOSE])
    assert mask_of(state) == first


def test_an_opening_of_several_tokens_is_gone_through_to_its_end() -> None:
    state = made(MAYBE, JSON, single=False)
    assert mask_of(state) == allowed(matcher(JSON).mask) | {*ids("<")}
    run(state, ids("<"))
    assert mask_of(state) == {*ids("t")}
    run(state, ids("think>so</think>"))
    run(state, ids('{"a":false}'))
    assert mask_of(state) == ENDS


def test_a_grammar_that_may_begin_like_an_opening_gets_back_what_is_its_own() -> None:
    wish = StructuredOutputsParams(regex="<(this|think>[a-z]*!)")
    state = made(MAYBE, wish, single=False)
    run(state, ids("<this"))
    assert mask_of(state) == ENDS
    state = made(MAYBE, wish, single=False)
    run(state, ids("<think>no</think><this"))
    assert mask_of(state) == ENDS


@pytest.mark.parametrize("budget", [0, 1, 3])
@pytest.mark.parametrize("single", [True, False])
def test_at_the_budget_the_end_is_forced(budget: int, single: bool) -> None:
    state = made(THINK, single=single, thinking_token_budget=budget)
    for left in range(budget, 0, -1):
        assert state.num_free == left
        assert state.mask is None
        run(state, ids("a"))
    for token in [CLOSE] if single else ids("</think>"):
        assert state.num_free == 0
        assert mask_of(state) == {token}
        run(state, [token])
    assert state.mask is None
    assert state.num_free > 10**6


def test_a_mark_that_has_begun_is_not_begun_again() -> None:
    state = made(THINK, single=False, thinking_token_budget=5)
    run(state, ids("hm </t"[1:]))
    run(state, ids("hink>"))
    assert state.mask is None


def test_reasoning_that_ends_by_itself_spends_no_more_of_its_budget() -> None:
    state = made(MAYBE, thinking_token_budget=2)
    assert (state.mask, state.num_free) == (None, 2)
    run(state, [*ids("\n"), OPEN])
    assert (state.mask, state.num_free) == (None, 2)
    run(state, [*ids("a"), CLOSE])
    run(state, ids("and on and on"))
    assert state.mask is None
    plain = made(MAYBE, thinking_token_budget=0)
    run(plain, ids("<thanks> for all"))
    assert plain.mask is None
    assert plain.num_free > 10**6


def test_after_a_forced_end_comes_the_grammar() -> None:
    state = made(MAYBE, JSON, thinking_token_budget=1)
    assert state.num_free == 0
    run(state, [OPEN, *ids("a"), CLOSE, *ids('{"a":true}')])
    assert mask_of(state) == ENDS


def test_min_tokens_counts_the_reasoning_and_stop_tokens_end_it() -> None:
    wish = StructuredOutputsParams(regex="x{1,9}")
    state = made(THINK, wish, min_tokens=4, stop_token_ids=ids("z"))
    assert EVERYTHING - mask_of(state) == {*ENDS, WHOLE, *ids("z")}
    run(state, [*ids("a"), CLOSE, *ids("x")])
    assert mask_of(state) == {*ids("x")}
    run(state, ids("x"))
    assert mask_of(state) == {*ids("x"), *ENDS}
    later = made(THINK, wish, min_tokens=1, stop_token_ids=ids("z"))
    run(later, ids("a"))
    assert EVERYTHING - mask_of(later) == {*ENDS, WHOLE}


HARMONY = "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final"


@pytest.mark.parametrize("format_name", ["", " <|constrain|>json", " <|constrain|>Thing"])
def test_harmony_reasons_up_to_its_final_message(format_name: str) -> None:
    marks = reasoning_marks("openai_gptoss", "<|start|>assistant")
    assert marks is not None
    state = made(marks, JSON)
    assert mask_of(state) >= ENDS  # a call may end the output
    run(state, ids(f"{HARMONY}{format_name}<|message|>"))
    assert mask_of(state) == allowed(matcher(JSON).mask)


def test_marks_that_the_vocabulary_cannot_spell_are_refused() -> None:
    store = Grammars(lambda: (SINGLE, lambda _: [1]))
    with pytest.raises(ValueError, match="do not spell '<think>'"):
        store.compile(request(None, MAYBE, thinking_token_budget=1))


@pytest.mark.parametrize(
    ("parser", "prompt", "expected"),
    [
        ("qwen3", "<|im_start|>assistant\n", MAYBE),
        ("qwen3", "<think>\n", THINK),
        ("qwen3", "<think>\n\n</think>\n\n", None),
        ("deepseek_r1", "", THINK),
        ("deepseek_r1", "<think>\n", THINK),
        ("deepseek_r1", "<think>\n\n</think>\n\n", None),
        ("openai_gptoss", "<|channel|>final<|message|>", None),
    ],
)
def test_the_prompt_may_have_opened_or_closed_it(parser: str, prompt: str, expected: ReasoningMarks | None) -> None:
    assert reasoning_marks(parser, prompt) == expected


PIECES = st.sampled_from(["<think>", "</think>", "<", "</", "think", ">", "hm", " ", "\n", "</think>\n\n"])


@given(pieces=st.lists(PIECES, max_size=10), name=st.sampled_from(["qwen3", "deepseek_r1"]), single=st.booleans())
@settings(max_examples=150, deadline=None, derandomize=True)
def test_the_gate_and_the_parser_agree_on_where_the_answer_begins(pieces: list[str], name: str, single: bool) -> None:
    """The budget is over from the start: the gate forces a mark where, and only where, the parser reads reasoning."""
    marks = reasoning_marks(name, "")
    assert marks is not None
    state = made(marks, single=single, thinking_token_budget=0)
    parser = REASONING_PARSERS[name]("")
    text = "".join(pieces)
    assert took(state, ids(text)) is None
    # A character that is neither space nor of a mark, told as reasoning or content.
    [event] = [event for event in (*parser.feed(text + "@"), *parser.finish()) if "@" in event.text]
    assert (state.mask is not None) == (type(event).__name__ == "ReasoningText")
