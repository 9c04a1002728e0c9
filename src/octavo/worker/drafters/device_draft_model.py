"""A smaller model of the same tokens as drafter on a GPU, without waiting for the host (Leviathan et al. 2023)."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from octavo.attention.backend import DeviceBatch
from octavo.attention.triton import TritonAttention
from octavo.kernels import triton
from octavo.models.base import CausalLM
from octavo.protocol.plan import NewSequence, PlanRow
from octavo.worker.cuda_graphs import record_graph
from octavo.worker.device_speculation import DeviceDraftBatch
from octavo.worker.staging import upload
from octavo.worker.step_buffers import NUM_PARAMS

Ints = NDArray[np.int32]

# Numbers of sequences that passes are padded to, and of tokens of each in the first pass, on average.
_SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 256, 384, 512)
_WIDTHS = (2, 3)


class _Buffers:
    """What passes for up to N sequences, of R tokens in the first, read and write, at fixed addresses.

    words: int32, what the host writes, of which the following are parts. slots: [N], -1 for padding. last_rows: [N],
    each sequence's last row of the first pass. row_slots, steps: [R], the slots of the rows of the first pass, -1 for
    padding, and how far they are from where the widest window begins. window_items, chain_items: of decode attention.
    ahead: int32 [N], how far the next pass is past the last known token.
    """

    def __init__(self, num_sequences: int, rows: int, max_items: tuple[int, int], device: torch.device):
        def ints(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=device)

        sizes = [num_sequences, num_sequences, rows, rows, 6 * max_items[0], 6 * max_items[1]]
        self.words = ints(sum(sizes))
        self.slots, self.last_rows, self.row_slots, self.steps, window, chain = self.words.split(sizes)
        self.window_items, self.chain_items = window.view(-1, 6), chain.view(-1, 6)
        self.sizes = sizes
        self.ahead = ints(num_sequences)
        self.cu_q = torch.arange(rows + 1, dtype=torch.int32, device=device)
        self.starts, self.positions, self.input_ids = ints(rows), ints(rows), ints(rows)
        self.drawn = ints(num_sequences, 2)
        self.token_positions = torch.zeros(rows, dtype=torch.int64, device=device)
        self.slot_mapping = torch.zeros(rows, dtype=torch.int64, device=device)


class DeviceModelDrafter:
    """Guesses what the smaller model holds likeliest, token after token.

    The tokens of a prompt go through the smaller model beside the model's own step. After that, a pass over the last
    known tokens of each sequence brings its KV up to date, whatever was accepted, and gives the first guess; each
    further one takes a pass of one token. The last two tokens do where the step before made guesses too; where none
    were wanted for long there remain gaps, before the last `most + 2`. Each pass is a CUDA graph, of as many sequences
    as it is padded to, and of as many tokens of each, unless those are many.
    """

    def __init__(
        self,
        model: CausalLM,
        attention: TritonAttention,
        block_tables: Tensor,
        sizes: tuple[int, int],
        most: int,
        use_graphs: bool,
    ) -> None:
        """attention: over a cache with as many blocks as the model's own. block_tables: of all slots. sizes: tokens of
        a KV block, and sequences that are served in a step, beyond which none is. most: guesses of a sequence."""
        self._model = model
        self._attention = attention
        self._block_tables = block_tables
        self._block_size, max_sequences = sizes
        self._most = most
        self._widest = most + 2
        # By slot: how many of the last known tokens have no KV yet, at most; negative after guesses, which have theirs.
        self._missing: dict[int, int] = {}
        self._sizes = [size for size in _SIZES if size <= max_sequences]
        self._kernels = triton.get()
        self._use_graphs = use_graphs
        device = block_tables.device
        largest = self._sizes[-1]
        max_items = [attention.max_items(rows, rows)[0] for rows in (largest * self._widest, largest)]
        self._buffers = _Buffers(largest, largest * self._widest, (max_items[0], max_items[1]), device)
        # Parameters of slots whose draws are greedy: temperature 0.
        self._greedy = torch.zeros(len(block_tables), NUM_PARAMS, dtype=torch.int32, device=device)
        # By sequences, and tokens of each in the first pass, on average, 0 for the others.
        self._graphs: dict[tuple[int, int], torch.cuda.CUDAGraph] = {}
        if use_graphs:
            self._pool = torch.cuda.graph_pool_handle()  # passes follow each other: one for all
            self._stream = torch.cuda.Stream()

    def enter(self, new: NewSequence, start: int) -> None:  # noqa: ARG002
        """See Drafter: its KV is that of the slot's blocks."""
        self._missing[new.slot] = 0

    def propose(self, batch: DeviceDraftBatch) -> None:
        """See DeviceDrafter."""
        prompts = [row for row, is_prompt, count in zip(batch.rows, batch.prompts, batch.asked) if is_prompt and count]
        if prompts:
            self._compute_prompts(prompts, batch.token_ids)
        computed = {row.slot for row in prompts}
        for row, is_prompt in zip(batch.rows, batch.prompts):
            missing = 0 if row.slot in computed else self._missing[row.slot] + row.length
            missing += is_prompt and row.samples  # its length is without the token that was drawn
            self._missing[row.slot] = max(int(row.samples), missing)
        asked = [index for index, row in enumerate(batch.rows) if row.samples and batch.asked[index]]
        asked = asked[: self._sizes[-1]]
        if not asked:
            return
        size = next(size for size in self._sizes if size >= len(asked))
        widths = [min(self._missing[batch.rows[index].slot], self._widest) for index in asked]
        width = next((width for width in _WIDTHS if width * size >= sum(widths)), self._widest)
        self._describe([batch.rows[index] for index in asked], widths)
        most = max(batch.asked[index] for index in asked)
        for index in range(most):
            self._launch(size, width if index == 0 else 0, batch.lengths, batch.token_ids)
        self._missing |= {batch.rows[index].slot: 1 - most for index in asked}
        # The draws are in the table by now, behind the known tokens.
        where = slice(None)
        if len(asked) < len(batch.rows):
            where = upload(np.array(asked, np.int32), batch.drafts.device).long()
        slots = self._buffers.slots[: len(asked)].long()
        columns = batch.lengths[slots].long()[:, None] + torch.arange(most, device=slots.device)
        batch.drafts[where, :most] = batch.token_ids[slots[:, None], columns.clamp(max=batch.token_ids.shape[1] - 1)]
        if isinstance(where, Tensor):
            batch.found.index_fill_(0, where, most)  # as an assignment it would wait for the device
        else:
            batch.found.fill_(most)

    def record(self, lengths: Tensor, token_ids: Tensor) -> None:
        """Record all passes, on no sequence; the tables as in DeviceDraftBatch."""
        if self._use_graphs:
            self._buffers.words.fill_(-1)
            for size in reversed(self._sizes):  # in the memory of the largest the others find room
                for width in (*reversed(_WIDTHS), 0):
                    self._launch(size, width, lengths, token_ids)

    def _compute_prompts(self, rows: list[PlanRow], token_ids: Tensor) -> None:
        """Write the KV of the rows' tokens."""
        decode_items, prefill_items = self._attention.plan(rows, self._block_tables, whole=True)
        num_tokens = sum(row.length for row in rows)
        cu_q = np.cumsum([0, *(row.length for row in rows)], dtype=np.int32)
        fields = np.array([[row.slot for row in rows], [row.start for row in rows]], np.int32)
        device = token_ids.device
        row_slots, starts = upload(fields, device)
        made = (
            torch.empty(num_tokens, dtype=torch.int32, device=device),
            torch.empty(num_tokens, dtype=torch.int64, device=device),
            torch.empty(num_tokens, dtype=torch.int64, device=device),
        )
        where = row_slots.clone(), starts.clone(), upload(cu_q, device)
        self._kernels.build_inputs(*where, token_ids, self._block_tables, self._block_size, *made)
        items = upload(decode_items, device), upload(prefill_items, device)
        self._attention.prepare(DeviceBatch(*where, made[2], self._block_tables, *items, rows=None))
        self._model(made[0], made[1], self._attention)

    def _describe(self, rows: list[PlanRow], widths: list[int]) -> None:
        """Put the sequences into the buffers, and the work of attention, for the longest that they can be."""
        buffers, count = self._buffers, len(rows)
        slots = np.array([row.slot for row in rows], np.int32)
        known = np.array([row.start + row.length + 1 for row in rows], np.int32)
        after = np.cumsum(widths, dtype=np.int32)  # of each sequence's last row in the first pass
        row_slots = np.repeat(slots, widths)
        back = np.repeat(after, widths) - np.arange(after[-1], dtype=np.int32)  # from the next token
        starts = np.repeat(known, widths) - back
        real = np.flatnonzero(starts >= 0).astype(np.int32)
        window = self._attention.plan_decodes(row_slots[real], starts[real], real)
        chain = self._attention.plan_decodes(slots, known + self._most - 1, np.arange(count, dtype=np.int32))
        words = np.full(len(buffers.words), -1, np.int32)
        parts = slots, after - 1, row_slots, self._widest - back, window.reshape(-1), chain.reshape(-1)
        for begin, part in zip(np.cumsum([0, *buffers.sizes[:-1]]), parts):
            words[begin : begin + len(part)] = part
        buffers.words.copy_(upload(words, buffers.words.device))

    def _launch(self, size: int, width: int, lengths: Tensor, token_ids: Tensor) -> None:
        """The next guess of each sequence. width: of the first pass; 0: it is not the first. The tables are the same at
        each call."""

        def compute() -> None:
            if width:
                self._first(size, width, lengths, token_ids)
            else:
                self._next(size, lengths, token_ids)

        if not self._use_graphs or width > _WIDTHS[-1]:
            compute()
            return
        key = size, width
        if key not in self._graphs:
            compute()  # compiles, and sets up libraries
            self._graphs[key], _ = record_graph(compute, self._pool, self._stream)
        self._graphs[key].replay()

    def _first(self, size: int, width: int, lengths: Tensor, token_ids: Tensor) -> None:
        """Pass over the last known tokens of each sequence. Launches depend on size and width alone, as do those of
        `_next`."""
        buffers, rows = self._buffers, size * width
        steps, row_slots = buffers.steps[:rows], buffers.row_slots[:rows]
        behind = lengths - (self._widest - 1)
        position = behind[row_slots.clamp(min=0)] - 1 + steps
        row_slots = torch.where(position >= 0, row_slots, -1)
        items = buffers.window_items[: self._attention.max_items(rows, rows)[0]].clone()
        hidden = self._pass(row_slots, steps, behind, items, token_ids)
        last = buffers.last_rows[:size].clamp(min=0)
        self._take(hidden[last], buffers.slots[:size], buffers.positions[last], token_ids)
        buffers.ahead.fill_(1)

    def _next(self, size: int, lengths: Tensor, token_ids: Tensor) -> None:
        """Pass over the last guess of each sequence."""
        buffers = self._buffers
        slots, ahead = buffers.slots[:size], buffers.ahead[:size]
        items = buffers.chain_items[: self._attention.max_items(size, size)[0]].clone()
        hidden = self._pass(slots, ahead, lengths, items, token_ids)
        self._take(hidden, slots, buffers.positions[:size], token_ids)
        buffers.ahead.add_(1)

    def _pass(self, row_slots: Tensor, offsets: Tensor, lengths: Tensor, items: Tensor, token_ids: Tensor) -> Tensor:
        """Hidden states of one token a row, `offsets` after the last of `lengths`."""
        buffers, count = self._buffers, len(row_slots)
        starts, positions, cu_q = buffers.starts[:count], buffers.positions[:count], buffers.cu_q[: count + 1]
        self._kernels.follow_rows(row_slots, offsets, lengths, starts, positions, items)
        made = buffers.input_ids[:count], buffers.token_positions[:count], buffers.slot_mapping[:count]
        self._kernels.build_inputs(row_slots, starts, cu_q, token_ids, self._block_tables, self._block_size, *made)
        none = items[:0, :2]
        self._attention.prepare(
            DeviceBatch(row_slots, starts, cu_q, made[2], self._block_tables, items, none, rows=None)
        )
        return self._model(made[0], made[1], self._attention)

    def _take(self, hidden: Tensor, slots: Tensor, positions: Tensor, token_ids: Tensor) -> None:
        """Put the likeliest tokens into the table at these positions, where the next pass reads."""
        buffers, count = self._buffers, len(slots)
        logits = self._model.compute_logits(hidden)
        samples = buffers.cu_q[1 : count + 1]  # none is 0
        drawing = slots, positions, self._greedy, samples
        self._kernels.draw_tokens(logits, *drawing, token_ids, buffers.drawn[:count])
