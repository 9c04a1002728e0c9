"""StepPlan and StepResult: all that the scheduler and a worker say to each other."""

from __future__ import annotations

import msgspec

from octavo.protocol.pooling import PoolingParams
from octavo.protocol.sampling import SamplingParams

# Block 0 is never allocated: padding rows may point at it, and nothing reads what they write.
NULL_BLOCK = 0
NO_ADAPTER = -1

Masks = list[bytes | None] | None  # see PlanRow


class NewSequence(msgspec.Struct, frozen=True, array_like=True):
    """A sequence that takes a slot: a fresh request, or one that comes back after preemption.

    token_ids: every token known so far, the prompt first, then the output.
    block_table: all its KV blocks, those that cover this step included.
    adapter_slot: where the worker has its adapter; NO_ADAPTER where it has none.
    is_private: no other sequence may learn anything of its tokens, be it from how fast it is itself.
    """

    slot: int
    token_ids: list[int]
    num_prompt_tokens: int
    block_table: list[int]
    sampling: SamplingParams
    eos_token_ids: tuple[int, ...]
    pooling: PoolingParams | None = None
    adapter_slot: int = NO_ADAPTER
    is_private: bool = False


class PlanRow(msgspec.Struct, frozen=True, array_like=True):
    """What one sequence does in a step: compute tokens [start, start + length).

    The worker holds the token values: ids at positions that earlier steps sampled are already
    in its slot, whether or not the scheduler has seen them.
    new_block_ids: blocks appended to the slot's table before the step.
    samples: the row's last token is the last one known, so the step samples position start + length.
    num_drafts: so many of the row's last tokens are guesses, which lie in the slot too: the step verifies them. It
    samples the positions start + length - num_drafts .. start + length, one after another, up to the first whose
    token is not the guess there. While an earlier step in flight verifies guesses, `start` is an upper bound: the
    worker knows where the sequence ends, and how many guesses there are.
    masks: one a position that is sampled: the tokens allowed there, one bit each, the lowest of a byte first, None for
    all. None: all, at all of them.
    """

    slot: int
    start: int
    length: int
    new_block_ids: list[int]
    samples: bool
    masks: Masks = None
    num_drafts: int = 0


class StepPlan(msgspec.Struct, frozen=True, array_like=True):
    """Everything one step needs, as a diff against what the worker's slots hold.

    adapters: (slot, lora_int_id) of those that are brought in before the step; what a slot held is gone then. Rows of
    one adapter are neighbours. drafts: how many guesses at the tokens to come the worker shall have ready after the
    step, one number a row; empty for none at all. On a row that samples nothing yet, a number above 0 says that its
    sequence will be asked for some.

    Rows that share a prefix block may write and read it in one step: a worker writes the KV of
    all rows before any row attends, layer by layer.
    """

    step_id: int
    new_sequences: list[NewSequence]
    rows: list[PlanRow]
    adapters: list[tuple[int, int]] = []
    drafts: list[int] = []

    @property
    def num_tokens(self) -> int:
        return sum(row.length for row in self.rows)

    @property
    def decodes(self) -> bool:
        """Whether all rows compute their last known token, and guesses, alone."""
        return all(row.length == 1 + row.num_drafts for row in self.rows)


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Log-probabilities at one position, from the raw distribution.

    The first entry is the token that stands there; the rest are the most likely ones, in order, or those that were
    asked for by id, in theirs.
    rank: 1 for the most likely token of the vocabulary.
    """

    token_ids: list[int]
    logprobs: list[float]
    rank: int


class RowResult(msgspec.Struct, frozen=True, array_like=True):
    """What came of one row. `token_ids` is empty where the row did not sample; where it verified k guesses, it has 1 to
    k + 1 tokens: those guesses that came true, and one more. logprobs: one entry a token.

    draft_ids: guesses at the tokens to come that are ready for the next row, no more than were asked for.
    prompt_logprobs: for prompt positions start+1 .. start+length of the row that lie in the prompt.
    error: the row's own failure (NaN logits, say); its request ends with it, the others go on. refused: that error is
    the request's own fault.
    embedding: of a sequence with pooling whose prompt ends with this row (protocol.pooling.floats).
    """

    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs] | None = None
    error: str | None = None
    embedding: bytes | None = None
    draft_ids: tuple[int, ...] = ()
    refused: bool = False


class StepResult(msgspec.Struct, frozen=True, array_like=True):
    """One RowResult for each row of the plan, in its order.

    seconds: what the step took, where that is known: on the device, or if that is longer, on the host, which works on
    other steps meanwhile. draft_seconds: the device's for guesses, of a step with prompts.
    """

    step_id: int
    rows: list[RowResult]
    seconds: float | None = None
    draft_seconds: float | None = None
