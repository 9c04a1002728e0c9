"""A matcher's mask is what a naive check of every token says; state goes forward and back."""

from __future__ import annotations

import re

import llguidance
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from structured_rig import (
    BEGIN,
    EOS,
    OTHER_EOS,
    SPECIAL,
    TOKENS,
    VOCABULARY,
    allowed,
    grammars,
    ids,
    matcher,
    request,
    took,
)

from octavo.protocol.structured import StructuredOutputsParams
from octavo.structured.grammar import grammar_of
from octavo.structured.grammars import Grammars
from octavo.structured.vocabulary import Vocabulary

LANGUAGES = [["a", "ab", "abc"], ["yes", "no", "nothing"], ["{true}", "{false}"], ["12", "1", "é"], ["abcabc", "abab"]]
PROPERTY = settings(deadline=None, derandomize=True, max_examples=60, suppress_health_check=[HealthCheck.too_slow])


def naive_mask(language: list[bytes], text: bytes) -> set[int]:
    """Tokens that lead from `text` to a prefix of a word of the language; ends where it is one."""
    found = {
        token_id
        for token_id, token in enumerate(TOKENS[:BEGIN])
        if token and token_id not in (EOS, OTHER_EOS) and any(word.startswith(text + token) for word in language)
    }
    return found | ({EOS, OTHER_EOS} if text in language else set())


@PROPERTY
@given(st.data(), st.sampled_from(LANGUAGES))
def test_masks_are_those_of_a_naive_check_of_each_token(data, words):
    language = [word.encode() for word in words]
    state = matcher(StructuredOutputsParams(choice=words))
    text = b""
    history = [state.mask]
    while True:
        expected = naive_mask(language, text)
        found = allowed(state.mask)
        # Where the grammar leaves one continuation, only the tokens in which the tokenizer writes it are offered.
        assert found <= expected
        assert found
        assert found & {EOS, OTHER_EOS} == expected & {EOS, OTHER_EOS}
        if len({TOKENS[i][:1] for i in expected}) > 1:
            assert found == expected
        ordinary = sorted(found - {EOS, OTHER_EOS})
        if not ordinary:
            break
        token_id = data.draw(st.sampled_from(ordinary))
        assert took(state, [token_id]) is None
        text += TOKENS[token_id]
        history.append(state.mask)
    back = data.draw(st.integers(0, state.num_accepted))
    state.rollback(back)
    assert state.mask == history[len(history) - 1 - back]


@PROPERTY
@given(st.from_regex(r"[ab]{1,3}-(x|yz)*", fullmatch=True))
def test_a_text_of_the_language_is_accepted_token_by_token(text):
    state = matcher(StructuredOutputsParams(regex=r"[ab]{1,3}-(x|yz)*"))
    for token_id in ids(text):
        assert token_id in allowed(state.mask)
        assert took(state, [token_id]) is None
    assert EOS in allowed(state.mask)


@PROPERTY
@given(st.text("abxyz-", max_size=8))
def test_a_text_is_accepted_if_and_only_if_the_regex_matches(text):
    pattern = r"[ab]{1,3}-(x|yz)*"
    state = matcher(StructuredOutputsParams(regex=pattern))
    for token_id in ids(text):
        if token_id not in allowed(state.mask):
            assert took(state, [token_id]) is not None
            assert re.fullmatch(pattern, text) is None
            return
        assert took(state, [token_id]) is None
    assert (EOS in allowed(state.mask)) == (re.fullmatch(pattern, text) is not None)


def test_a_complete_grammar_allows_the_ends_only() -> None:
    state = matcher(StructuredOutputsParams(regex="ab"))
    assert took(state, ids("ab")) is None
    assert allowed(state.mask) == {EOS, OTHER_EOS}
    assert took(state, [OTHER_EOS]) is None


