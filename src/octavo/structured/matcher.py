"""Matchers: which tokens may come next in one output, and what each token that came changes."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence

import llguidance
import numpy as np

from octavo.protocol.sampling import SamplingParams
from octavo.structured.compilation import compiled_matcher, ll_tokenizer, reason
from octavo.structured.vocabulary import Vocabulary

_MAX_GRAMMARS = 256
_MAX_THREADS = 16


class MaskMaker:
    """Makes the masks of all matchers that have moved, side by side on the machine's cores, at the first that is asked
    for. One thread only uses it: the owner of the matchers."""

    def __init__(self, vocab_size: int) -> None:
        self._num_words = -(-vocab_size // 32)  # of 32 bits, in a mask
        self._executor = llguidance.LLExecutor(min(_MAX_THREADS, len(os.sched_getaffinity(0))))
        self._moved: list[GrammarMatcher] = []

    def moved(self, matcher: GrammarMatcher) -> None:
        """Its mask is no longer that of its state."""
        self._moved.append(matcher)

    def make(self) -> None:
        """Bring the masks of all that have moved up to date."""
        moved, self._moved = self._moved, []
        if len(moved) == 1:
            moved[0].take(moved[0].state.compute_bitmask())
            return
        masks = np.zeros((len(moved), self._num_words), dtype=np.int32)
        rows = [(matcher.state, row) for row, matcher in enumerate(moved)]
        self._executor.unsafe_compute_mask_ptr(rows, masks.ctypes.data, masks.strides[0], len(moved))
        for matcher, mask in zip(moved, masks):
            matcher.take(mask.tobytes())


class GrammarMatcher:
    """The state of one output within its grammar. Its owner is the only one who calls `accept` and `rollback`.

    state: llguidance's own, for the MaskMaker. num_accepted: how many tokens of the output it has seen.
    """

    def __init__(
        self, state: llguidance.LLMatcher, eos_ids: Sequence[int], sampling: SamplingParams, maker: MaskMaker
    ) -> None:
        """Any thread may call. Raises ValueError for a grammar that is too complex."""
        self.state = state
        self._maker = maker
        self._min_tokens = sampling.min_tokens
        self._ignores_eos = sampling.ignore_eos
        self._eos_ids = tuple(eos_ids)
        self._end_ids = (*eos_ids, *(sampling.stop_token_ids or ()))
        self.num_accepted = 0
        self._error: str | None = None
        self._is_stale = False
        self.take(state.compute_bitmask())
        if self._error is not None:
            raise ValueError(self._error)

    @property
    def mask(self) -> bytes:
        """The tokens that may come next, one bit each, the lowest of a byte first. Where the text may end these
        include the end-of-sequence tokens; where it must end, there are no others. With ignore_eos, or below
        min_tokens, those that would end the output are left out as long as others are there."""
        if self._is_stale:
            self._maker.make()
        return self.last_mask

    @property
    def error(self) -> str | None:
        """Why there is no mask, in words: nothing more may be asked then."""
        if self._is_stale:
            self._maker.make()
        return self._error

    def accept(self, token_ids: Iterable[int]) -> None:
        """Take in tokens of the output. One that the grammar does not allow is an `error`."""
        for token_id in token_ids:
            if not self.state.consume_token(token_id):
                self._error = f"the grammar cannot take token {token_id}: {reason(self.state)}"
                return
            self.num_accepted += 1
        self._move()

    def rollback(self, num_tokens: int) -> None:
        """Forget the last tokens. Raises ValueError for more than there are."""
        if not 0 <= num_tokens <= self.num_accepted:
            raise ValueError(f"num_tokens={num_tokens} is out of range; allowed: 0..{self.num_accepted}")
        self.state.rollback(num_tokens)
        self.num_accepted -= num_tokens
        self._move()

    def _move(self) -> None:
        if not self._is_stale:
            self._is_stale = True
            self._maker.moved(self)

    def take(self, mask: bytes) -> None:
        """The mask of the state, from the MaskMaker."""
        self._is_stale = False
        if self.state.is_error():
            self._error = self._error or f"the grammar went beyond a limit: {reason(self.state)}"
        elif self.num_accepted < self._min_tokens:
            mask = _without(mask, self._end_ids)
        elif self._ignores_eos:
            mask = _without(mask, self._eos_ids)
        self.last_mask = mask


def _without(mask: bytes, token_ids: Iterable[int]) -> bytes:
    """The mask less these tokens, or the mask itself where nothing would be left."""
    bits = bytearray(mask)
    for token_id in token_ids:
        if token_id >> 3 < len(bits):
            bits[token_id >> 3] &= ~(1 << (token_id & 7))
    return mask if bits.count(0) == len(bits) else bytes(bits)


class Grammars:
    """Compiled grammars by their text, the least recently used dropped first. Any thread may call.

    load: gives the vocabulary and how to encode text; called at the first use, which may take a second.
    """

    def __init__(self, load: Callable[[], tuple[Vocabulary, Callable[[str], list[int]]]]) -> None:
        self._load = load
        self._tokenizer: llguidance.LLTokenizer | None = None
        self._maker: MaskMaker | None = None  # made with the tokenizer
        self._eos_ids: list[int] = []
        self._compiled: OrderedDict[str, llguidance.LLMatcher] = OrderedDict()

    def find(self, grammar: str, sampling: SamplingParams) -> GrammarMatcher | None:
        """A fresh matcher of a grammar that was compiled before, in microseconds; else None.

        Matchers of one grammar share its lexer, whose states are limited: one that is used up is compiled anew.
        """
        compiled = self._compiled.pop(grammar, None)
        if compiled is None or self._maker is None:
            return None
        try:
            found = GrammarMatcher(compiled.deep_copy(), self._eos_ids, sampling, self._maker)
        except ValueError:
            return None
        self._compiled[grammar] = compiled
        return found

    def compile(self, grammar: str, sampling: SamplingParams) -> GrammarMatcher:
        """A fresh matcher. Raises ValueError for a grammar that is wrong, or too complex."""
        if self._tokenizer is None or self._maker is None:
            vocabulary, encode = self._load()
            self._eos_ids = vocabulary.eos_ids
            self._maker = MaskMaker(len(vocabulary.tokens))
            self._tokenizer = ll_tokenizer(vocabulary, encode)
        matcher = compiled_matcher(self._tokenizer, grammar)
        made = GrammarMatcher(matcher.deep_copy(), self._eos_ids, sampling, self._maker)
        self._compiled[grammar] = matcher
        while len(self._compiled) > _MAX_GRAMMARS:
            self._compiled.popitem(last=False)
        return made
