"""Drafts: which guesses at tokens to come a step verifies, and which the worker is asked for (speculative decoding)."""

from __future__ import annotations

from octavo.config import SchedulerConfig
from octavo.protocol.plan import PlanRow, RowResult, StepPlan, StepResult
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

    def ask(self, step: Step) -> list[int]:
        """See StepPlan.drafts."""
        if self._policy is None:
            return []
        drafts = [0] * len(step.rows)
        asked = [
            (index, sequence)
            for index, (row, sequence) in enumerate(zip(step.rows, step.sequences))
            if row.samples and sequence is not None and sequence.num_tokens + 1 < sequence.max_num_tokens
        ]
        num_others = sum(row.length - 1 - row.num_drafts for row in step.rows)
        chosen = self._policy.choose([sequence.acceptance for _, sequence in asked], num_others)
        for (index, sequence), count in zip(asked, chosen):
            drafts[index] = sequence.num_drafts = min(count, sequence.max_num_tokens - sequence.num_tokens - 1)
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
