"""Incremental detokenization equals decoding all at once, however the tokens arrive."""

from __future__ import annotations

import random
import time

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from real_tokenizers import Pair
from tokenizers import AddedToken, decoders, models
from tricky_text import TRICKY

from octavo.text.detokenizer import IncrementalDetokenizer
from octavo.text.tokenizer import Tokenizer
from octavo.text.tokenizer_files import TokenizerParts


def pieces_of(detokenizer: IncrementalDetokenizer, ids: list[int], sizes: list[int]) -> list[str]:
    """Push `ids` in pieces of the given sizes, over and over; the flush comes last."""
    pieces, start, turn = [], 0, 0
    while start < len(ids):
        size = sizes[turn % len(sizes)]
        pieces.append(detokenizer.push(ids[start : start + size]))
        start, turn = start + size, turn + 1
    return [*pieces, detokenizer.flush()]


SIZES = st.lists(st.integers(1, 7), min_size=1, max_size=4)


@pytest.mark.parametrize("skip", [False, True])
def test_random_ids(pair: Pair, skip: bool) -> None:
    tokenizer = pair.ours
    special = sorted(tokenizer.special_ids)
    ids = st.integers(0, tokenizer.vocab_size + 5) | st.integers(0, 300) | st.sampled_from(special)

    @settings(max_examples=150, deadline=None, derandomize=True, database=None)
    @given(st.lists(ids, max_size=40), SIZES)
    def check(ids: list[int], sizes: list[int]) -> None:
        detokenizer = IncrementalDetokenizer(tokenizer, skip_special_tokens=skip)
        assert "".join(pieces_of(detokenizer, ids, sizes)) == tokenizer.decode(ids, skip)

    check()


def test_text_comes_out_whole_after_any_prompt(pair: Pair) -> None:
    """The reference itself is the judge here: prompt and output decoded together begin with the prompt's text."""
    for prompt in ("x", "你好", " a\n"):
        prompt_ids = pair.ours.encode(prompt, add_special_tokens=True)
        start = pair.reference.decode(prompt_ids, clean_up_tokenization_spaces=False)
        for text in TRICKY:
            ids = pair.ours.encode(text, add_special_tokens=False)
            whole = pair.reference.decode(prompt_ids + ids, clean_up_tokenization_spaces=False)
            detokenizer = IncrementalDetokenizer(pair.ours, prompt_ids, skip_special_tokens=False)
            pieces = pieces_of(detokenizer, ids, [1])
            assert start + "".join(pieces) == whole
            assert not any("\ufffd" in piece for piece in pieces)


def test_an_unfinished_character_waits_and_is_flushed(qwen3: Tokenizer) -> None:
    ids = qwen3.encode("🫎", add_special_tokens=False)
    detokenizer = IncrementalDetokenizer(qwen3)
    assert [detokenizer.push([i]) for i in ids[:-1]] == [""] * (len(ids) - 1)
    assert detokenizer.push(ids[-1:]) == "🫎"
    assert detokenizer.push(ids[:1]) == ""
    assert detokenizer.flush() == "\ufffd"


def test_bytes_that_can_never_be_a_character_do_not_wait(llama2: Tokenizer) -> None:
    byte = {value: 3 + value for value in range(256)}  # ids of <0x00> .. <0xFF>
    detokenizer = IncrementalDetokenizer(llama2, [byte[0x41]])
    assert detokenizer.push([byte[0xFF]]) == "\ufffd"
    assert detokenizer.push([byte[0xE4]]) == ""
    assert detokenizer.push([byte[0x41]]) == "\ufffdA"
    assert detokenizer.flush() == ""


def test_a_character_begun_in_the_prompt_is_completed(llama2: Tokenizer) -> None:
    byte = {value: 3 + value for value in range(256)}
    fox, snow = "🦊".encode(), "雪".encode()
    for prompt_bytes, output_bytes, text in (
        (fox[:1], fox[1:], "🦊"),
        (fox[:3], fox[3:], "🦊"),
        (fox + snow[:2], snow[2:], "雪"),
        (snow[1:], b"a", "a"),
        (b"\xf0\x9f", b"a", "\ufffda"),
    ):
        for special in ([], [2]):  # special tokens in between add nothing
            prompt = [byte[b] for b in prompt_bytes] + special
            detokenizer = IncrementalDetokenizer(llama2, prompt)
            assert detokenizer.push([byte[b] for b in output_bytes]) == text


def test_the_leading_space_is_dropped_at_the_start_of_a_text_only(llama2: Tokenizer) -> None:
    ids = llama2.encode("the cat", add_special_tokens=False)
    assert IncrementalDetokenizer(llama2).push(ids) == "the cat"
    assert IncrementalDetokenizer(llama2, [1]).push(ids) == "the cat"  # nothing visible in the prompt
    assert IncrementalDetokenizer(llama2, ids).push(ids) == " the cat"
    one_by_one = IncrementalDetokenizer(llama2)
    space = llama2.encode("", add_special_tokens=False) or llama2.encode(" ", add_special_tokens=False)[:1]
    assert one_by_one.push([2]) + one_by_one.push(space) + one_by_one.push(ids) == llama2.decode(space + ids, True)


def test_time_is_linear(qwen3: Tokenizer) -> None:
    """Cost a token does not grow with the output. The bound is loose: it has to hold on a busy machine."""
    ids = random.Random(0).choices(range(qwen3.vocab_size), k=20_000)

    def seconds(count: int) -> float:
        best = float("inf")
        for _ in range(3):
            detokenizer = IncrementalDetokenizer(qwen3, ids)
            start = time.perf_counter()
            for token_id in ids[:count]:
                detokenizer.push((token_id,))
            best = min(best, time.perf_counter() - start)
        return best

    seconds(len(ids))
    assert seconds(20_000) < 10 * 6 * seconds(2_000)


def test_spaces_that_begin_a_special_token_right_after_another_can_be_dropped() -> None:
    backend = tokenizers.Tokenizer(models.BPE(vocab={"a": 0, "Ġ": 1}, merges=[]))
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(" <x>", special=True), AddedToken("<y>", special=True)])
    tokenizer = Tokenizer(TokenizerParts(backend, None, None, (), None))
    x, y = backend.token_to_id(" <x>"), backend.token_to_id("<y>")
    ids = [x, x, y, x, 0, x, 1, y, x]
    for kept, text in ((True, " <x> <x><y> <x>a <x> <y> <x>"), (False, " <x><x><y><x>a <x> <y><x>")):
        for size in (1, 2, 9):
            detokenizer = IncrementalDetokenizer(tokenizer, (), False, kept)
            assert "".join(pieces_of(detokenizer, ids, [size])) == text
        assert "".join(pieces_of(IncrementalDetokenizer(tokenizer, (), True, kept), ids, [2])) == "a "
