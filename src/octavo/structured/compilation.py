"""llguidance, put to work on a vocabulary: its tokenizer, and grammars compiled for it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import llguidance

from octavo.structured.masks import first_of
from octavo.structured.vocabulary import Vocabulary

# Fuel, items and states are counted, not timed: what compiled once compiles again. Errors stay short.
LIMITS = llguidance.LLParserLimits(verbose_errors=False)

NO_TOKEN = "NoExtensionBias"  # llguidance's reason where a mask is empty
_NO_TEXT = "no text satisfies it: its beginning is itself again, or impossible, or no token of the model spells it"


class _Wrapper:
    """What llguidance asks of a tokenizer object."""

    def __init__(self, vocabulary: Vocabulary, encode: Callable[[str], list[int]] | None) -> None:
        self.eos_token_id = vocabulary.eos_ids[0]
        self.bos_token_id = None
        self.tokens = vocabulary.tokens
        self.special_token_ids = vocabulary.special_ids
        self._encode = encode or _LongestMatch(vocabulary.tokens)

    def __call__(self, text: str | bytes) -> list[int]:
        return self._encode(text.decode(errors="replace") if isinstance(text, bytes) else text)


class _LongestMatch:
    """Tokenizes by taking the longest token each time, where the tokenizer itself is not at hand."""

    def __init__(self, tokens: Sequence[bytes]) -> None:
        self._ids = {token: index for index, token in enumerate(tokens) if token}
        self._longest = max(map(len, self._ids))

    def __call__(self, text: str) -> list[int]:
        raw, found = text.encode(), []
        while raw:
            size = next((n for n in range(self._longest, 0, -1) if raw[:n] in self._ids), 1)
            if raw[:size] in self._ids:
                found.append(self._ids[raw[:size]])
            raw = raw[size:]
        return found


def ll_tokenizer(vocabulary: Vocabulary, encode: Callable[[str], list[int]] | None = None) -> llguidance.LLTokenizer:
    """Takes half a second for a large vocabulary. encode: the tokenizer's own, without special tokens, so that text
    the grammar forces comes in the tokens that the model knows it by."""
    wrapper = llguidance.TokenizerWrapper(_Wrapper(vocabulary, encode))
    return llguidance.LLTokenizer(wrapper, eos_token=vocabulary.eos_ids)


def compiled_matcher(tokenizer: llguidance.LLTokenizer, grammar: str) -> llguidance.LLMatcher:
    """Raises ValueError with llguidance's reason."""
    matcher = llguidance.LLMatcher(tokenizer, grammar, log_level=0, limits=LIMITS)
    if matcher.is_error():
        raise ValueError(reason(matcher))
    return matcher


def check_beginning(matcher: llguidance.LLMatcher, spelled: Collection[int]) -> None:
    """Put a fresh matcher's grammar to its first test, which leaves the matcher of no further use.

    Raises ValueError where no text begins, where all texts begin with bytes that are not in `spelled` (some
    vocabularies lack bytes that no text they were made from had), and where what all begin with has no end. A grammar
    that goes on for ever behind a choice is not found: its outputs end with max_tokens, or as `refused`.
    """
    mask = matcher.compute_bitmask()  # what the lexer puts off until now is part of the cost
    if matcher.is_error():
        raise ValueError(_NO_TEXT if reason(matcher) == NO_TOKEN else reason(matcher))
    forced = matcher.compute_ff_bytes()
    lacking = next((at for at, byte in enumerate(forced) if byte not in spelled), None)
    if lacking is not None:
        text = forced[max(0, lacking - 32) : lacking + 32].decode(errors="replace")
        raise ValueError(f"no tokens of the model spell {text!r}")
    # With its first token, the parser takes in all that is forced.
    if forced and not matcher.consume_token(first_of(mask)):
        raise ValueError(f"every text of it is endless, or longer than can be forced: {reason(matcher)}")


def reason(matcher: llguidance.LLMatcher) -> str:
    """Why a matcher is in an error state."""
    return str(matcher.get_error()).removesuffix("<non-verbose/>").strip()
