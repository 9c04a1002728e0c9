"""DeviceRunner: launches plans on a GPU and lets the host go on. Owns the slots' state on the device."""

from __future__ import annotations

import logging
import time
from functools import partial
from typing import NamedTuple

import msgspec
import torch
from torch import Tensor

from octavo.attention.backend import DeviceBatch, FusedAttentionBackend
from octavo.kernels import triton
from octavo.models.base import CausalLM
from octavo.protocol.plan import NO_ADAPTER, PlanRow, RowResult, StepPlan, StepResult, TokenLogprobs
from octavo.protocol.sampling import SamplingParams
from octavo.worker.adapters import AdapterBank
from octavo.worker.cuda_graphs import Computed, StepGraph, StepGraphs
from octavo.worker.device_speculation import DeviceSpeculation
from octavo.worker.pooler import Pooled, Pooler, with_embeddings
from octavo.worker.sampler.device_sampler import DeviceSampler, More
from octavo.worker.sampler.logprobs import num_prompt_targets
from octavo.worker.staging import Stage, Staging, upload
from octavo.worker.step_buffers import NUM_PARAMS, DiffWriter, Ints, SplitRows, StepBuffers, StepShape

_log = logging.getLogger(__name__)

# Steps whose host buffers may be in use at once: two in flight, one being read, one being written.
_NUM_STAGES = 4
# Prompt positions whose logits are made at once: bounds the scratch to this many rows of the vocabulary.
_PROMPT_LOGPROBS_CHUNK = 64
OUT_OF_MEMORY = "the step of this request needed more device memory than there is: {reason}"


class DeviceLimits(NamedTuple):
    """Sizes that buffers are made for. max_draft_rows: guesses that a step verifies, each of which is a row there."""

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    block_size: int
    max_draft_rows: int = 0


