"""Passes of a small model over sequences that decode, on a GPU and without waiting for the host: inputs and graphs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from octavo.attention.backend import DeviceBatch
from octavo.attention.triton import TritonAttention
from octavo.kernels import triton
from octavo.kernels.reference.draft_passes import DraftRows
from octavo.protocol.plan import PlanRow
from octavo.worker.cuda_graphs import record_graph
from octavo.worker.device_speculation import DeviceDraftBatch
from octavo.worker.staging import EarlyCopies, upload

Ints = NDArray[np.int32]

# Sequences up to which further passes are recorded in one: of more, the device's part is longer, and microseconds
# between two passes count for less.
_FEW = 16
_SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 256, 384, 512)  # sequences that passes are padded to


class PassSizes(NamedTuple):
    """block_size: tokens of a KV block. max_sequences: that are served in a step, beyond which none is. most: guesses
    of a sequence. widths: ascending, tokens of each sequence in the first pass, on average, that graphs are recorded
    for; the last is the most of one sequence. lag: how far the last token that the first pass takes is behind the last
    that is known."""

    block_size: int
    max_sequences: int
    most: int
    widths: Sequence[int]
    lag: int = 0


class Asked(NamedTuple):
    """A sequence that wants guesses. row: the index of its own in the step. wanted: how many. width: its tokens in the
    first pass. floor: its first position that a pass may write."""

    row: int
    wanted: int
    width: int
    floor: int = 0


class Compute(Protocol):
    def __call__(self, size: int, width: int, lengths: Tensor, token_ids: Tensor) -> None:
        """Launch a pass over `size` sequences: the first, over size * width tokens, or where width is 0 one of the
        others. Launches depend on size and width alone; lengths and token_ids, as in DeviceDraftBatch, stay where they
        are."""
        ...


class _Buffers:
    """What passes over N sequences, of R tokens in the first, read and write, at fixed addresses.

    words: int32, what the host writes, of which the following are parts. slots, wanted: [N], -1 for padding, and the
    guesses that are wanted. last_rows: [N], each sequence's last row of the first pass, any for padding. row_slots,
    backs, floors: [R], the slots of the rows of the first pass, -1 for padding; and as `draft_rows` takes them.
    window_items, chain_items: of decode attention, as planned.
    """

    def __init__(self, num_sequences: int, rows: int, max_items: tuple[int, int], device: torch.device):
        def ints(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.sizes = [*[num_sequences] * 3, *[rows] * 3, 6 * max_items[0], 6 * max_items[1]]
        self.words = ints(sum(self.sizes))
        parts = self.words.split(self.sizes)
        self.slots, self.wanted, self.last_rows, self.row_slots, self.backs, self.floors = parts[:6]
        self.window_items, self.chain_items = parts[6].view(-1, 6), parts[7].view(-1, 6)
        # Each begins where memory is aligned: kernels are compiled for that.
        of_rows = [ints(rows) for _ in range(4)] + [ints(rows, dtype=torch.int64) for _ in range(2)]
        self.made = DraftRows(*of_rows, ints(max(max_items), 6), ints(num_sequences))

    def rows(self, count: int, num_items: int) -> DraftRows:
        """The first of what passes read."""
        *of_rows, items, passes = self.made
        return DraftRows(*(tensor[:count] for tensor in of_rows), items[:num_items], passes)


class DraftPasses:
    """The first pass goes over the last known tokens of each sequence, and each further one over one token of each.

    The host knows upper bounds of where sequences end, by which work is planned; the device knows the ends. The first
    pass is a CUDA graph, of as many sequences and tokens as it is padded to; so is each further one, or of few
    sequences all of them together.
    """

    def __init__(
        self, compute: Compute, attention: TritonAttention, block_tables: Tensor, sizes: PassSizes, use_graphs: bool
    ) -> None:
        """attention: over a cache with as many blocks as the model's own. block_tables: of all slots."""
        self._compute = compute
        self._attention = attention
        self._block_tables = block_tables
        self._block_size, max_sequences, self._most, self._widths, self._lag = sizes
        self._sizes = [size for size in _SIZES if size <= max_sequences]
        self._kernels = triton.get()
        self.max_sequences = largest = self._sizes[-1]
        device = block_tables.device
        self._buffers = {size: self._buffers_for(size, device) for size in self._sizes}
        self.numbers = torch.arange(largest * self._widths[-1] + 1, dtype=torch.int32, device=device)
        """int32 [>= N + 1]: 0, 1, 2 and so on."""
        self._copies = EarlyCopies(device)
        self._use_graphs = use_graphs
        self._graphs: dict[tuple[int, int, int], torch.cuda.CUDAGraph] = {}  # by size, width and number of passes
        if use_graphs:
            self._pool = torch.cuda.graph_pool_handle()  # passes follow each other: one for all
            self._stream = torch.cuda.Stream()

    def run(self, batch: DeviceDraftBatch, asked: Sequence[Asked]) -> int:
        """All passes for these sequences, max_sequences of them at most. Returns how many: the most guesses wanted."""
        size = next(size for size in self._sizes if size >= len(asked))
        total = sum(each.width for each in asked)
        width = next(width for width in self._widths if width * size >= total)
        self._describe(batch.rows, asked, self._buffers[size])
        most = max(each.wanted for each in asked)
        self._launch(size, width, 1, batch.lengths, batch.token_ids)
        further = [most - 1] if size <= _FEW and most > 1 else [1] * (most - 1)
        for count in further:
            self._launch(size, 0, count, batch.lengths, batch.token_ids)
        self._copies.read()
        return most

    def record(self, lengths: Tensor, token_ids: Tensor) -> None:
        """Record all passes, on no sequence; the tables as in DeviceDraftBatch."""
        if self._use_graphs:
            for size in reversed(self._sizes):  # in the memory of the largest the others find room
                buffers = self._buffers[size]
                buffers.words.fill_(-1)
                buffers.last_rows.zero_()
                further = range(1, self._most if size <= _FEW else min(2, self._most))
                passes = [*((width, 1) for width in reversed(self._widths)), *((0, count) for count in further)]
                for width, count in passes:
                    buffers.made.count.fill_(-1)  # a further pass is then the first one, for which everybody has room
                    self._launch(size, width, count, lengths, token_ids)
            self._copies.read()

    def place_prompts(self, rows: Sequence[PlanRow], token_ids: Tensor) -> tuple[Tensor, Tensor]:
        """All tokens of rows that are right as they are: their ids in the table, and positions, int64."""
        decode_items, prefill_items = self._attention.plan(rows, self._block_tables, whole=True)
        num_tokens = sum(row.length for row in rows)
        cu_q = np.cumsum([0, *(row.length for row in rows)], dtype=np.int32)
        fields = np.array([[row.slot for row in rows], [row.start for row in rows]], np.int32)
        device = token_ids.device
        row_slots, starts = upload(fields, device)
        input_ids = torch.empty(num_tokens, dtype=torch.int32, device=device)
        positions = torch.empty(num_tokens, dtype=torch.int64, device=device)
        slot_mapping = torch.empty_like(positions)
        where = row_slots.clone(), starts.clone(), upload(cu_q, device)
        made = input_ids, positions, slot_mapping
        self._kernels.build_inputs(*where, token_ids, self._block_tables, self._block_size, *made)
        items = upload(decode_items, device), upload(prefill_items, device)
        self._attention.prepare(DeviceBatch(*where, slot_mapping, self._block_tables, *items, rows=None))
        return input_ids, positions

    def place_first(self, size: int, width: int, lengths: Tensor, token_ids: Tensor) -> tuple[DraftRows, Tensor]:
        """The last known tokens of each sequence; and, int32 [size], where the last of each is among them, any for
        padding."""
        buffers, rows = self._buffers[size], size * width
        num_items = self._attention.max_items(rows, rows)[0]
        made = buffers.rows(rows, num_items)
        where = buffers.row_slots[:rows], buffers.backs[:rows], buffers.floors[:rows], buffers.window_items[:num_items]
        self._place(*where, lengths, token_ids, made)
        return made, buffers.last_rows

    def place_next(self, size: int, lengths: Tensor, token_ids: Tensor) -> DraftRows:
        """The next token of each sequence that wants more guesses."""
        buffers = self._buffers[size]
        made = buffers.rows(size, len(buffers.chain_items))
        self._place(buffers.slots, None, buffers.wanted, buffers.chain_items, lengths, token_ids, made)
        return made

    def slots(self, size: int) -> Tensor:
        """int32 [size]: of the sequences, -1 for padding."""
        return self._buffers[size].slots

    def _place(
        self,
        slots: Tensor,
        backs: Tensor | None,
        limits: Tensor,
        planned: Tensor,
        lengths: Tensor,
        token_ids: Tensor,
        made: DraftRows,
    ) -> None:
        """Make the rows, of one token each, as `draft_rows` does, and tell attention of them."""
        tables = lengths, token_ids, self._block_tables, self._block_size
        self._kernels.draft_rows(slots, backs, limits, planned, self._lag, *tables, made)
        cu_q, none = self.numbers[: len(made.row_slots) + 1], made.items[:0, :2]
        where = made.row_slots, made.starts, cu_q, made.slot_mapping, self._block_tables
        self._attention.prepare(DeviceBatch(*where, made.items, none, rows=None))

    def _buffers_for(self, size: int, device: torch.device) -> _Buffers:
        rows = size * self._widths[-1]
        window, chain = (self._attention.max_items(count, count)[0] for count in (rows, size))
        return _Buffers(size, rows, (window, chain), device)

    def _describe(self, rows: Sequence[PlanRow], asked: Sequence[Asked], buffers: _Buffers) -> None:
        """Put the sequences into the buffers, and the work of attention, for the longest that they can be."""
        count = len(asked)
        own = [rows[each.row] for each in asked]
        slots = np.array([row.slot for row in own], np.int32)
        known = np.array([row.start + row.length + 1 for row in own], np.int32)
        _, wanted, widths, floors = np.array(asked, np.int32).T
        after = np.cumsum(widths, dtype=np.int32)  # of each sequence's last row in the first pass
        row_slots = np.repeat(slots, widths)
        back = np.repeat(after, widths) - np.arange(after[-1], dtype=np.int32)  # from the token after the last
        starts = np.repeat(known, widths) - back - self._lag
        real = np.flatnonzero(starts >= 0).astype(np.int32)
        window = self._attention.plan_decodes(row_slots[real], starts[real], real)
        ends = known - self._lag + wanted - 1
        chain = self._attention.plan_decodes(slots, ends, np.arange(count, dtype=np.int32))
        words = np.full(len(buffers.words), -1, np.int32)
        last_rows = np.zeros(len(buffers.slots), np.int32)
        last_rows[:count] = after - 1
        of_rows = row_slots, back, np.repeat(floors, widths)
        parts = slots, wanted, last_rows, *of_rows, window.reshape(-1), chain.reshape(-1)
        for begin, part in zip(np.cumsum([0, *buffers.sizes[:-1]]), parts):
            words[begin : begin + len(part)] = part
        self._copies.copy(words, buffers.words)

    def _launch(self, size: int, width: int, count: int, lengths: Tensor, token_ids: Tensor) -> None:
        """As many passes, of one kind. The tables are the same at each call."""

        def compute() -> None:
            for _ in range(count):
                self._compute(size, width, lengths, token_ids)

        key = size, width, count
        if key in self._graphs:
            self._graphs[key].replay()
            return
        compute()  # which also compiles, and sets up libraries
        if self._use_graphs:
            self._graphs[key], _ = record_graph(compute, self._pool, self._stream)


def reach_of(most: int) -> int:
    """The tokens that the first pass goes over at most, of a sequence that gets up to so many guesses: those of a step
    that verified as many, and one that a step without guesses brought."""
    return most + 2


def prompts_of(batch: DeviceDraftBatch) -> list[int]:
    """The rows of prompts for which there are, or will be, guesses: indices of batch.rows."""
    return [index for index, count in enumerate(batch.asked) if batch.prompts[index] and count]


def asked_of(batch: DeviceDraftBatch, max_sequences: int) -> list[int]:
    """The rows that want guesses now, as far as there is room: indices of batch.rows."""
    wanted = [index for index, row in enumerate(batch.rows) if row.samples and batch.asked[index]]
    return wanted[:max_sequences]
