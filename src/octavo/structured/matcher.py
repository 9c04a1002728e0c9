"""GrammarMatcher: which tokens a grammar lets come next in one output, and what each token that came changes."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence

import llguidance
import numpy as np

from octavo.protocol.sampling import SamplingParams
from octavo.structured.compilation import NO_TOKEN, reason
from octavo.structured.masks import admits, without

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
    num_free: see Constraint.
    """

    num_free = 0

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
        self._num_before = 0
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

    def masks(self, draft_ids: Sequence[int]) -> list[bytes | None]:
        """See Constraint. Guesses are tried on a copy of the state. One that would end the output is not tried."""
        mask = self.mask
        found: list[bytes | None] = [mask]
        if not draft_ids or self._error is not None:
            return found
        state = self.state.deep_copy()
        for count, token_id in enumerate(draft_ids, 1):
            if not admits(mask, token_id) or token_id in self._end_ids or not state.consume_token(token_id):
                break
            mask = state.compute_bitmask()
            if state.is_error():
                break
            mask = self._narrowed(mask, self._num_before + self.num_accepted + count)
            found.append(mask)
        return found

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
                said = reason(self.state)
                beyond = "(limit " in said  # the token may have been allowed
                self._error = _why(said) if beyond else f"the grammar cannot take token {token_id}: {said}"
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

    def ends(self, num_tokens: int) -> tuple[int, ...]:
        """The tokens that may not end the output while the grammar's part of it has yet to come: after `num_tokens`."""
        return self._end_ids if num_tokens < self._min_tokens else self._eos_ids

    def follow(self, num_tokens: int) -> None:
        """So many tokens of the output came ahead of what the grammar sees; min_tokens counts them."""
        self._num_before = num_tokens
        self._move()

    def _move(self) -> None:
        if not self._is_stale:
            self._is_stale = True
            self._maker.moved(self)

    def take(self, mask: bytes) -> None:
        """The mask of the state, from the MaskMaker."""
        self._is_stale = False
        if self.state.is_error():
            self._error = self._error or _why(reason(self.state))
        else:
            mask = self._narrowed(mask, self._num_before + self.num_accepted)
        self.last_mask = mask

    def _narrowed(self, mask: bytes, num_tokens: int) -> bytes:
        """The mask after so many tokens of the output."""
        if num_tokens < self._min_tokens:
            return without(mask, self._end_ids)
        return without(mask, self._eos_ids) if self._ignores_eos else mask


def _why(llguidance_says: str) -> str:
    if llguidance_says == NO_TOKEN:
        return "no token of the model spells what the grammar needs next"
    return f"the grammar went beyond a limit, or never ends: {llguidance_says}"
