"""Drafts: which guesses at tokens to come a step verifies, and which the worker is asked for (speculative decoding)."""

from __future__ import annotations

from octavo.config import SchedulerConfig
from octavo.protocol.plan import PlanRow, RowResult, StepPlan, StepResult
from octavo.scheduler.kv_manager import KVManager
from octavo.scheduler.sequence import Sequence
from octavo.scheduler.speculation import SpeculationPolicy
from octavo.scheduler.step import Step


class Drafts:
    """Of all sequences. Without speculation it does nothing."""

    def __init__(self, config: SchedulerConfig) -> None:
        self._policy: SpeculationPolicy | None = None
        if config.num_speculative_tokens:
            self._policy = SpeculationPolicy(
                config.num_speculative_tokens, config.adaptive_speculation, config.drafts_are_free
            )

    @staticmethod
    def num_fitting(step: Step, sequence: Sequence) -> int:
        """How many of the sequence's guesses its next row can verify, as far as budget and length go, and a constraint
        whose last token is not known."""
        num_drafts = min(sequence.num_drafts, step.spare, sequence.max_num_tokens - sequence.num_tokens - 1)
        num_unknown = sequence.num_tokens - len(sequence.token_ids)
        if sequence.constraint is not None and num_unknown:
            num_drafts = min(num_drafts, sequence.constraint.num_free - num_unknown - 1)
        return max(0, num_drafts)

    def ask(self, step: Step, kv: KVManager, num_running: int) -> list[int]:
        """See StepPlan.drafts. Blocks are taken for the guesses, since the worker may write KV of them, as long as each
        running sequence could still grow by one."""
        if self._policy is None:
            return []
        sequences = [sequence for sequence in step.sequences if sequence is not None]
        num_others = sum(row.length - 1 - row.num_drafts for row in step.rows)
        drafts = self._policy.choose([sequence.acceptance for sequence in sequences], num_others)
        for index, (row, sequence) in enumerate(zip(step.rows, sequences)):
            if not row.samples:
                continue
            count = min(drafts[index], sequence.max_num_tokens - sequence.num_tokens - 1)
            end = sequence.num_tokens + count
            if count > 0 and end > (room := len(sequence.block_table) * kv.block_size):
                if kv.pool.num_free - kv.num_blocks_for(end - room) >= num_running:
                    row.new_block_ids.extend(kv.grow(sequence, end) or [])
                else:
                    count = room - sequence.num_tokens
            drafts[index] = sequence.num_drafts = max(0, count)
        return drafts

    def observe_step(self, plan: StepPlan, result: StepResult) -> None:
        """What a step took."""
        if self._policy is not None and result.seconds is not None and plan.decodes:
            self._policy.observe_step(len(plan.rows), plan.num_tokens, sum(plan.drafts), result.seconds)

    def observe(self, sequence: Sequence, row: PlanRow, result: RowResult) -> None:
        """How many guesses came true, and which are ready next."""
        if self._policy is None:
            return
        num_verified = min(row.num_drafts, len(sequence.draft_ids))
        self._policy.observe_row(sequence.acceptance, num_verified, len(result.token_ids) - 1, len(result.draft_ids))
        sequence.draft_ids = result.draft_ids
