"""Matchers: which tokens may come next in one output, and what each token that came changes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence

import llguidance

from octavo.protocol.sampling import SamplingParams
from octavo.structured.compilation import compiled_matcher, ll_tokenizer, reason
from octavo.structured.vocabulary import Vocabulary

_MAX_GRAMMARS = 256


class GrammarMatcher:
    """The state of one output within its grammar. Its owner is the only one who calls `accept` and `rollback`.

    mask: the tokens that may come next, one bit each, the lowest of a byte first. Where the text may end these
    include the end-of-sequence tokens; where it must end, there are no others. With ignore_eos, or below min_tokens,
    those that would end the output are left out as long as others are there.
    num_accepted: how many tokens of the output it has seen.
    """

    def __init__(self, matcher: llguidance.LLMatcher, eos_ids: Sequence[int], sampling: SamplingParams) -> None:
        """Raises ValueError for a grammar that is too complex."""
        self._matcher = matcher
        self._min_tokens = sampling.min_tokens
        self._ignores_eos = sampling.ignore_eos
        self._eos_ids = tuple(eos_ids)
        self._end_ids = (*eos_ids, *(sampling.stop_token_ids or ()))
        self.num_accepted = 0
        self.mask = self._next_mask()

    def accept(self, token_ids: Iterable[int]) -> str | None:
        """Take in tokens of the output. Returns what went wrong, in words: nothing more may be asked then."""
        for token_id in token_ids:
            if not self._matcher.consume_token(token_id):
                return f"the grammar cannot take token {token_id}: {reason(self._matcher)}"
            self.num_accepted += 1
        try:
            self.mask = self._next_mask()
        except ValueError as error:
            return str(error)
        return None

    def rollback(self, num_tokens: int) -> None:
        """Forget the last tokens. Raises ValueError for more than there are."""
        if not 0 <= num_tokens <= self.num_accepted:
            raise ValueError(f"num_tokens={num_tokens} is out of range; allowed: 0..{self.num_accepted}")
        self._matcher.rollback(num_tokens)
        self.num_accepted -= num_tokens
        self.mask = self._next_mask()

    def _next_mask(self) -> bytes:
        mask: bytes = self._matcher.compute_bitmask()
        if self._matcher.is_error():
            raise ValueError(f"the grammar went beyond a limit: {reason(self._matcher)}")
        if self.num_accepted < self._min_tokens:
            return _without(mask, self._end_ids)
        return _without(mask, self._eos_ids) if self._ignores_eos else mask


def _without(mask: bytes, token_ids: Iterable[int]) -> bytes:
    """The mask less these tokens, or the mask itself where nothing would be left."""
    bits = bytearray(mask)
    for token_id in token_ids:
        if token_id >> 3 < len(bits):
            bits[token_id >> 3] &= ~(1 << (token_id & 7))
    return bytes(bits) if any(bits) else mask


class Grammars:
    """Compiled grammars by their text, the least recently used dropped first. Any thread may call.

    load: gives the vocabulary and how to encode text; called at the first use, which may take a second.
    """

    def __init__(self, load: Callable[[], tuple[Vocabulary, Callable[[str], list[int]]]]) -> None:
        self._load = load
        self._tokenizer: llguidance.LLTokenizer | None = None
        self._eos_ids: list[int] = []
        self._compiled: OrderedDict[str, llguidance.LLMatcher] = OrderedDict()

    def find(self, grammar: str, sampling: SamplingParams) -> GrammarMatcher | None:
        """A fresh matcher of a grammar that was compiled before, in microseconds; else None.

        Matchers of one grammar share its lexer, whose states are limited: one that is used up is compiled anew.
        """
        compiled = self._compiled.pop(grammar, None)
        if compiled is None:
            return None
        try:
            found = GrammarMatcher(compiled.deep_copy(), self._eos_ids, sampling)
        except ValueError:
            return None
        self._compiled[grammar] = compiled
        return found

    def compile(self, grammar: str, sampling: SamplingParams) -> GrammarMatcher:
        """A fresh matcher. Raises ValueError for a grammar that is wrong, or too complex."""
        if self._tokenizer is None:
            vocabulary, encode = self._load()
            self._eos_ids = vocabulary.eos_ids
            self._tokenizer = ll_tokenizer(vocabulary, encode)
        matcher = compiled_matcher(self._tokenizer, grammar)
        made = GrammarMatcher(matcher.deep_copy(), self._eos_ids, sampling)
        self._compiled[grammar] = matcher
        while len(self._compiled) > _MAX_GRAMMARS:
            self._compiled.popitem(last=False)
        return made
