"""Attention on a GPU by our own kernels: rows of one token are split over their keys, others over their queries."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from octavo.attention.backend import AttentionLayer, DeviceBatch, FusedAttentionBackend, PlanRow, kv_scales
from octavo.attention.long_prefill import LongPrefill
from octavo.attention.prefill_items import max_prefill_items, prefill_items
from octavo.attention.work_items import ITEM_FIELDS, DecodePlanner, queries_of_item, sharing_rows
from octavo.kernels import triton

Ints = NDArray[np.int32]
_NO_PREFILL: Ints = np.empty((0, 2), np.int32)


class TritonAttention(FusedAttentionBackend):
    """Owns the KV cache [layers, blocks, 2 (K, V), KV heads, block_size, head_dim] and the scratch of its kernels.

    long_prefill: what attends long rows faster, in steps that are not recorded. shares: whether rows of one token that
    follow each other in one sequence read its keys together: what verifies guesses has such rows.
    """

    item_fields = ITEM_FIELDS, 2

    def __init__(
        self,
        cache: Tensor,
        num_heads: int,
        num_processors: int,
        max_rows: int,
        long_prefill: LongPrefill,
        shares: bool = False,
    ) -> None:
        num_kv_heads, head_dim = cache.shape[3], cache.shape[5]
        self._cache = cache
        self._num_heads = num_heads
        self._num_kv_heads = num_kv_heads
        self._planner = DecodePlanner(num_processors, num_kv_heads)
        self._long_prefill = long_prefill
        self._kernels = triton.get()
        self._queries = queries_of_item(self._group_size) if shares else 1
        sizes = self._planner.max_items(max_rows), max_rows, num_heads, num_kv_heads, head_dim
        self._scratch = self._kernels.decode_scratch(*sizes, cache.device, self._queries)
        self._batch: DeviceBatch  # of the step that is being launched
        self._taken: dict[int, tuple[int, int]] = {}  # of the rows last planned: tokens that the library computes

    def max_items(self, num_rows: int, num_tokens: int) -> tuple[int, int]:
        return self._planner.max_items(num_rows), max_prefill_items(num_tokens, num_rows, self._group_size)

    @property
    def _group_size(self) -> int:
        return self._num_heads // self._num_kv_heads

    def plan(self, rows: Sequence[PlanRow], block_tables: Tensor, whole: bool) -> tuple[Ints, Ints]:
        starts = np.fromiter((row.start for row in rows), np.int32, len(rows))
        lengths = np.fromiter((row.length for row in rows), np.int32, len(rows))
        single = np.flatnonzero(lengths == 1)
        if self._queries == 1:
            decode = self._planner.plan(starts[single] + 1, single)
        else:
            slots = np.fromiter((rows[index].slot for index in single), np.int32, len(single))
            decode = self.plan_decodes(slots, starts[single], single)
        self._taken = {}
        if len(single) == len(rows):
            return decode, _NO_PREFILL
        if not whole:
            self._taken = self._long_prefill.prepare(rows, block_tables)
        return decode, prefill_items(starts, lengths, self._group_size, taken=self._taken)

    def plan_decodes(self, slots: Ints, starts: Ints, rows: Ints) -> Ints:
        """The work of rows with one query token each, as `plan` has it. slots, starts, rows: int32 [N], where their
        sequences are, the tokens before theirs, and their indices in the step."""
        if self._queries == 1:
            return self._planner.plan(starts + 1, rows)
        firsts, shares = sharing_rows(slots, starts, rows, self._queries)
        return self._planner.plan(starts[firsts + shares - 1] + 1, rows[firsts], shares=shares)

    def prepare(self, batch: DeviceBatch) -> None:
        self._batch = batch

    def forward_fused(
        self, layer: AttentionLayer, qkv: Tensor, rotation: tuple[Tensor, Tensor], norm: tuple[Tensor, float] | None
    ) -> Tensor:
        batch, cache = self._batch, self._cache[layer.layer_index]
        weight, eps = norm or (None, 0.0)
        heads, scales = (self._num_heads, self._num_kv_heads), kv_scales(layer, cache)
        where = batch.slot_mapping, cache
        query = self._kernels.qk_norm_rope_write_kv(qkv, *rotation, weight, eps, *where, *heads, scales)
        out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        tables, scale = (batch.block_tables, batch.row_slots), layer.scale * scales[0]
        has_prompts = len(batch.prefill_items) > 0
        if has_prompts:
            items = *tables, batch.starts, batch.cu_q, batch.prefill_items
            self._kernels.paged_prefill(query, cache, *items, out, scale, layer.sliding_window)
        if len(batch.decode_items):
            items = batch.decode_items
            self._kernels.paged_decode(
                query, cache, *tables, batch.cu_q, items, out, self._scratch, scale, layer.sliding_window,
                queries=self._queries, beside=has_prompts,
            )  # fmt: skip
        if batch.rows is not None and self._taken:
            self._long_prefill.forward(layer.layer_index, query, cache, out, scale)
        return out if scales[1] == 1.0 else out.mul_(scales[1])