def test_rollback_restores_each_mask_and_refuses_more_than_there_is() -> None:
    state = matcher(StructuredOutputsParams(regex="[ab]c[de]"))
    masks = [state.mask]
    for token_id in ids("bcd"):
        assert took(state, [token_id]) is None
        masks.append(state.mask)
    state.rollback(2)
    assert (state.num_accepted, state.mask) == (1, masks[1])
    assert took(state, ids("ce")) is None
    assert state.mask == masks[3]
    state.rollback(3)
    assert state.mask == masks[0]
    with pytest.raises(ValueError, match=r"num_tokens=1 is out of range; allowed: 0\.\.0"):
        state.rollback(1)


def test_ignore_eos_goes_on_while_the_grammar_can() -> None:
    state = matcher(StructuredOutputsParams(regex="a{1,3}"), ignore_eos=True)
    for _ in range(2):
        assert took(state, ids("a")) is None
        assert not allowed(state.mask) & {EOS, OTHER_EOS}
    assert took(state, ids("a")) is None
    assert allowed(state.mask) == {EOS, OTHER_EOS}


def test_min_tokens_bars_ends_while_the_grammar_can_go_on() -> None:
    wish = StructuredOutputsParams(regex="x{1,5}z?")
    state = matcher(wish, min_tokens=3, stop_token_ids=ids("z"))
    for _ in range(2):
        assert took(state, ids("x")) is None
        assert allowed(state.mask) == set(ids("x"))
    assert took(state, ids("x")) is None
    assert allowed(state.mask) == {*ids("xz"), EOS, OTHER_EOS}
    short = matcher(StructuredOutputsParams(regex="a"), min_tokens=3)
    assert took(short, ids("a")) is None
    assert allowed(short.mask) == {EOS, OTHER_EOS}


def test_a_dead_end_is_an_error_in_words() -> None:
    """The tokens lack a byte that the text needs after what the model chose."""
    lacking = Vocabulary([b"" if token == b"!" else token for token in TOKENS], [*SPECIAL], VOCABULARY.eos_ids)
    store = Grammars(lambda: (lacking, lambda text: [token for token in ids(text) if token != ids("!")[0]]))
    state = store.compile(request(grammar_of(StructuredOutputsParams(regex="a[!]|b[!?]|c"), lacking)))
    state.accept(ids("a"))
    assert state.mask is not None
    assert "no token of the model spells" in (state.error or "")
    other = store.compile(request(grammar_of(StructuredOutputsParams(regex="a[!]|b[!?]|c"), lacking)))
    other.accept(ids("b"))
    assert (other.error, allowed(other.mask or b"")) == (None, set(ids("?")))


def test_special_tokens_come_only_where_a_grammar_names_them() -> None:
    anything = matcher(StructuredOutputsParams(regex=r"(.|\n)*"))
    assert allowed(anything.mask) & {EOS, OTHER_EOS, BEGIN} == {EOS, OTHER_EOS}
    named = matcher(StructuredOutputsParams(grammar='start: <|call|> "x"'))
    assert allowed(named.mask) == {BEGIN}


def test_what_was_compiled_is_found_again_fresh() -> None:
    store, wish = grammars(), StructuredOutputsParams(regex="ab|cd")
    asked = request(grammar_of(wish, VOCABULARY))
    assert store.find(asked) is None
    first = store.compile(asked)
    start = first.mask
    assert took(first, ids("a")) is None
    again = store.find(asked)
    assert again is not None
    assert (again.mask, again.num_accepted) == (start, 0)
    assert first.mask != start


def test_a_grammar_whose_shared_lexer_is_used_up_is_compiled_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = llguidance.LLParserLimits(verbose_errors=False, max_lexer_states=30)
    monkeypatch.setattr("octavo.structured.compilation.LIMITS", limits)
    store = grammars()
    asked = request(grammar_of(StructuredOutputsParams(regex="[a-z]{1,60}"), VOCABULARY))
    first = store.compile(asked)
    assert any(took(first, [token_id]) for token_id in ids("abcdefgh" * 7))
    assert store.find(asked) is None
    assert took(store.compile(asked), ids("a")) is None


def test_the_least_recently_used_grammar_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("octavo.structured.grammars._MAX_GRAMMARS", 2)
    store = grammars()
    texts = [request(grammar_of(StructuredOutputsParams(regex=r), VOCABULARY)) for r in "abc"]
    store.compile(texts[0])
    store.compile(texts[1])
    assert store.find(texts[0]) is not None
    store.compile(texts[2])
    assert [store.find(text) is not None for text in texts] == [True, False, True]


