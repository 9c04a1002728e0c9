"""ModelRunner: executes plans. Owns token values, KV bytes and sampling state on one device."""

from __future__ import annotations

import torch
from torch import Tensor

from octavo.attention.backend import AttentionBackend, AttentionBatch
from octavo.models.base import CausalLM
from octavo.protocol.plan import NO_ADAPTER, PlanRow, RowResult, StepPlan, StepResult, TokenLogprobs
from octavo.protocol.sampling import SamplingParams
from octavo.worker.adapters import AdapterBank
from octavo.worker.inputs import StepInputs, build_inputs
from octavo.worker.pooler import Pooler, with_embeddings
from octavo.worker.sampler.sampler import Sampler
from octavo.worker.slots import Slots

# Prompt positions whose logits are made at once: bounds the scratch to this many rows of the vocabulary.
_PROMPT_LOGPROBS_CHUNK = 64


class ModelRunner:
    """One rank. `execute` must be given plans in the order the scheduler made them."""

    def __init__(
        self,
        model: CausalLM,
        attention: AttentionBackend,
        sampler: Sampler,
        slots: Slots,
        adapters: AdapterBank | None = None,
    ) -> None:
        """adapters: of the model's layers; None: rows have none."""
        self._model = model
        self._adapters = adapters
        self._adapter_slots: dict[int, int] = {}  # by slot of a sequence that has one
        self._attention = attention
        self._sampler = sampler
        self._slots = slots
        self._pooler = Pooler(model.score)
        self._sampling: dict[int, tuple[SamplingParams, int]] = {}  # by slot; the int is num_prompt_tokens

    @torch.inference_mode()
    def execute(self, plan: StepPlan) -> StepResult:
        """Run one step: update the slots, forward, sample, write the samples back to the slots."""
        self._enter(plan)
        inputs = build_inputs(plan.rows, self._slots)
        hidden = self._forward(plan.rows, inputs)
        prompt_logprobs = self._prompt_logprobs(plan.rows, hidden)
        sampled = iter(self._sample(plan.rows, hidden))
        rows = [next(sampled) if row.samples else RowResult(token_ids=[]) for row in plan.rows]
        for index, logprobs in prompt_logprobs.items():
            row = rows[index]
            rows[index] = RowResult(row.token_ids, row.logprobs, logprobs, row.error)
        pooled = self._pooler.pool(plan.rows, hidden)
        if pooled is not None:
            rows = with_embeddings(plan.rows, rows, pooled)
        return StepResult(plan.step_id, rows)

    def _enter(self, plan: StepPlan) -> None:
        if self._adapters is not None:
            self._adapters.bring_in(plan.adapters)
        self._slots.apply(plan)
        for new in plan.new_sequences:
            self._adapter_slots[new.slot] = new.adapter_slot
            self._sampling[new.slot] = (new.sampling, new.num_prompt_tokens)
            self._pooler.set_slot(new.slot, new.pooling, new.num_prompt_tokens)
            self._sampler.set_slot(new.slot, new.sampling, new.eos_token_ids, new.token_ids, new.num_prompt_tokens)

    def _forward(self, rows: list[PlanRow], inputs: StepInputs) -> Tensor:
        longest = max(row.start + row.length for row in rows)
        num_blocks = -(-longest // self._slots.block_size)
        self._attention.prepare(
            AttentionBatch(
                starts=[row.start for row in rows],
                lengths=[row.length for row in rows],
                block_tables=self._slots.block_tables[inputs.row_slots, :num_blocks],
                slot_mapping=inputs.slot_mapping,
            )
        )
        self._activate(rows, [row.length for row in rows])
        return self._model(inputs.input_ids, inputs.positions, self._attention)

    def _activate(self, rows: list[PlanRow], counts: list[int]) -> None:
        """The next tokens that come to the model's layers are so many of each row's."""
        if self._adapters is None:
            return
        slots = [self._adapter_slots[row.slot] for row in rows]
        self._adapters.set_replaces(slots)
        if all(slot == NO_ADAPTER for slot in slots):
            self._adapters.activate(None)
        else:
            each = torch.tensor(slots, dtype=torch.int32)
            self._adapters.activate(each.repeat_interleave(torch.tensor(counts)))

    def _sample(self, rows: list[PlanRow], hidden: Tensor) -> list[RowResult]:
        """RowResults of the rows that sample, in their order."""
        slots, positions, last, masks = [], [], [], []
        end = 0
        self._activate(rows, [int(row.samples) for row in rows])
        for row in rows:
            end += row.length
            if row.samples:
                slots.append(row.slot)
                positions.append(row.start + row.length)
                last.append(end - 1)
                masks.append(row.mask)
        if not slots:
            return []
        if len(last) < hidden.shape[0]:
            hidden = hidden[torch.tensor(last, device=hidden.device)]
        sampled = self._sampler.sample(self._model.compute_logits(hidden), slots, positions, masks)
        where = torch.tensor([slots, positions], device=hidden.device)
        self._slots.token_ids[where[0], where[1]] = sampled.token_ids
        return self._sampler.to_rows(sampled)

    def _prompt_logprobs(self, rows: list[PlanRow], hidden: Tensor) -> dict[int, list[TokenLogprobs]]:
        """By row index, for rows whose request asked: the prompt tokens that this step's tokens predict."""
        found: dict[int, list[TokenLogprobs]] = {}
        begin = 0
        for index, row in enumerate(rows):
            sampling, num_prompt_tokens = self._sampling[row.slot]
            count = min(row.length, num_prompt_tokens - 1 - row.start)
            if sampling.prompt_logprobs is not None and count > 0:
                targets = self._slots.token_ids[row.slot, row.start + 1 : row.start + 1 + count]
                entries: list[TokenLogprobs] = []
                for at in range(0, count, _PROMPT_LOGPROBS_CHUNK):
                    stop = min(count, at + _PROMPT_LOGPROBS_CHUNK)
                    self._activate([row], [stop - at])
                    logits = self._model.compute_logits(hidden[begin + at : begin + stop])
                    entries += self._sampler.prompt_logprobs(logits, targets[at:stop], sampling.prompt_logprobs)
                found[index] = entries
            begin += row.length
        return found