class DeviceSlots:
    """Token values, block tables and sampling parameters of the sequences that run, one row a slot.

    token_ids: int32 [max_num_seqs, max_model_len + 1]; a step writes what it samples straight into it, so the next
    one is launched before the host has seen the token. block_tables: int32 [max_num_seqs, blocks of the longest
    sequence]. params: int32 [max_num_seqs, NUM_PARAMS].
    """

    def __init__(self, limits: DeviceLimits, device: torch.device) -> None:
        num_slots, num_blocks = limits.max_num_seqs, -(-limits.max_model_len // limits.block_size)
        self.token_ids = torch.zeros(num_slots, limits.max_model_len + 1, dtype=torch.int32, device=device)
        self.block_tables = torch.zeros(num_slots, num_blocks, dtype=torch.int32, device=device)
        self.params = torch.zeros(num_slots, NUM_PARAMS, dtype=torch.int32, device=device)


class HostClock:
    """How long the host works for a step that it launches: where that is longer than the step before takes, the device
    idles. A launch's own work is meant, and that on results since the one before."""

    def __init__(self) -> None:
        self._since = 0.0  # the latest launch, or end of a wait, in seconds on the monotonic clock
        self._num_launched = 0
        self._has_steps = False  # the device, that are not known to be done

    def launched(self) -> tuple[int, float]:
        """A step was. Returns its number, and the seconds of work for it; 0 where the device had no other step, and the
        host perhaps no work either."""
        now = time.monotonic()
        seconds = now - self._since if self._has_steps else 0.0
        self._num_launched += 1
        self._since, self._has_steps = now, True
        return self._num_launched, seconds

    def ended(self, number: int) -> None:
        """The host has waited for the step of that number."""
        self._since = time.monotonic()
        self._has_steps = number < self._num_launched


class StepInFlight:
    """A launched step. `result` waits for it."""

    def __init__(self, plan: StepPlan, stage: Stage, sampler: DeviceSampler, clock: HostClock) -> None:
        self.plan = plan
        self._clock = clock
        self._number, self._host_seconds = 0, 0.0  # see HostClock
        self._stage = stage
        self._sampler = sampler
        # What the runner fills in before it hands this out.
        self.rows: list[PlanRow] = []  # those that run, in their order on the device
        self.split: SplitRows | None = None  # what these are on the device, with speculation
        self.verdict: Ints | None = None  # on what was guessed
        # Where the plan has prompts; a point in the stream between the model and what guesses costs time itself.
        self.tells_draft_time = False
        self.failed: dict[int, str] = {}  # by slot: why a row of the plan does not run
        self.prompt_logprobs: dict[int, list[TokenLogprobs]] = {}  # by slot
        self.pooled: Pooled | None = None  # on the host
        self.more: More | None = None
        self.host: Tensor | None = None  # what is copied out, where it is more than the stage has room for
        self.timed = False  # the stage's `began` was recorded, and nothing was done once and for all

    def launched(self) -> StepInFlight:
        """All of it has been handed to the device. Returns itself."""
        self._stage.done.record()
        self._number, self._host_seconds = self._clock.launched()
        return self

    def result(self) -> StepResult:
        """The step's results, in the order of the plan's rows."""
        self._stage.done.wait()
        self._clock.ended(self._number)
        host = self._stage.out if self.host is None else self.host.numpy()
        rows = self.rows if self.split is None else self.split.rows
        results = self._sampler.rows_from_host(host.reshape(-1), [row.samples for row in rows], self.more)
        if self.split is not None and self.verdict is not None:
            results = DeviceSpeculation.results(self.verdict, self.split, results)
        if self.pooled is not None:
            results = with_embeddings(self.rows, results, self.pooled)
        if self.failed or self.prompt_logprobs:
            by_slot = {row.slot: result for row, result in zip(self.rows, results)}
            by_slot |= {slot: RowResult([], error=error) for slot, error in self.failed.items()}
            for slot, logprobs in self.prompt_logprobs.items():
                by_slot[slot] = msgspec.structs.replace(by_slot[slot], prompt_logprobs=logprobs)
            results = [by_slot[row.slot] for row in self.plan.rows]
        stage = self._stage
        seconds = stage.done.seconds_since(stage.began) if self.timed else None
        if seconds is not None:
            seconds = max(seconds, self._host_seconds)
        draft_seconds = stage.done.seconds_since(stage.sampled) if self.tells_draft_time else None
        return StepResult(self.plan.step_id, results, seconds, draft_seconds)


class DeviceRunner:
    """One rank on a GPU. `launch` must be given plans in the order the scheduler made them; nothing in it waits for
    the device, except for prompt logprobs and logits processors, and after memory ran out."""

    def __init__(
        self,
        model: CausalLM,
        attention: FusedAttentionBackend,
        sampler: DeviceSampler,
        slots: DeviceSlots,
        limits: DeviceLimits,
        use_graphs: bool,
        adapters: AdapterBank | None = None,
        speculation: DeviceSpeculation | None = None,
    ) -> None:
        """adapters: of the model's layers; None: rows have none. speculation: None: rows verify no guesses."""
        device = slots.params.device
        self._model = model
        self._attention = attention
        self._sampler = sampler
        self._slots = slots
        self._adapters = adapters
        self._adapter_slots: dict[int, int] = {}  # by slot of a sequence
        self._speculation = speculation
        self._pooler = Pooler(model.score)
        self._block_size = limits.block_size
        self._device = device
        self._kernels = triton.get()
        rows, tokens = limits.max_num_seqs + limits.max_draft_rows, limits.max_num_batched_tokens
        most = attention.max_items(rows, tokens)
        fields = attention.item_fields
        items = (most[0], fields[0]), (most[1], fields[1])
        self._buffers = StepBuffers(rows, tokens, *items, device, speculation is not None)
        verdict_size = 0 if speculation is None else speculation.verdict_size
        self._staging = Staging(_NUM_STAGES, self._buffers.num_words, rows, verdict_size, device)
        self._diffs = DiffWriter(limits.max_num_seqs)
        self._sampling: dict[int, tuple[SamplingParams, int]] = {}  # by slot; the int is num_prompt_tokens
        self._clock = HostClock()
        # Whether recorded steps leave the last hidden states of all tokens, not of each row's last one alone: for a
        # draft head, and for embeddings that may be means. A step that must, where graphs do not, is not replayed.
        self._graphs_keep_all = model.config.head == "embeddings" or self._draft_head_reads
        self._stream = torch.cuda.Stream() if device.type == "cuda" else None
        if self._stream is not None:
            # The cache and the buffers are filled in the stream that made them, which may take a while.
            self._stream.wait_stream(torch.cuda.current_stream())
        self.graphs: StepGraphs | None = None
        if use_graphs:
            compute = partial(self._compute, keeps_all=self._graphs_keep_all)
            self.graphs = StepGraphs(compute, self._clear, attention.max_items, (rows, tokens), adapters is not None)

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> StepInFlight:
        """Start one step: bring the slots up to date, forward, sample, copy the samples out."""
        with torch.cuda.stream(self._stream):  # None, on a CPU, changes nothing
            stage = self._staging.take()
            step = StepInFlight(plan, stage, self._sampler, self._clock)
            if self._adapters is not None:
                self._adapters.bring_in(plan.adapters)
            rows = self._runnable(self._enter(plan, stage), step)
            while rows:
                try:
                    self._run(rows, stage, step)
                    break
                except torch.OutOfMemoryError as error:
                    rows = self._drop_largest(rows, step, error)
            step.rows = rows
            out = self._buffers.out[: len(rows if step.split is None else step.split.rows)]
            if step.more is not None and step.more.logprobs is not None:
                packed = self._sampler.pack_more(out, step.more)
                step.host = torch.empty(packed.shape, dtype=packed.dtype, pin_memory=packed.is_cuda)
                step.host.copy_(packed, non_blocking=True)
            else:
                self._kernels.copy_words(out, stage.out_tensor[: len(out)])
            return step.launched()

    @torch.inference_mode()
    def warm_up(self) -> bool:
        """Record one more graph. False: there is none to record."""
        if self.graphs is None:
            return False
        with torch.cuda.stream(self._stream):
            return self.graphs.record_next()

    @torch.inference_mode()
    def record_graphs(self, seconds: float) -> int:
        """Record graphs until the time is up. Returns how many there are."""
        if self.graphs is None:
            return 0
        with torch.cuda.stream(self._stream):
            if self._speculation is not None:
                self._activate(None)
                self._speculation.record(self._slots.token_ids)
            return self.graphs.record_for(seconds)

    @torch.inference_mode()
    def compute_largest(self, num_rows: int, num_tokens: int) -> None:
        """Launch a step of padding only, of this size: what memory it needs can then be read off the allocator."""
        with torch.cuda.stream(self._stream):
            self._clear()
            items = self._attention.max_items(num_rows, num_tokens)
            decodes = num_rows == num_tokens
            num_prefill_items = 0 if decodes else items[1]
            adapters = self._adapters is not None
            shape = StepShape(num_tokens, num_rows, items[0], num_prefill_items, decodes, adapters)
            self._compute(shape, keeps_all=True)
            torch.cuda.synchronize()

    @property
    def _draft_head_reads(self) -> bool:
        return self._speculation is not None and self._speculation.reads_states

    @property
    def _num_graphs(self) -> int:
        return 0 if self.graphs is None else self.graphs.num_recorded

    def _enter(self, plan: StepPlan, stage: Stage) -> list[PlanRow]:
        """Write the plan's diff, and bring the slots on the device up to it, unless it is empty. Returns the rows."""
        params = []
        if self._speculation is not None:
            self._speculation.enter(plan)
        for new in plan.new_sequences:
            self._sampling[new.slot] = new.sampling, new.num_prompt_tokens
            self._adapter_slots[new.slot] = new.adapter_slot
            self._pooler.set_slot(new.slot, new.pooling, new.num_prompt_tokens)
            record = self._sampler.set_slot(
                new.slot, new.sampling, new.eos_token_ids, new.token_ids, new.num_prompt_tokens
            )
            params.append(record)
        buffers, slots = self._buffers, self._slots
        words, diff = self._diffs.words(plan.new_sequences, plan.rows, params, buffers.num_fixed)
        if not len(words):
            return plan.rows
        end = buffers.num_fixed + len(words)
        if end <= buffers.num_words:
            stage.words[buffers.num_fixed : end] = words
            buffers.packed[buffers.num_fixed : end].copy_(
                stage.words_tensor[buffers.num_fixed : end], non_blocking=True
            )
            packed = buffers.packed
        else:
            words, diff = self._diffs.moved(words, diff, buffers.num_fixed)
            packed = upload(words, self._device)
        self._kernels.apply_diff(packed, *diff, slots.token_ids, slots.block_tables, slots.params)
        return plan.rows

    def _runnable(self, rows: list[PlanRow], step: StepInFlight) -> list[PlanRow]:
        """The rows but those whose adapter could not be brought in, which fail."""
        if self._adapters is None or not self._adapters.broken:
            return rows
        broken = self._adapters.broken
        found = {row.slot: broken.get(self._adapter_slots[row.slot]) for row in rows}
        step.failed |= {slot: error for slot, error in found.items() if error is not None}
        return [row for row in rows if found[row.slot] is None]

    def _run(self, plan_rows: list[PlanRow], stage: Stage, step: StepInFlight) -> None:
        """Describe the rows to the device, compute them, and draw again where the plain draw is not what was asked."""
        rows = plan_rows
        if self._speculation is not None:
            step.split = self._speculation.split(plan_rows)
            rows = step.split.rows
        num_tokens = sum(row.length for row in rows)
        decodes = num_tokens == len(rows)
        slots = [] if self._adapters is None else [self._adapter_slots[row.slot] for row in rows]
        adapters = any(slot != NO_ADAPTER for slot in slots)
        replaces = self._adapters is not None and self._adapters.set_replaces(slots)
        keeps_all = not decodes and self._wants_all(rows)
        may_replay = not replaces and (self._graphs_keep_all or not keeps_all)
        num_graphs = self._num_graphs
        graph, decode_items, prefill_items = self._plan(rows, num_tokens, adapters, may_replay)
        if graph is None:
            shape = StepShape(num_tokens, len(rows), len(decode_items), len(prefill_items), decodes, adapters)
        else:
            shape = graph.shape
        buffers = self._buffers
        buffers.write_rows(stage.words, rows, shape)
        if adapters:
            buffers.write_adapters(stage.words, slots, shape)
        if step.split is not None:
            buffers.write_groups(stage.words, step.split, shape)
        buffers.write_items(stage.words, "decode_items", decode_items, shape.num_decode_items)
        buffers.write_items(stage.words, "prefill_items", prefill_items, shape.num_prefill_items)
        used = buffers.num_used(shape)
        stage.began.record()
        step.timed = num_graphs == self._num_graphs
        self._kernels.copy_words(stage.words_tensor[:used], buffers.packed[:used])
        computed = self._compute(shape, keeps_all, rows) if graph is None else graph.replay()
        drew_more = self._draw_more(rows, computed, step)
        if self._speculation is not None and step.split is not None:
            if drew_more:
                self._speculation.verify(buffers, shape)
            asked = self._asked(step.plan, plan_rows)
            self._activate(None)  # what guesses has no adapters, also where it shares layers with the model
            if not decodes:
                stage.sampled.record()
                step.tells_draft_time = True
            guessing = asked, self._slots.token_ids, computed.features
            self._speculation.propose(plan_rows, *guessing, stage.verdict_tensor[: len(plan_rows)])
            step.verdict = stage.verdict[: len(plan_rows)]
        self._add_prompt_logprobs(rows, computed, step)
        pooled = self._pooler.pool(rows, computed.last, computed.hidden)
        if pooled is not None:
            vectors = pooled.vectors
            host = torch.empty(vectors.shape, dtype=vectors.dtype, pin_memory=vectors.is_cuda)
            step.pooled = pooled._replace(vectors=host.copy_(vectors, non_blocking=True))

    def _wants_all(self, rows: list[PlanRow]) -> bool:
        """Whether the last hidden states of all tokens are wanted, not of each row's last one alone."""
        if self._draft_head_reads or self._pooler.reads_all(rows):
            return True
        return any(num_prompt_targets(row, *self._sampling[row.slot]) for row in rows)

    def _plan(
        self, rows: list[PlanRow], num_tokens: int, adapters: bool, may_replay: bool
    ) -> tuple[StepGraph | None, Ints, Ints]:
        """The graph to replay, if there is one, and the rows' decode and prefill items."""
        graphs, tables = self.graphs if may_replay else None, self._slots.block_tables
        if graphs is not None and (size := graphs.size_of(num_tokens, len(rows), adapters)) is not None:
            decode_items, prefill_items = self._attention.plan(rows, tables, whole=True)
            if (graph := graphs.find(size, len(prefill_items))) is not None:
                return graph, decode_items, prefill_items
        return None, *self._attention.plan(rows, tables, whole=False)

    def _compute(self, shape: StepShape, keeps_all: bool, rows: list[PlanRow] | None = None) -> Computed:
        """Launch a step on what the buffers hold; its launches depend on the shape alone where rows is None. keeps_all:
        leave the last hidden states of all tokens, as steps that decode do in any case."""
        if rows is None and self._adapters is not None:
            self._adapters.set_replaces(())
        buffers, slots, kernels = self._buffers, self._slots, self._kernels
        num_rows, num_tokens = shape.num_rows, shape.num_tokens
        row_slots, starts, cu_q = buffers.row_slots[:num_rows], buffers.starts[:num_rows], buffers.cu_q[: num_rows + 1]
        input_ids, positions = buffers.input_ids[:num_tokens], buffers.token_positions[:num_tokens]
        slot_mapping = buffers.slot_mapping[:num_tokens]
        where = slots.token_ids, slots.block_tables, self._block_size
        if self._speculation is not None:
            self._speculation.follow(buffers, shape)
        kernels.build_inputs(row_slots, starts, cu_q, *where, input_ids, positions, slot_mapping)
        self._attention.prepare(
            DeviceBatch(
                row_slots=row_slots,
                starts=starts,
                cu_q=cu_q,
                slot_mapping=slot_mapping,
                block_tables=slots.block_tables,
                decode_items=buffers.decode_items[: shape.num_decode_items],
                prefill_items=buffers.prefill_items[: shape.num_prefill_items],
                rows=rows,
            )
        )
        self._activate(buffers.token_adapters(shape) if shape.adapters else None)
        taps = None if self._speculation is None else self._speculation.taps(num_tokens)

        def of_last(tokens: Tensor) -> Tensor:
            return kernels.gather_last(tokens, cu_q, tokens.new_empty(num_rows, tokens.shape[1]))

        def narrow(heads: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
            self._activate(buffers.adapters[:num_rows] if shape.adapters else None)
            return of_last(heads), of_last(residual)

        narrows = not (keeps_all or shape.decodes)
        hidden = self._model(input_ids, positions, self._attention, taps, narrow if narrows else None)
        last = hidden if narrows or shape.decodes else of_last(hidden)
        self._activate(buffers.adapters[:num_rows] if shape.adapters else None)
        logits = self._model.compute_logits(last)
        drawing = row_slots, buffers.positions[:num_rows], slots.params, buffers.samples[:num_rows]
        self._sampler.draw(logits, *drawing, slots.token_ids, buffers.out[:num_rows])
        features = None
        if self._speculation is not None:
            self._speculation.verify(buffers, shape)
            features = self._speculation.keep(hidden if taps is None else taps, buffers, shape)
        return Computed(last, None if narrows else hidden, logits, features)

    def _activate(self, slots: Tensor | None) -> None:
        """The adapters of the next tokens that come to the model's layers."""
        if self._adapters is not None:
            self._adapters.activate(slots)

    def _clear(self) -> None:
        """Padding rows only, no work items."""
        buffers = self._buffers
        buffers.packed[: buffers.num_fixed].zero_()
        buffers.row_slots.fill_(-1)
        buffers.adapters.fill_(NO_ADAPTER)
        buffers.offsets.fill_(-1)
        buffers.num_drafts.fill_(-1)
        buffers.decode_items.fill_(-1)
        buffers.prefill_items.fill_(-1)

    @staticmethod
    def _asked(plan: StepPlan, rows: list[PlanRow]) -> list[int]:
        """See StepPlan.drafts, of those rows that run."""
        by_slot = dict(zip((row.slot for row in plan.rows), plan.drafts))
        return [by_slot.get(row.slot, 0) for row in rows]

    def _draw_more(self, rows: list[PlanRow], computed: Computed, step: StepInFlight) -> bool:
        """Returns whether a row may have got another token."""
        slots = [row.slot if row.samples else -1 for row in rows]
        positions = [row.start + row.length for row in rows]
        self._sampler.set_masks(rows)
        wanted = self._sampler.needs_more(slots, positions)
        if wanted:
            tables = self._slots.params, self._slots.token_ids, self._buffers.out
            true_positions = None if self._speculation is None else self._buffers.positions
            step.more = self._sampler.draw_more(computed.logits, wanted, slots, positions, *tables, true_positions)
        return bool(wanted)

    def _add_prompt_logprobs(self, rows: list[PlanRow], computed: Computed, step: StepInFlight) -> None:
        """For rows whose request asked: of the prompt tokens that this step's tokens predict. Waits for the device."""
        begin = 0
        for row in rows:
            sampling, num_prompt_tokens = self._sampling[row.slot]
            wanted, count = sampling.prompt_logprobs, num_prompt_targets(row, sampling, num_prompt_tokens)
            if wanted is not None and count and computed.hidden is not None:
                targets = self._slots.token_ids[row.slot, row.start + 1 : row.start + 1 + count].long()
                entries: list[TokenLogprobs] = []
                for at in range(0, count, _PROMPT_LOGPROBS_CHUNK):
                    stop = min(count, at + _PROMPT_LOGPROBS_CHUNK)
                    self._activate(self._adapters_of(row, stop - at))
                    logits = self._model.compute_logits(computed.hidden[begin + at : begin + stop])
                    entries += self._sampler.prompt_logprobs(logits, targets[at:stop], wanted)
                step.prompt_logprobs[row.slot] = entries
            begin += row.length

    def _adapters_of(self, row: PlanRow, count: int) -> Tensor | None:
        """Of so many tokens of one row."""
        slot = self._adapter_slots[row.slot]
        return None if slot == NO_ADAPTER else torch.full((count,), slot, dtype=torch.int32, device=self._device)

    def _drop_largest(self, rows: list[PlanRow], step: StepInFlight, error: torch.OutOfMemoryError) -> list[PlanRow]:
        """Memory ran out: the row with the most tokens ends with an error, the others are computed without it."""
        largest = max(rows, key=lambda row: row.length)
        _log.error("out of device memory in a step of %d rows; dropped one of %d tokens", len(rows), largest.length)
        step.failed[largest.slot] = OUT_OF_MEMORY.format(reason=str(error).partition(".")[0])
        if self._device.type == "cuda":
            torch.cuda.synchronize()  # the stage is written again
            torch.cuda.empty_cache()
        return [row for row in rows if row is not largest]
