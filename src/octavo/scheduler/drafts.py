"""Drafts: which guesses at tokens to come a step verifies, and which the worker is asked for (speculative decoding)."""

from __future__ import annotations

from typing import Any

from octavo.config import SchedulerConfig
from octavo.protocol.plan import PlanRow, RowResult, StepPlan, StepResult
from octavo.scheduler.kv_manager import KVManager
from octavo.scheduler.sequence import Sequence
from octavo.scheduler.speculation import SpeculationPolicy, SpeculationStats
from octavo.scheduler.step import Step


class Drafts:
    """Of all sequences. Without speculation it does nothing."""

    def __init__(self, config: SchedulerConfig) -> None:
        self._policy: SpeculationPolicy | None = None
        self._are_free = config.drafts_are_free
        self._max_num_seqs = config.max_num_seqs
        self._stats = SpeculationStats(config.num_speculative_tokens)
        if config.num_speculative_tokens:
            self._policy = SpeculationPolicy(
                config.num_speculative_tokens,
                config.adaptive_speculation,
                config.drafts_are_free,
                config.max_step_rows - config.max_num_seqs,
            )

    @staticmethod
    def num_fitting(step: Step, sequence: Sequence) -> int:
        """How many of the sequence's guesses its next row can verify, as far as budget and length go, and a constraint
        whose last token is not known."""
        most = sequence.max_num_tokens - sequence.num_tokens - 1
        num_drafts = min(sequence.num_drafts, sequence.num_chosen, step.spare, most)
        num_unknown = sequence.num_tokens - len(sequence.token_ids)
        if sequence.constraint is not None and num_unknown:
            num_drafts = min(num_drafts, sequence.constraint.num_free - num_unknown - 1)
        return max(0, num_drafts)

    def ask(self, step: Step, kv: KVManager, num_running: int, num_waiting: int) -> list[int]:
        """See StepPlan.drafts. Blocks are taken for the guesses, since the worker may write KV of them, as long as each
        running sequence could still grow by one."""
        policy = self._policy
        if policy is None:
            return []
        records = []
        for row, sequence in zip(step.rows, step.sequences):
            if sequence is None:
                continue
            if sequence.acceptance is None:
                num_rows = min(num_running + num_waiting, self._max_num_seqs)
                num_more = sequence.max_num_tokens - sequence.num_prompt_tokens
                sequence.acceptance = policy.track(num_rows, sequence.num_prompt_tokens, num_more)
            if row.samples:
                records.append(sequence.acceptance)
        chosen = iter(policy.choose(records, step.num_prompt_tokens))
        drafts = []
        for row, sequence in zip(step.rows, step.sequences):
            if sequence is None or sequence.acceptance is None:
                drafts.append(0)
                continue
            enrolled = sequence.acceptance.is_enrolled
            if not row.samples:
                drafts.append(int(enrolled))
                continue
            sequence.num_chosen = next(chosen)
            if enrolled and row.length > 1 + row.num_drafts:
                sequence.num_chosen = max(1, sequence.num_chosen)  # else what guesses would not see the prompt's end
            sequence.num_drafts = self._reserve(row, sequence, kv, num_running)
            drafts.append(sequence.num_drafts)
        return drafts

    def _reserve(self, row: PlanRow, sequence: Sequence, kv: KVManager, num_running: int) -> int:
        """How many guesses to ask for, with the blocks for them."""
        assert self._policy is not None
        most = sequence.max_num_tokens - sequence.num_tokens - 1
        count = min(self._policy.num_to_propose(sequence.num_chosen), most)
        end, room = sequence.num_tokens + count, len(sequence.block_table) * kv.block_size
        if count > 0 and end > room:
            if kv.pool.num_free - kv.num_blocks_for(end - room) < num_running:
                return max(0, room - sequence.num_tokens)
            row.new_block_ids.extend(kv.grow(sequence, end) or [])
        return max(0, count)

    def observe_step(self, plan: StepPlan, result: StepResult) -> None:
        """What a step took."""
        if self._policy is None:
            return
        if result.seconds is None:
            return
        if not plan.decodes:
            prompts = zip(plan.rows, plan.drafts)
            num_tokens = sum(row.length for row, count in prompts if count and row.length > 1 + row.num_drafts)
            own, of_drafts = result.seconds, result.draft_seconds
            if of_drafts is None:
                self._policy.observe_prompts(plan.num_tokens, own)
            else:
                self._policy.observe_prompts(plan.num_tokens, own - of_drafts, num_tokens, of_drafts)
            return
        num_drafts = sum(row.num_drafts for row in plan.rows)
        num_passes = 0 if self._are_free else max(plan.drafts, default=0)
        plain = self._policy.plain_seconds(len(plan.rows)) if num_drafts or num_passes else None
        if plain is not None:
            self._stats.seconds += result.seconds
            self._stats.plain_seconds += plain * sum(len(row.token_ids) for row in result.rows) / len(plan.rows)
        self._policy.observe_step(len(plan.rows), plan.num_tokens, num_drafts, num_passes, result.seconds)

    def observe(self, sequence: Sequence, row: PlanRow, result: RowResult) -> None:
        """How many guesses came true, and which are ready next."""
        if self._policy is None or sequence.acceptance is None:
            return
        num_verified, num_accepted = min(row.num_drafts, len(sequence.draft_ids)), len(result.token_ids) - 1
        self._policy.observe_row(sequence.acceptance, num_verified, num_accepted, len(result.draft_ids))
        self._stats.add(num_verified, num_accepted)
        sequence.draft_ids = result.draft_ids

    def stats(self) -> dict[str, Any]:
        """Their fields of SchedulerStats."""
        return {
            "num_drafts_total": self._stats.num_drafts,
            "num_draft_tokens_total": self._stats.num_draft_tokens,
            "num_accepted_tokens_total": self._stats.num_accepted_tokens,
            "num_accepted_by_position_total": tuple(self._stats.num_accepted_tokens_per_pos),
            "guessing_seconds_total": self._stats.seconds,
            "plain_seconds_total": self._stats.plain_seconds,
        }