@pytest.mark.parametrize(
    ("limits", "compiles", "words"),
    [
        ({"max_grammar_size": 2}, False, "grammar size"),
        ({"step_max_items": 2}, False, "Too many items"),
        ({"max_lexer_states": 4}, True, "too many states"),
        ({"max_items_in_row": 2}, True, "Current row has"),
    ],
)
def test_a_grammar_beyond_a_limit_is_an_error_in_words(
    monkeypatch: pytest.MonkeyPatch, limits: dict[str, int], compiles: bool, words: str
) -> None:
    made = llguidance.LLParserLimits(verbose_errors=False, **limits)
    monkeypatch.setattr("octavo.structured.compilation.LIMITS", made)
    wish = StructuredOutputsParams(json={"type": "object", "properties": {"a": {"type": "string"}}})
    if compiles:
        error = took(matcher(wish), ids('{"a'))
        assert words in (error or "")
    else:
        with pytest.raises(ValueError, match=words):
            matcher(wish)


def test_what_goes_on_for_ever_behind_a_choice_ends_in_words() -> None:
    state = matcher(StructuredOutputsParams(grammar='start: x | "b"\nx: "a" x'))
    assert took(state, ids("b")) is None
    state.rollback(1)
    assert took(state, ids("a")) is None
    assert "beyond a limit, or never ends" in (took(state, ids("a")) or "")


def test_masks_made_together_are_those_made_alone() -> None:
    """Some matchers of one store move at once, others do not; one of them fails."""
    wish = StructuredOutputsParams(regex="[ab]{1,4}c?")
    store, text = grammars(), grammar_of(wish, VOCABULARY)
    together = [store.compile(request(text, ignore_eos=index == 1)) for index in range(4)]
    steps = ["ab", "b", "abc", ""]
    for state, step in zip(together, steps):
        state.accept(ids(step))
    failed = store.compile(request(text))
    failed.accept(ids("x"))
    assert "cannot take token" in (failed.error or "")
    for index, (state, step) in enumerate(zip(together, steps)):
        alone = matcher(wish, ignore_eos=index == 1)
        alone.accept(ids(step))
        assert allowed(state.mask) == allowed(alone.mask)
        assert state.error is None


@pytest.mark.parametrize("num_tokens", [320, 321, 352])
def test_masks_are_made_for_vocabularies_of_any_size(num_tokens: int) -> None:
    vocabulary = Vocabulary(TOKENS + [b""] * (num_tokens - len(TOKENS)), VOCABULARY.special_ids, VOCABULARY.eos_ids)
    store = Grammars(lambda: (vocabulary, lambda text: list(text.encode())))
    text = grammar_of(StructuredOutputsParams(regex="abc"), VOCABULARY)
    pair = [store.compile(request(text)) for _ in range(2)]
    for state in pair:
        state.accept(ids("a"))
    assert [allowed(state.mask) for state in pair] == [set(ids("b"))] * 2


@PROPERTY
@given(st.data(), st.sampled_from(LANGUAGES))
def test_masks_after_guesses_are_those_of_the_guesses_accepted(data, words):
    """Up to the first that the grammar does not allow, or that would end the output; nothing is changed by it."""
    params = StructuredOutputsParams(choice=words)
    asked, followed = matcher(params), matcher(params)
    drafts = []
    for _ in range(4):
        choice = data.draw(st.sampled_from([*sorted(allowed(followed.mask)), BEGIN]))
        drafts.append(choice)
        if choice in (BEGIN, EOS, OTHER_EOS):
            break
        followed.accept([choice])
    before = asked.mask
    found = asked.masks(drafts)
    assert (asked.mask, asked.num_accepted, asked.error) == (before, 0, None)
    reference, expected = matcher(params), []
    for choice in drafts:
        expected.append(reference.mask)
        if choice in (BEGIN, EOS, OTHER_EOS):
            break
        reference.accept([choice])
    else:
        expected.append(reference.mask)
    assert found == expected
