"""Bad words as the tokens that spell them."""

from __future__ import annotations

import pytest
from real_tokenizers import Pair

from octavo.protocol.sampling import SamplingParams
from octavo.text.bad_words import spell_bad_words


def test_a_word_is_spelled_at_the_beginning_and_after_a_space(pair: Pair) -> None:
    for word in ("Paris", " Paris", "New York", "…"):
        spelled = spell_bad_words(SamplingParams(bad_words=[word]), pair.ours)
        assert spelled.bad_words is None
        texts = {pair.ours.decode(ids, False).lstrip() for ids in spelled.bad_words_token_ids or ()}
        assert texts == {word.lstrip()}
        assert pair.ours.encode(" " + word.lstrip(), False) in (spelled.bad_words_token_ids or ())
        assert pair.ours.encode(word.lstrip(), False) in (spelled.bad_words_token_ids or ())


def test_sequences_that_were_given_stay_and_none_comes_twice(pair: Pair) -> None:
    ids = pair.ours.encode("word", False)
    params = SamplingParams(bad_words=["word", "word"], bad_words_token_ids=[[7, 8], ids])
    found = spell_bad_words(params, pair.ours).bad_words_token_ids or []
    assert found[:2] == [[7, 8], ids]
    assert len(found) == len({tuple(sequence) for sequence in found})


def test_words_need_a_tokenizer_and_no_words_need_nothing() -> None:
    plain = SamplingParams()
    assert spell_bad_words(plain, None) is plain
    with pytest.raises(ValueError, match=r"^bad_words needs a tokenizer"):
        spell_bad_words(SamplingParams(bad_words=["x"]), None)
