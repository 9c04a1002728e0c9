"""ModelRunner: executes plans. Owns token values, KV bytes and sampling state on one device."""

from __future__ import annotations

import time
from itertools import accumulate
from typing import NamedTuple

import msgspec
import torch
from torch import Tensor

from octavo.attention.backend import AttentionBackend
from octavo.models.base import CausalLM
from octavo.protocol.plan import NO_ADAPTER, PlanRow, RowResult, StepPlan, StepResult, TokenLogprobs
from octavo.protocol.sampling import SamplingParams
from octavo.worker.adapters import AdapterBank
from octavo.worker.forward import last_tokens, prepare
from octavo.worker.pooler import Pooler, with_embeddings
from octavo.worker.sampler.logprobs import num_prompt_targets
from octavo.worker.sampler.sampler import Sampler
from octavo.worker.slots import Slots
from octavo.worker.speculation import Speculation
from octavo.worker.verification import Pending, verify

# Prompt positions whose logits are made at once: bounds the scratch to this many rows of the vocabulary.
_PROMPT_LOGPROBS_CHUNK = 64


class _States(NamedTuple):
    """Last hidden states of a step. last: of the last 1 + num_drafts tokens of each row, [N, hidden_size]. Where they
    are wanted: hidden, of all tokens, [T, hidden_size], and features, what a draft head reads, [T, F]."""

    last: Tensor
    hidden: Tensor | None = None
    features: Tensor | None = None


class ModelRunner:
    """One rank. `execute` must be given plans in the order the scheduler made them."""

    def __init__(
        self,
        model: CausalLM,
        attention: AttentionBackend,
        sampler: Sampler,
        slots: Slots,
        adapters: AdapterBank | None = None,
        speculation: Speculation | None = None,
        num_tapped: int | None = None,
    ) -> None:
        """adapters: of the model's layers; None: rows have none. speculation: None: rows verify no guesses. num_tapped:
        layers that the model is tapped at for a draft head, 0 for one that reads the last hidden states; None: there is
        no draft head."""
        self._model = model
        self._adapters = adapters
        self._adapter_slots: dict[int, int] = {}  # by slot of a sequence that has one
        self._attention = attention
        self._sampler = sampler
        self._slots = slots
        self._speculation = speculation
        self._num_tapped = num_tapped
        self._dtype = model.embed_tokens.weight.dtype
        self._pooler = Pooler(model.score)
        self._sampling: dict[int, tuple[SamplingParams, int]] = {}  # by slot; the int is num_prompt_tokens

    @torch.inference_mode()
    def execute(self, plan: StepPlan) -> StepResult:
        """Run one step: update the slots, forward, sample, write the samples back to the slots."""
        began = time.perf_counter()
        self._enter(plan)
        rows = plan.rows if self._speculation is None else self._speculation.true_rows(plan.rows)
        states = self._forward(rows)
        prompt_logprobs = {} if states.hidden is None else self._prompt_logprobs(rows, states.hidden)
        sampled = iter(self._sample(rows, states.last))
        results = [next(sampled) if row.samples else RowResult(token_ids=[]) for row in rows]
        for index, logprobs in prompt_logprobs.items():
            results[index] = msgspec.structs.replace(results[index], prompt_logprobs=logprobs)
        pooled = self._pooler.pool(rows, states.last, states.hidden)
        if pooled is not None:
            results = with_embeddings(rows, results, pooled)
        sampled_at = time.perf_counter()
        if self._speculation is None:
            return StepResult(plan.step_id, results, sampled_at - began)
        self._activate([], [])  # what guesses has no adapters
        results = self._speculation.propose(rows, results, plan.drafts, states.features)
        ended = time.perf_counter()
        return StepResult(plan.step_id, results, ended - began, ended - sampled_at)

    def _enter(self, plan: StepPlan) -> None:
        if self._adapters is not None:
            self._adapters.bring_in(plan.adapters)
        if self._speculation is not None:
            self._speculation.enter(plan)
        self._slots.apply(plan)
        for new in plan.new_sequences:
            self._adapter_slots[new.slot] = new.adapter_slot
            self._sampling[new.slot] = (new.sampling, new.num_prompt_tokens)
            self._pooler.set_slot(new.slot, new.pooling, new.num_prompt_tokens)
            self._sampler.set_slot(new.slot, new.sampling, new.eos_token_ids, new.token_ids, new.num_prompt_tokens)

    def _forward(self, rows: list[PlanRow]) -> _States:
        inputs = prepare(self._attention, self._slots, rows)
        self._activate(rows, [row.length for row in rows])
        last, given = last_tokens(rows), (inputs.input_ids, inputs.positions, self._attention)
        if last is not None and not self._wants_all(rows):

            def narrow(heads: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
                self._activate(rows, [1 + row.num_drafts for row in rows])
                return heads[last], residual[last]

            return _States(self._model(*given, None, narrow))
        taps = None
        if self._num_tapped:
            size = self._num_tapped * self._model.config.hidden_size
            taps = torch.empty(len(inputs.input_ids), size, dtype=self._dtype, device=inputs.positions.device)
        hidden = self._model(*given, taps)
        return _States(hidden if last is None else hidden[last], hidden, hidden if taps is None else taps)

    def _wants_all(self, rows: list[PlanRow]) -> bool:
        """Whether the last hidden states of all tokens are wanted, not of each row's last ones alone."""
        if self._num_tapped is not None or self._pooler.reads_all(rows):
            return True
        return any(num_prompt_targets(row, *self._sampling[row.slot]) for row in rows)

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

    def _sample(self, rows: list[PlanRow], last: Tensor) -> list[RowResult]:
        """RowResults of the rows that sample, in their order. last: as in _States."""
        sampling = [row for row in rows if row.samples]
        if not sampling:
            return []
        self._activate(sampling, [1 + row.num_drafts for row in sampling])
        if len(sampling) < len(rows):
            last = last[torch.tensor([row.samples for row in rows for _ in range(1 + row.num_drafts)])]
        offsets = accumulate((1 + row.num_drafts for row in sampling), initial=0)
        pending = [Pending(row, at) for row, at in zip(sampling, offsets)]
        return verify(self._model.compute_logits(last), pending, self._sampler, self._slots)

    def _prompt_logprobs(self, rows: list[PlanRow], hidden: Tensor) -> dict[int, list[TokenLogprobs]]:
        """By row index, for rows whose request asked: the prompt tokens that this step's tokens predict."""
        found: dict[int, list[TokenLogprobs]] = {}
        begin = 0
        for index, row in enumerate(rows):
            sampling, num_prompt_tokens = self._sampling[row.slot]
            wanted, count = sampling.prompt_logprobs, num_prompt_targets(row, sampling, num_prompt_tokens)
            if wanted is not None and count:
                targets = self._slots.token_ids[row.slot, row.start + 1 : row.start + 1 + count]
                entries: list[TokenLogprobs] = []
                for at in range(0, count, _PROMPT_LOGPROBS_CHUNK):
                    stop = min(count, at + _PROMPT_LOGPROBS_CHUNK)
                    self._activate([row], [stop - at])
                    logits = self._model.compute_logits(hidden[begin + at : begin + stop])
                    entries += self._sampler.prompt_logprobs(logits, targets[at:stop], wanted)
                found[index] = entries
            begin += row.length
        return found
