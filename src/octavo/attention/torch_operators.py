"""Attention on a GPU in plain torch operators, row by row: slow, and there to compare the kernels with."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from octavo.attention.backend import AttentionLayer, DeviceBatch, FusedAttentionBackend, PlanRow, kv_scales

_NO_ITEMS: NDArray[np.int32] = np.empty((0, 2), np.int32)


class TorchAttention(FusedAttentionBackend):
    """Owns the KV cache [layers, blocks, 2 (K, V), KV heads, block_size, head_dim]. It goes by the host's rows, so its
    steps cannot be recorded; a step that comes without rows (of padding only) attends to nothing."""

    item_fields = 2, 2

    def __init__(self, cache: Tensor, num_heads: int) -> None:
        self._cache = cache
        self._num_heads = num_heads
        self._batch: DeviceBatch  # of the step that is being launched

    def max_items(self, num_rows: int, num_tokens: int) -> tuple[int, int]:  # noqa: ARG002
        return 0, 0

    def plan(
        self,
        rows: Sequence[PlanRow],  # noqa: ARG002
        block_tables: Tensor,  # noqa: ARG002
        whole: bool,  # noqa: ARG002
    ) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        return _NO_ITEMS, _NO_ITEMS

    def prepare(self, batch: DeviceBatch) -> None:
        self._batch = batch

    def forward_fused(
        self, layer: AttentionLayer, qkv: Tensor, rotation: tuple[Tensor, Tensor], norm: tuple[Tensor, float] | None
    ) -> Tensor:
        cache = self._cache[layer.layer_index]
        num_kv_heads, block_size, head_dim = cache.shape[2:]
        heads = qkv.view(len(qkv), -1, head_dim)
        turned, value = heads.split((self._num_heads + num_kv_heads, num_kv_heads), 1)
        if norm is not None:
            turned = F.rms_norm(turned, (head_dim,), None, norm[1]) * norm[0]
        cos, sin = (angle.view(-1, 1, head_dim) for angle in rotation)
        turned = torch.addcmul(turned * cos, turned.roll(head_dim // 2, -1), sin)
        query, key = turned.split((self._num_heads, num_kv_heads), 1)
        blocks, offsets = self._batch.slot_mapping // block_size, self._batch.slot_mapping % block_size
        scales = kv_scales(layer, cache)
        cache[blocks, 0, :, offsets] = (key.float() / scales[0]).to(cache.dtype)
        cache[blocks, 1, :, offsets] = (value.float() / scales[1]).to(cache.dtype)
        out = torch.zeros_like(query)
        begin = 0
        for row in self._batch.rows or ():
            end = begin + row.length
            out[begin:end] = self._attend(layer, query[begin:end], cache, row)
            begin = end
        return out.mul_(scales[1])

    def _attend(self, layer: AttentionLayer, query: Tensor, cache: Tensor, row: PlanRow) -> Tensor:
        """One row: query [L, num_heads, head_dim]."""
        num_kv_heads, block_size, head_dim = cache.shape[2:]
        num_keys = row.start + row.length
        table = self._batch.block_tables[row.slot, : -(-num_keys // block_size)].long()
        gathered = cache[table].to(query.dtype).permute(1, 2, 0, 3, 4).reshape(2, num_kv_heads, -1, head_dim)
        keys, values = gathered[:, :, :num_keys].unbind(0)
        at = torch.arange(row.start, num_keys, device=query.device)
        distance = at[:, None] - torch.arange(num_keys, device=query.device)
        visible = distance >= 0
        if layer.sliding_window is not None:
            visible &= distance < layer.sliding_window
        heads = query.transpose(0, 1)[None], keys[None], values[None]
        attended = F.scaled_dot_product_attention(
            *heads, attn_mask=visible, scale=layer.scale * kv_scales(layer, cache)[0], enable_gqa=True
        )
        return attended[0].transpose(0, 1)
