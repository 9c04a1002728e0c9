"""What a step on a GPU is told: one int32 buffer, filled on the host, copied once as far as the step needs it."""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from octavo.protocol.plan import NO_ADAPTER, NewSequence, PlanRow

Ints = NDArray[np.int32]

NUM_PARAMS = 16  # int32 words of a slot's sampling parameters
_ALIGNMENT = 16  # words: every field starts on 64 bytes, so that kernels see the same alignment whatever the sizes
_DIFF_WORDS = 1 << 18  # room for the diff beside the fixed fields; a larger one travels in a copy of its own


@dataclass(frozen=True, slots=True)
class StepShape:
    """Sizes of a step: of the real one, or of the graph that it is padded to.

    decodes: every row has one token, so num_tokens = num_rows. adapters: rows may have one.
    """

    num_tokens: int
    num_rows: int
    num_decode_items: int
    num_prefill_items: int
    decodes: bool
    adapters: bool = False


class Diff(NamedTuple):
    """Where the parts of a diff lie in its words, as the kernel apply_diff takes them."""

    token_segments_at: int
    num_segments: int
    longest: int
    block_entries_at: int
    num_block_entries: int
    params_at: int
    num_params: int


class SplitRows(NamedTuple):
    """Rows of a plan as a GPU computes them: one that verifies k guesses is 1 + k rows of a token each.

    rows: those. offsets: of each, how far its token is behind the last that is known; -1 where the plan's start is
    right. first_rows: of each row of the plan, its first one here; num_drafts: its guesses, -1 if it samples nothing.
    """

    rows: list[PlanRow]
    offsets: list[int]
    first_rows: list[int]
    num_drafts: list[int]

    @classmethod
    def of(cls, rows: Sequence[PlanRow], follows: Container[int]) -> SplitRows:
        """follows: slots whose sequences decode, and may be shorter than the plan takes them for."""
        split = cls([], [], [], [])
        for row in rows:
            split.first_rows.append(len(split.rows))
            split.num_drafts.append(row.num_drafts if row.samples else -1)
            if row.slot not in follows:
                split.rows.append(row)
                split.offsets.append(-1)
                continue
            for index in range(1 + row.num_drafts):
                masks = None if row.masks is None else row.masks[index : index + 1]
                split.rows.append(PlanRow(row.slot, row.start + index, 1, [], True, masks))
                split.offsets.append(index)
        return split


