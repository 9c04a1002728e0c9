"""Generation: text, ends, logprobs and limits of one completion."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from real_tokenizers import pair_of

from octavo.protocol.outputs import TokenOutput
from octavo.protocol.plan import TokenLogprobs
from octavo.protocol.sampling import SamplingParams
from octavo.text.generation import Delta, Generation
from octavo.text.tokenizer import Tokenizer


def output(ids: list[int], **fields: Any) -> TokenOutput:
    return TokenOutput("r", ids, **fields)


def generation(tokenizer: Tokenizer | None, prompt: list[int] | None = None, **sampling: Any) -> Generation:
    return Generation(tokenizer, SamplingParams(**sampling), prompt or [])


def entry(token_id: int) -> TokenLogprobs:
    return TokenLogprobs([token_id, 1], [-0.25, -1.5], 3)


def test_text_and_ids_add_up(qwen3: Tokenizer) -> None:
    ids = qwen3.encode("Hello, 🫎 wörld!", False)
    g = generation(qwen3)
    deltas = [g.push(output([i])) for i in ids] + [g.push(output([], finish_reason="length"))]
    assert "".join(d.text for d in deltas) == g.text == "Hello, 🫎 wörld!"
    assert [i for d in deltas for i in d.token_ids] == g.token_ids == ids
    assert [d.finish_reason for d in deltas] == [None] * len(ids) + ["length"]
    assert (g.finish_reason, g.stop_reason, g.finished, g.finished_early) == ("length", None, True, False)
    assert deltas[0].logprobs is g.logprobs is g.cumulative_logprob is g.prompt_logprobs is None


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("include", [False, True])
def test_the_token_that_ends_it_is_an_id_without_text(qwen3: Tokenizer, skip: bool, include: bool) -> None:
    """An end-of-sequence token: special, so with skip_special_tokens it has no text either way."""
    (eos,) = qwen3.eos_token_ids
    ids = [*qwen3.encode("Bye", False), eos]
    g = generation(qwen3, skip_special_tokens=skip, include_stop_str_in_output=include)
    delta = g.push(output(ids, finish_reason="stop"))
    assert delta.text == ("Bye<|im_end|>" if include and not skip else "Bye")
    assert delta.token_ids == ids
    assert (delta.finish_reason, delta.stop_reason, g.finished_early) == ("stop", None, False)


@pytest.mark.parametrize("include", [False, True])
def test_an_ordinary_stop_token(qwen3: Tokenizer, include: bool) -> None:
    ids = qwen3.encode("a stop", False)
    g = generation(qwen3, stop_token_ids=ids[-1:], include_stop_str_in_output=include)
    g.push(output(ids[:-1]))
    delta = g.push(output(ids[-1:], finish_reason="stop", stop_reason=ids[-1]))
    assert g.text == ("a stop" if include else "a")
    assert (delta.finish_reason, delta.stop_reason) == ("stop", ids[-1])
    assert g.token_ids == ids


def test_special_tokens_in_the_middle(qwen3: Tokenizer) -> None:
    ids = qwen3.encode("a<|im_start|>b", False)
    for skip, text in ((True, "ab"), (False, "a<|im_start|>b")):
        g = generation(qwen3, skip_special_tokens=skip)
        g.push(output(ids, finish_reason="length"))
        assert g.text == text


@pytest.mark.parametrize("include", [False, True])
@pytest.mark.parametrize("size", [1, 2, 3, 100])
def test_a_stop_string_ends_it_and_drops_what_follows(qwen3: Tokenizer, include: bool, size: int) -> None:
    ids = qwen3.encode("one two. Three four five", False)
    g = generation(qwen3, stop=["zzz", ". Thr"], include_stop_str_in_output=include, logprobs=1)
    chunks = [ids[i : i + size] for i in range(0, len(ids), size)]
    deltas = [g.push(output(chunk, logprobs=[entry(i) for i in chunk])) for chunk in chunks]
    assert g.text == "".join(d.text for d in deltas) == ("one two. Thr" if include else "one two")
    kept = ids[: ids.index(qwen3.encode(" Three", False)[0]) + 1]
    assert g.token_ids == [i for d in deltas for i in d.token_ids] == kept
    assert [e.token_ids[0] for e in g.logprobs or ()] == kept
    assert (g.finish_reason, g.stop_reason, g.finished_early) == ("stop", ". Thr", True)
    assert g.push(output([1], finish_reason="abort")) == Delta("", [])
    assert g.finish_reason == "stop"


def test_a_stop_string_in_the_last_output_needs_no_abort(qwen3: Tokenizer) -> None:
    g = generation(qwen3, stop="two")
    delta = g.push(output(qwen3.encode("one two three", False), finish_reason="length"))
    assert (delta.text, delta.finish_reason, delta.stop_reason) == ("one ", "stop", "two")
    assert not g.finished_early


@pytest.mark.parametrize("reason", ["length", "abort", "error", "stop"])
def test_held_back_text_is_released_at_the_end(qwen3: Tokenizer, reason: Any) -> None:
    ids = qwen3.encode("wait for it: EN", False)
    g = generation(qwen3, stop="END")
    assert "EN" not in g.push(output(ids)).text
    final = [qwen3.eos_token_ids[0]] if reason == "stop" else []
    delta = g.push(output(final, finish_reason=reason, error="it broke" if reason == "error" else None))
    assert delta.text == "EN"
    assert (g.text, g.finish_reason) == ("wait for it: EN", reason)
    assert g.error == ("it broke" if reason == "error" else None)


def test_an_unfinished_character_is_flushed_at_the_end(qwen3: Tokenizer) -> None:
    ids = qwen3.encode("a🫎", False)[:-1]
    g = generation(qwen3, stop="zz")
    assert g.push(output(ids)).text == "a"
    assert g.push(output([], finish_reason="length")).text == "\ufffd"


def test_stop_strings_count_after_min_tokens(qwen3: Tokenizer) -> None:
    ids = [qwen3.encode("a", False)[0]] * 6
    for min_tokens, kept in ((0, 1), (3, 4), (6, 6)):
        g = generation(qwen3, stop="a", min_tokens=min_tokens, max_tokens=6)
        for i in ids:
            g.push(output([i]))
        assert len(g.token_ids) == kept
        assert g.text == "a" * (kept - (kept < 6))
        assert g.finished == (kept < 6)


def test_logprobs_add_up(qwen3: Tokenizer) -> None:
    g = generation(qwen3, logprobs=1, prompt_logprobs=0)
    assert (g.logprobs, g.cumulative_logprob, g.prompt_logprobs) == ([], 0.0, [])
    g.push(output([], prompt_logprobs=[entry(7)]))
    delta = g.push(output([5, 6], logprobs=[entry(5), entry(6)], prompt_logprobs=[entry(8)], num_cached_tokens=16))
    assert delta.logprobs == g.logprobs == [entry(5), entry(6)]
    assert g.cumulative_logprob == -0.5
    assert g.prompt_logprobs == [entry(7), entry(8)]
    g.push(output([9], logprobs=[entry(9)]))
    assert g.cumulative_logprob == -0.75
    assert g.num_cached_tokens == 16


@pytest.mark.parametrize("with_tokenizer", [False, True])
def test_without_detokenizing_there_are_ids_only(qwen3: Tokenizer, with_tokenizer: bool) -> None:
    g = generation(qwen3 if with_tokenizer else None, detokenize=False)
    delta = g.push(output([1, 2, 3], finish_reason="stop", stop_reason=3))
    assert delta == Delta("", [1, 2, 3], None, "stop", 3)
    assert (g.text, g.token_ids) == ("", [1, 2, 3])


def test_stop_strings_need_a_tokenizer() -> None:
    with pytest.raises(ValueError, match="stop needs a tokenizer"):
        generation(None, stop="x")
    assert generation(None).push(output([1])) == Delta("", [1])


def test_the_prompt_decides_about_the_leading_space(llama2: Tokenizer) -> None:
    ids = llama2.encode("the cat", False)
    after_prompt = generation(llama2, prompt=ids)
    after_prompt.push(output(ids))
    at_start = generation(llama2, prompt=[1])
    at_start.push(output(ids))
    assert (after_prompt.text, at_start.text) == (" the cat", "the cat")


TEXT = st.text("ab 🫎é.", max_size=20)
STOPS = st.lists(st.text("ab 🫎é.", min_size=1, max_size=4), max_size=3)


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(TEXT, STOPS, st.integers(1, 5), st.booleans())
def test_the_result_does_not_depend_on_how_tokens_arrive(text: str, stops: list[str], size: int, include: bool) -> None:
    tokenizer = pair_of("qwen3").ours
    ids = tokenizer.encode(text, False)

    def run(size: int) -> tuple[object, ...]:
        g = generation(tokenizer, stop=stops, include_stop_str_in_output=include)
        pieces = [g.push(output(ids[i : i + size])).text for i in range(0, len(ids), size)]
        pieces.append(g.push(output([], finish_reason="length")).text)
        assert "".join(pieces) == g.text
        return g.text, g.token_ids, g.finish_reason, g.stop_reason

    assert run(size) == run(1)
    if not include:
        assert not any(stop in str(run(1)[0]) for stop in stops)
