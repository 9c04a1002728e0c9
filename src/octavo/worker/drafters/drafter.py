"""Drafter: what guesses at tokens to come must offer (speculative decoding, Leviathan et al. and Chen et al., 2023)."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor

from octavo.protocol.plan import NewSequence


class DraftRow(NamedTuple):
    """A sequence whose row a step has just computed and sampled.

    slot: where its tokens are. start, length: the positions that the row computed, in the step's flat batch; from
    num_tokens on they are of guesses that did not come true. num_tokens: tokens known now. count: guesses wanted; 0
    for none. is_prompt: its prompt goes on, and nothing was sampled.
    """

    slot: int
    start: int
    length: int
    num_tokens: int
    count: int
    is_prompt: bool


class Drafter(Protocol):
    """Guesses for all sequences of one model. A wrong guess costs time and never changes an output.

    A drafter with KV of its own keeps it under the block ids of the model's: what `Slots.block_tables` maps.
    """

    def enter(self, new: NewSequence, start: int) -> None:
        """A sequence takes a slot, whose former tokens are still there. start: where its first row begins; what comes
        before was found in the prefix cache."""
        ...

    def propose(self, rows: list[DraftRow], features: Tensor | None) -> list[list[int]]:
        """Up to `count` guesses for each row, at the tokens from position num_tokens on.

        rows: all of the step, in order. features: of the model, [tokens of the step, F], where it is tapped.
        """
        ...
