"""Scheduler: what each step computes, and what its results mean."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from octavo.config import SchedulerConfig
from octavo.protocol.outputs import FinishReason, SchedulerStats, TokenOutput
from octavo.protocol.plan import Masks, NewSequence, PlanRow, RowResult, StepPlan, StepResult
from octavo.protocol.request import Request
from octavo.scheduler.adapter_slots import AdapterSlots
from octavo.scheduler.admission import check_request
from octavo.scheduler.audit import require
from octavo.scheduler.constraint import Constraint
from octavo.scheduler.drafts import Drafts
from octavo.scheduler.kv_manager import KVManager
from octavo.scheduler.leveling import level_tokens
from octavo.scheduler.prefix_cache import HashFunction, sha256
from octavo.scheduler.queue import RankedQueue
from octavo.scheduler.sequence import Sequence, Status
from octavo.scheduler.step import Step


class Scheduler:
    """Continuous batching over paged KV blocks, with any number of steps in flight.

    `schedule` and `commit` (or `fail`) are called in turn, plans being committed in the order in which
    they were made. `schedule` counts optimistically and needs no sampled value, so it may run ahead.

    Order: running sequences that decode, then prompts that are half computed, then the waiting queue from
    its head; within each by rank: (priority under that policy, arrival). A sequence is admitted only when
    all its known tokens have blocks right now. When a running one lacks a block, idle ones are preempted
    from the lowest rank up, and computed again later; a sequence with a step in flight never is.

    Slots are reused at once, blocks only when the last step in flight that names them is committed:
    workers execute plans in order, so a NewSequence for a slot follows the last row of its former owner.

    A sequence with a constraint waits for the value of its last token before its next step, unless that needs no mask;
    the others go on.

    One with an adapter (LoRA) is admitted when its adapter has, or gets, one of the device's slots; those behind it may
    go first meanwhile, which AdapterCache bounds.

    With `levels_prompts` a step takes no more of prompts than brings it to the level of those to come (`leveling`), as
    long as all requests are patient.

    With speculation a row may verify guesses at the tokens after its last known one. Counts are upper bounds while it
    is in flight; `commit` lowers them by what did not come true. Guesses take only budget and blocks that are left.
    """

    def __init__(self, config: SchedulerConfig, hash_function: HashFunction = sha256) -> None:
        """hash_function: bytes to digest, for the prefix cache; results are right for any, even a poor one."""
        self._config = config
        self._kv = KVManager(config.num_blocks, config.block_size, config.enable_prefix_caching, hash_function)
        self._sequences: dict[str, Sequence] = {}  # all unfinished ones
        self._waiting = RankedQueue()
        self._running = RankedQueue()
        self._free_slots = list(range(config.max_num_seqs - 1, -1, -1))
        self._adapters = AdapterSlots(config.max_loras)
        self._drafts = Drafts(config)
        self._in_flight: deque[Step] = deque()  # step ids are consecutive
        self._next_step_id = 0
        self._num_added = 0
        # The head of the queue that found too few free blocks, and how many there were: it is not matched
        # again before there are more. They come: it fits once all is free, which `add` made sure of.
        self._blocked_head: Sequence | None = None
        self._blocked_num_free = 0
        self._num_queried_tokens = 0
        self._num_hit_tokens = 0
        self._num_preemptions = 0
        self._num_prompt_tokens = 0
        self._num_generated_tokens = 0
        self._num_steps = 0

    def add(self, request: Request, constraint: Constraint | None = None, adapter_digest: bytes | None = None) -> None:
        """Queue a request. Raises ValueError, naming what does not fit, if it can never run; nothing changes then.

        constraint: fresh; from now on only the scheduler calls it. adapter_digest: of the weights that request.lora
        stands for, which the worker has; KV blocks are shared only between requests with the same.
        """
        name = request.request_id
        if name in self._sequences:
            raise ValueError(f"request_id={name!r} is in use by an unfinished request")
        check_request(request, self._config, self._kv)
        priority = request.priority if self._config.policy == "priority" else 0
        sequence = Sequence(request, (priority, self._num_added), constraint, adapter_digest)
        self._num_added += 1
        self._sequences[name] = sequence
        self._waiting.add(sequence)

    def schedule(self, now: float) -> StepPlan | None:
        """The next step, which is then in flight. None: nothing can be scheduled before a commit, or at all.

        now: seconds on the monotonic clock.
        """
        step = Step(self._next_step_id, self._config.max_num_batched_tokens, self._config.max_step_rows)
        if self._continue_running(step):
            self._admit_waiting(step, now)
        if not step.rows:
            return None
        if self._config.max_loras:
            step.sort_by_adapter()
        self._next_step_id += 1
        self._in_flight.append(step)
        asked = self._drafts.ask(step, self._kv, len(self._running), len(self._waiting))
        return StepPlan(step.step_id, step.new_sequences, step.rows, step.adapters, asked)

    def commit(self, plan: StepPlan, result: StepResult) -> list[TokenOutput]:
        """Take in what the oldest step in flight brought: new tokens and ends, in the order of its rows.

        Raises ConsistencyError if `plan` is not that step or `result` does not answer it.
        """
        rows = result.rows
        require(result.step_id == plan.step_id, f"result of step {result.step_id} for plan {plan.step_id}")
        require(len(rows) == len(plan.rows), f"step {plan.step_id}: {len(rows)} results for {len(plan.rows)} rows")
        step = self._retire(plan)
        self._num_steps += 1
        self._drafts.observe_step(plan, result)
        outputs: list[TokenOutput] = []
        for sequence, row_result in zip(step.sequences, rows):
            if sequence is not None and row_result.error is not None and not row_result.refused:
                self._distrust(sequence, plan.step_id)
        for sequence, row, row_result in zip(step.sequences, plan.rows, rows):
            if sequence is None:
                continue
            if row_result.error is not None:
                outputs.append(self._end(sequence, "error", row_result.error, row_result.refused))
                continue
            if sequence.status is not Status.RUNNING:
                continue  # it took blocks of one that failed, and starts over
            if sequence.prompt_logprobs is not None:
                sequence.add_prompt_logprobs(row.start, row_result.prompt_logprobs)
            if row.samples:
                outputs.append(self._take_tokens(sequence, row, row_result))
        for sequence in step.sequences:
            if sequence is None or sequence.constraint is None or sequence.status is not Status.RUNNING:
                continue
            if sequence.constraint.error is not None:
                outputs.append(self._end(sequence, "error", error=sequence.constraint.error, refused=True))
        return outputs

    def fail(self, plan: StepPlan, message: str) -> list[TokenOutput]:
        """The oldest step in flight raised: its sequences end with an error that says `message`.

        What it should have written to the KV cache was never written. So the cache forgets all that steps in
        flight were to fill, and a sequence that was admitted after this step onto cached blocks starts over.
        """
        self._kv.forget(block for step in self._in_flight for block in step.registered_blocks)
        step = self._retire(plan)
        for sequence in [s for s in self._running if s.admitted_step_id > step.step_id and s.took_cached_blocks]:
            self._preempt(sequence)
        return [self._end(sequence, "error", error=message) for sequence in step.sequences if sequence is not None]

    def _distrust(self, failed: Sequence, step_id: int) -> None:
        """The KV that `failed` wrote in this step and since is suspect: nobody to come may find it, and those that took
        it, in this step at the earliest, start over."""
        self._kv.forget(failed.block_table)
        blocks = set(failed.block_table)
        for sequence in list(self._running):
            took = sequence.took_cached_blocks and sequence.admitted_step_id >= step_id
            if took and sequence is not failed and not blocks.isdisjoint(sequence.block_table):
                self._preempt(sequence)

    def abort(self, request_ids: Iterable[str]) -> list[TokenOutput]:
        """End requests now, in any state. Ids that are unknown or finished are ignored."""
        sequences = [self._sequences.get(request_id) for request_id in dict.fromkeys(request_ids)]
        return [self._end(sequence, "abort") for sequence in sequences if sequence is not None]

    def has_unfinished(self) -> bool:
        return bool(self._sequences)

    def stats(self) -> SchedulerStats:
        """O(running), and with adapters O(waiting)."""
        return SchedulerStats(
            num_running=len(self._running),
            num_waiting=len(self._waiting),
            num_blocks=self._config.num_blocks - 1,
            num_free_blocks=self._kv.pool.num_free,
            num_kv_tokens=sum(sequence.num_computed_tokens for sequence in self._running),
            num_kv_slots=sum(len(sequence.block_table) for sequence in self._running) * self._config.block_size,
            prefix_cache_queries_total=self._num_queried_tokens,
            prefix_cache_hits_total=self._num_hit_tokens,
            num_preemptions_total=self._num_preemptions,
            prompt_tokens_total=self._num_prompt_tokens,
            generation_tokens_total=self._num_generated_tokens,
            num_steps_total=self._num_steps,
            running_adapters=self._adapters.names(self._running),
            waiting_adapters=self._adapters.names(self._waiting),
            num_adapter_loads_total=self._adapters.num_loads,
            **self._drafts.stats(),
        )

    def reset_prefix_cache(self) -> bool:
        """Find no block that was computed before now. Running sequences go on. False: prefix caching is off."""
        self._kv.cache.clear()
        return self._config.enable_prefix_caching

    def audit(self) -> None:
        """Recompute the invariants from scratch, in O(all tokens). Raises ConsistencyError naming the broken one."""
        waiting, running = list(self._waiting), list(self._running)
        self._waiting.audit()
        self._running.audit()
        both = {id(s) for s in waiting} | {id(s) for s in running}
        everyone = {id(s) for s in self._sequences.values()}
        require(both == everyone and len(both) == len(waiting) + len(running), "I9: a request is lost or queued twice")
        for sequence in waiting:
            idle = sequence.slot < 0 and not sequence.block_table and not sequence.num_computed_tokens
            require(sequence.status is Status.WAITING and idle, "I9: a waiting sequence holds blocks or a slot")
            require(sequence.num_tokens == len(sequence.token_ids), "I8: a waiting sequence has values unknown")
        slots = [sequence.slot for sequence in running] + self._free_slots
        require(sorted(slots) == list(range(self._config.max_num_seqs)), "I7: slots are lost or used twice")
        for sequence in running:
            self._audit_running(sequence)
        self._adapters.audit(running)
        self._kv.audit(running, [table for step in self._in_flight for table in step.detached_tables])
        if not self._in_flight and not self._sequences:
            require(self._kv.pool.num_free == self._config.num_blocks - 1, "I6: blocks are held but nothing runs")

    def _audit_running(self, sequence: Sequence) -> None:
        sequence.audit_running()
        name, num_unknown = sequence.request.request_id, sequence.num_tokens - len(sequence.token_ids)
        steps = [step for step in self._in_flight if sequence in step.sequences]
        rows = [step.rows[step.sequences.index(sequence)] for step in steps]
        most = sum(row.num_drafts + 1 for row in rows if row.samples)
        require(num_unknown == most, f"I8: {name!r} has {num_unknown} values unknown, steps bring up to {most}")
        require(not steps or steps[-1].step_id == sequence.last_step_id, f"I9: {name!r} is not in its last step")
        require(bool(steps) == self._is_in_flight(sequence), f"I9: {name!r} is wrong about being in flight")

    def _continue_running(self, step: Step) -> bool:
        """Add the next tokens of running sequences, decodes first. False: one lacks a block and has to wait, and so
        does every one that ranks below it; those above go on, so that a step never comes out empty."""
        prompts: list[Sequence] = []
        complete = True
        step.spare = min(step.budget, step.room) - len(self._running)
        for sequence in self._running:
            length = sequence.num_tokens - sequence.num_computed_tokens
            if length > 1:
                prompts.append(sequence)
            elif sequence.num_tokens == sequence.max_num_tokens or not step.budget or sequence.awaits_token:
                continue
            elif not self._add_decode(step, sequence):
                complete = False
                break
        if self._config.levels_prompts and (prompts or self._waiting):
            level = level_tokens(self._running, self._waiting)
            if level is not None:
                step.budget = min(step.budget, max(0, level - len(step.rows)))
        for sequence in prompts:
            length = self._chunk_length(step, sequence)
            if length and sequence.status is Status.RUNNING and not self._add_row(step, sequence, length):
                return False
        return complete

    def _add_decode(self, step: Step, sequence: Sequence) -> bool:
        """Add its last known token, and the guesses after it that there is room for."""
        if not sequence.num_drafts:
            return self._add_row(step, sequence, 1)
        num_drafts = self._drafts.num_fitting(step, sequence)
        if not self._kv.has_room(sequence, sequence.num_tokens + num_drafts):
            num_drafts = 0
        masks = sequence.next_masks(num_drafts)
        if masks is not None:
            num_drafts = len(masks) - 1
        step.spare -= num_drafts
        return self._add_row(step, sequence, 1 + num_drafts, num_drafts, masks)

    def _add_row(self, step: Step, sequence: Sequence, length: int, num_drafts: int = 0, masks: Masks = None) -> bool:
        start = sequence.num_computed_tokens
        end = start + length
        new_block_ids: list[int] = []
        if end > len(sequence.block_table) * self._kv.block_size:
            blocks = self._kv.grow(sequence, end)
            while blocks is None:
                if not self._preempt_for(sequence):
                    return False
                blocks = self._kv.grow(sequence, end)
            new_block_ids = blocks
        self._push_row(step, sequence, end, new_block_ids, num_drafts, masks)
        return True

    def _push_row(
        self,
        step: Step,
        sequence: Sequence,
        end: int,
        new_block_ids: list[int],
        num_drafts: int = 0,
        masks: Masks = None,
    ) -> None:
        """end: of the row's tokens, guesses included. masks: None: as the constraint has them."""
        start = sequence.num_computed_tokens
        samples = end - num_drafts == sequence.num_tokens
        if masks is None and samples:
            masks = sequence.next_masks(0)
        if masks is not None and not any(masks):
            masks = None
        step.rows.append(PlanRow(sequence.slot, start, end - start, new_block_ids, samples, masks, num_drafts))
        step.sequences.append(sequence)
        step.budget -= end - start
        step.room -= 1 + num_drafts
        sequence.num_computed_tokens = end
        sequence.num_tokens += (1 + num_drafts) * samples
        sequence.last_step_id = step.step_id
        if end >= sequence.next_key_at:
            step.registered_blocks += self._kv.register(sequence)

    def _admit_waiting(self, step: Step, now: float) -> None:
        self._adapters.begin_round()
        index = 0  # of the first that may be admitted: those before it wait for a slot of their adapter
        while index < len(self._waiting) and self._free_slots and step.budget and step.room:
            sequence = self._waiting[index]
            if not self._adapters.can_start(sequence):
                index += 1
                continue
            if sequence is self._blocked_head and self._kv.pool.num_free <= self._blocked_num_free:
                return
            cached_blocks = self._kv.match(sequence)
            length = sequence.num_tokens - len(cached_blocks) * self._config.block_size
            if length > step.budget and not self._config.enable_chunked_prefill:
                return
            if not self._kv.admit(sequence, cached_blocks):
                self._blocked_head, self._blocked_num_free = sequence, self._kv.pool.num_free
                return
            self._start(step, sequence, now)
            self._push_row(step, sequence, sequence.num_computed_tokens + self._chunk_length(step, sequence), [])

    def _chunk_length(self, step: Step, sequence: Sequence) -> int:
        """As many of a prompt's next tokens as the step has room for. A chunk that does not end the prompt ends at a
        multiple of the alignment, if that takes no more than half of it away."""
        start = sequence.num_computed_tokens
        length = min(sequence.num_tokens - start, step.budget)
        if start + length == sequence.num_tokens:
            return length
        excess = (start + length) % self._config.chunk_alignment
        return length - excess if 2 * excess <= length else length

    def _start(self, step: Step, sequence: Sequence, now: float) -> None:
        """Move an admitted sequence from the queue to the running ones, and announce it to the worker."""
        self._waiting.remove(sequence)
        self._running.add(sequence)
        sequence.status = Status.RUNNING
        sequence.slot = self._free_slots.pop()
        sequence.took_cached_blocks = sequence.num_computed_tokens > 0
        if sequence.admitted_step_id < 0:
            sequence.scheduled_time = now
            sequence.num_cached_tokens = sequence.num_computed_tokens
            self._num_hit_tokens += sequence.num_computed_tokens
            self._num_queried_tokens += sequence.num_tokens
        sequence.admitted_step_id = step.step_id
        sequence.num_drafts, sequence.draft_ids = 0, ()
        request = sequence.request
        step.adapters += self._adapters.start(sequence)
        step.new_sequences.append(
            NewSequence(
                sequence.slot,
                sequence.token_ids.copy(),
                sequence.num_prompt_tokens,
                sequence.block_table.copy(),
                request.sampling,
                request.eos_token_ids,
                request.pooling,
                sequence.adapter_slot,
                request.cache_salt is not None,
            )
        )

    def _take_tokens(self, sequence: Sequence, row: PlanRow, row_result: RowResult) -> TokenOutput:
        """Append what the row sampled, up to the first token that ends the output."""
        token_ids, logprobs = row_result.token_ids, row_result.logprobs
        num_refuted = row.num_drafts + 1 - len(token_ids)
        if not 0 <= num_refuted <= row.num_drafts:
            said, name = f"{len(token_ids)} tokens", sequence.request.request_id
            require(False, f"the worker sampled {said} for {name!r} with {row.num_drafts} guesses")
        self._drafts.observe(sequence, row, row_result)
        if row.start + row.length == sequence.num_prompt_tokens:
            self._num_prompt_tokens += sequence.num_prompt_tokens
        reason: FinishReason | None = None
        for count, token_id in enumerate(token_ids, 1):
            reason = sequence.append(token_id)
            if reason is not None:
                if count < len(token_ids):
                    token_ids = token_ids[:count]
                    logprobs = logprobs and logprobs[:count]
                break
        self._num_generated_tokens += len(token_ids)
        if reason is None and sequence.constraint is not None:
            sequence.constraint.accept(token_ids)
        if reason is not None:
            self._finish(sequence)
        else:
            sequence.num_tokens -= num_refuted
            sequence.num_computed_tokens -= num_refuted
            if not self._is_in_flight(sequence):
                sequence.num_drafts = len(sequence.draft_ids)
            if sequence.num_computed_tokens >= sequence.next_key_at:
                # A block whose last value was unknown when it was scheduled: it is full, or a step in flight fills it.
                registered = self._kv.register(sequence)
                if self._in_flight:
                    self._in_flight[-1].registered_blocks += registered
        return TokenOutput(
            sequence.request.request_id,
            token_ids,
            logprobs,
            None if sequence.prompt_logprobs is None else sequence.take_prompt_logprobs(),
            reason,
            sequence.stop_reason() if reason == "stop" else None,
            None,
            sequence.num_cached_tokens,
            sequence.scheduled_time,
            row_result.embedding,
        )

    def _retire(self, plan: StepPlan) -> Step:
        """Take the oldest step out of flight, and release what only waited for it."""
        require(bool(self._in_flight), f"step {plan.step_id} is not in flight")
        oldest = self._in_flight[0].step_id
        require(oldest == plan.step_id, f"step {plan.step_id} ends before step {oldest}")
        step = self._in_flight.popleft()
        for table in step.detached_tables:
            self._kv.release(table)
        return step

    def _is_in_flight(self, sequence: Sequence) -> bool:
        """Whether a step that is planned and not yet committed has a row of it."""
        return sequence.last_step_id >= self._next_step_id - len(self._in_flight)

    def _preempt_for(self, sequence: Sequence) -> bool:
        """Free the blocks of the lowest-ranked idle sequence, unless it ranks above `sequence`.

        False: none was freed for it. Then it has preempted itself, or what ranks below it is all in flight.
        """
        for victim in reversed(self._running):
            if not self._is_in_flight(victim):
                if victim.rank < sequence.rank:
                    return False
                self._preempt(victim)
                return victim is not sequence
        return False

    def _preempt(self, sequence: Sequence) -> None:
        """Back to the queue with its known tokens, to be computed again. Rows in flight no longer count."""
        self._leave_running(sequence)
        sequence.num_computed_tokens = 0
        sequence.num_tokens = len(sequence.token_ids)
        sequence.status = Status.WAITING
        self._waiting.add(sequence)
        self._num_preemptions += 1

    def _leave_running(self, sequence: Sequence) -> None:
        """Give back slot and blocks; the blocks when the last step in flight that names them is committed."""
        self._running.remove(sequence)
        self._free_slots.append(sequence.slot)
        sequence.slot = -1
        self._adapters.stop(sequence)
        table, sequence.block_table = sequence.block_table, []
        if self._is_in_flight(sequence):
            for step in self._in_flight:
                step.detach(sequence)
            self._in_flight[sequence.last_step_id - self._in_flight[0].step_id].detached_tables.append(table)
        else:
            self._kv.release(table)

    def _finish(self, sequence: Sequence) -> None:
        """End it in whatever state it is; nothing of it is left but blocks that a step in flight names."""
        if sequence.status is Status.RUNNING:
            self._leave_running(sequence)
        else:
            self._waiting.remove(sequence)
        sequence.status = Status.FINISHED
        del self._sequences[sequence.request.request_id]

    def _end(
        self, sequence: Sequence, reason: FinishReason, error: str | None = None, refused: bool = False
    ) -> TokenOutput:
        """Finish it without another token."""
        self._finish(sequence)
        return TokenOutput(
            sequence.request.request_id,
            [],
            finish_reason=reason,
            error=error,
            num_cached_tokens=sequence.num_cached_tokens,
            scheduled_time=sequence.scheduled_time,
            refused=refused,
        )
