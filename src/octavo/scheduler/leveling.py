"""Leveling: spreads prompts over the steps that decoding takes anyway, where it is known how many those are.

A step of few tokens takes as long as reading the weights, whatever else it computes. A batch whose outputs all have a
known length takes at least as many steps as the longest of them has tokens. With its prompts computed at once, those
come on top, and many steps of few tokens follow; spread over these, most of them cost nothing.
"""

from __future__ import annotations

from collections.abc import Iterable

from octavo.scheduler.queue import RankedQueue
from octavo.scheduler.sequence import Sequence

_LEAST = 256  # tokens: up to about so many, a step takes as long as reading the weights
_MOST = 1024  # tokens: steps of more are as fast a token as any, and are not recorded as graphs
_GRAIN = 128  # tokens: products compute their tokens in tiles of so many


def level_tokens(running: Iterable[Sequence], waiting: RankedQueue) -> int | None:
    """How many tokens the next step should have so that all to come have as many. None: as many as it can hold.

    waiting: those with the longest outputs first. None is said, too, where a request is not patient, and where a
    sequence that does not decode yet would end no sooner than the last that does: the batch would become longer.
    O(running).
    """
    if waiting.num_impatient:
        return None
    num_steps, late, work = 0, 0, waiting.num_tokens
    for sequence in running:
        if not sequence.request.patient:
            return None
        num_left = sequence.max_num_tokens - sequence.num_tokens
        work += sequence.max_num_tokens - sequence.num_computed_tokens
        if sequence.num_tokens - sequence.num_computed_tokens > 1:
            late = max(late, num_left)
        else:
            num_steps = max(num_steps, num_left)
    if waiting:
        late = max(late, waiting[0].max_num_tokens - waiting[0].num_tokens)
    if late >= num_steps:
        return None
    level = max(_LEAST, -(-work // (num_steps * _GRAIN)) * _GRAIN)
    return level if level <= _MOST else None