class StepBuffers:
    """The fields of a step by name, on the device, and the layout that host and device share.

    row_slots, starts, positions (of the token that a row draws), samples: int32 [max_rows]. cu_q: int32
    [max_rows + 1]. adapters: int32 [max_rows + 1], the slot of each row's adapter, -1 for none and past the last row;
    it means nothing in steps whose shape has no adapters. decode_items, prefill_items: int32 [items, fields]. Made on
    the device from those: input_ids int32, token_positions and slot_mapping int64 [max_tokens]. out: int32
    [max_rows, 2], token and bad flag of each row.

    With speculation also, as its kernels take them: offsets int32 [max_rows]; first_rows, num_drafts int32 [max_rows],
    of the sequences that are in the step, num_drafts -1 past the last one; else they have no room.
    """

    def __init__(
        self,
        max_rows: int,
        max_tokens: int,
        decode_items: tuple[int, int],
        prefill_items: tuple[int, int],
        device: torch.device,
        speculates: bool = False,
    ) -> None:
        """decode_items, prefill_items: (most of them, fields of each)."""
        max_groups = max_rows if speculates else 0
        shapes = {
            "row_slots": (max_rows,),
            "starts": (max_rows,),
            "cu_q": (max_rows + 1,),
            "positions": (max_rows,),
            "samples": (max_rows,),
            "adapters": (max_rows + 1,),
            "offsets": (max_groups,),
            "first_rows": (max_groups,),
            "num_drafts": (max_groups,),
            "decode_items": decode_items,
            "prefill_items": prefill_items,
        }
        self._spans: dict[str, tuple[int, tuple[int, ...]]] = {}
        end = 0
        for name, shape in shapes.items():
            self._spans[name] = end, shape
            end += -(-int(np.prod(shape)) // _ALIGNMENT) * _ALIGNMENT
        self.num_fixed = end
        self.num_words = end + _DIFF_WORDS
        self.packed = torch.zeros(self.num_words, dtype=torch.int32, device=device)
        self.row_slots, self.starts, self.cu_q, self.positions, self.samples = (
            self._view(name) for name in ("row_slots", "starts", "cu_q", "positions", "samples")
        )
        self.adapters = self._view("adapters")
        self.offsets, self.first_rows, self.num_drafts = (
            self._view(name) for name in ("offsets", "first_rows", "num_drafts")
        )
        self.decode_items, self.prefill_items = self._view("decode_items"), self._view("prefill_items")
        self.input_ids = torch.zeros(max_tokens, dtype=torch.int32, device=device)
        self.token_positions = torch.zeros(max_tokens, dtype=torch.int64, device=device)
        self.slot_mapping = torch.zeros(max_tokens, dtype=torch.int64, device=device)
        self.out = torch.zeros(max_rows, 2, dtype=torch.int32, device=device)

    def _view(self, name: str) -> Tensor:
        begin, shape = self._spans[name]
        return self.packed[begin : begin + int(np.prod(shape))].view(shape)

    def num_used(self, shape: StepShape) -> int:
        """Words of `packed`, from the first on, among which are all that a step of this shape reads."""
        last, count = "decode_items", shape.num_decode_items
        if shape.num_prefill_items:
            last, count = "prefill_items", shape.num_prefill_items
        begin, (_, num_fields) = self._spans[last]
        return begin + count * num_fields

    def field(self, words: Ints, name: str) -> Ints:
        """The field in host words laid out as `packed` is."""
        begin, shape = self._spans[name]
        return words[begin : begin + int(np.prod(shape))].reshape(shape)

    def write_rows(self, words: Ints, rows: Sequence[PlanRow], shape: StepShape) -> None:
        """Fill the fields of the rows, and pad them to `shape`: padding rows have slot -1 and no tokens."""
        count = len(rows)
        slots, starts, cu_q, positions, samples = (
            self.field(words, name) for name in ("row_slots", "starts", "cu_q", "positions", "samples")
        )
        lengths = np.fromiter((row.length for row in rows), np.int32, count)
        slots[:count] = [row.slot for row in rows]
        slots[count : shape.num_rows] = -1
        starts[:count] = [row.start for row in rows]
        starts[count : shape.num_rows] = 0
        cu_q[0] = 0
        np.cumsum(lengths, out=cu_q[1 : count + 1])
        cu_q[count + 1 : shape.num_rows + 1] = cu_q[count]
        np.add(starts[:count], lengths, out=positions[:count])
        samples[:count] = [row.samples for row in rows]
        samples[count : shape.num_rows] = 0

    def write_adapters(self, words: Ints, slots: Sequence[int], shape: StepShape) -> None:
        """Fill the field of the rows' adapters, and pad it to `shape`."""
        field = self.field(words, "adapters")
        field[: len(slots)] = slots
        field[len(slots) : shape.num_rows + 1] = NO_ADAPTER

    def write_groups(self, words: Ints, split: SplitRows, shape: StepShape) -> None:
        """Fill the fields of the sequences whose rows these are, and pad them to `shape`."""
        for name, values, padding in (
            ("offsets", split.offsets, -1),
            ("first_rows", split.first_rows, 0),
            ("num_drafts", split.num_drafts, -1),
        ):
            field = self.field(words, name)
            field[: len(values)] = values
            field[len(values) : shape.num_rows] = padding

    def token_adapters(self, shape: StepShape) -> Tensor:
        """The adapter of each token of the step: int32 [num_tokens], made on the device."""
        if shape.decodes:
            return self.adapters[: shape.num_tokens]
        tokens = torch.arange(shape.num_tokens, dtype=torch.int32, device=self.adapters.device)
        rows = torch.searchsorted(self.cu_q[: shape.num_rows + 1], tokens, right=True, out_int32=True) - 1
        return self.adapters[rows]

    def write_items(self, words: Ints, name: str, items: Ints, padded: int) -> None:
        """Fill a field of work items; those from len(items) to `padded` get row -1."""
        field = self.field(words, name)
        field[: len(items)] = items
        field[len(items) : padded, 0] = -1


class DiffWriter:
    """What the slots must learn before a step: token ids, block tables and sampling parameters of new sequences, and
    the blocks that others have grown by. Knows how far each slot's table is filled; its only writer."""

    def __init__(self, num_slots: int) -> None:
        self._num_blocks = [0] * num_slots

    def words(
        self, new: Sequence[NewSequence], rows: Sequence[PlanRow], params: Sequence[Ints], base: int
    ) -> tuple[Ints, Diff]:
        """The diff as int32 words that will lie from word `base` on. params: NUM_PARAMS words for each of `new`."""
        blocks: list[tuple[int, int, int]] = []
        for sequence in new:
            self._num_blocks[sequence.slot] = 0
            self._append(blocks, sequence.slot, sequence.block_table)
        for row in rows:
            if row.new_block_ids:
                self._append(blocks, row.slot, row.new_block_ids)
        segments_at = base
        blocks_at = segments_at + 4 * len(new)
        params_at = blocks_at + 3 * len(blocks)
        tokens_at = params_at + (1 + NUM_PARAMS) * len(new)
        tokens = [np.array(sequence.token_ids, np.int32) for sequence in new]
        segments = np.zeros((len(new), 4), np.int32)
        for index, (sequence, ids) in enumerate(zip(new, tokens)):
            segments[index] = sequence.slot, 0, len(ids), tokens_at
            tokens_at += len(ids)
        records = [np.concatenate(([sequence.slot], own)).astype(np.int32) for sequence, own in zip(new, params)]
        parts = [segments.reshape(-1), np.array(blocks, np.int32).reshape(-1), *records, *tokens]
        longest = max((len(ids) for ids in tokens), default=0)
        diff = Diff(segments_at, len(new), longest, blocks_at, len(blocks), params_at, len(new))
        return np.concatenate(parts), diff

    @staticmethod
    def moved(words: Ints, diff: Diff, base: int) -> tuple[Ints, Diff]:
        """The same diff, that was to lie from word `base` on, for words that lie at 0."""
        first, blocks, params = diff.token_segments_at - base, diff.block_entries_at - base, diff.params_at - base
        words[: 4 * diff.num_segments].reshape(-1, 4)[:, 3] -= base
        return words, diff._replace(token_segments_at=first, block_entries_at=blocks, params_at=params)

    def _append(self, entries: list[tuple[int, int, int]], slot: int, block_ids: list[int]) -> None:
        begin = self._num_blocks[slot]
        entries += [(slot, begin + index, block) for index, block in enumerate(block_ids)]
        self._num_blocks[slot] = begin + len(block_ids)
