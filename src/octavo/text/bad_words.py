"""bad_words: from strings to the token sequences that an output may not hold."""

from __future__ import annotations

from octavo.protocol.sampling import SamplingParams
from octavo.text.tokenizer import Tokenizer


def spell_bad_words(sampling: SamplingParams, tokenizer: Tokenizer | None) -> SamplingParams:
    """`sampling` with its bad_words as bad_words_token_ids: as the tokenizer spells each at the beginning of a text,
    and after a space. Other spellings of the same text are not found.

    Raises ValueError without a tokenizer.
    """
    if not sampling.bad_words:
        return sampling
    if tokenizer is None:
        raise ValueError("bad_words needs a tokenizer: words are looked for as the tokens that spell them")
    texts = [space + word.lstrip() for word in sampling.bad_words for space in ("", " ")]
    found = [*(sampling.bad_words_token_ids or ()), *(tokenizer.encode(text, False) for text in texts)]
    distinct = dict.fromkeys(tuple(ids) for ids in found if ids)
    return sampling.replace(bad_words=None, bad_words_token_ids=[list(ids) for ids in distinct])
