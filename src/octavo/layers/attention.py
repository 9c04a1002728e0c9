"""Attention, as a model sees it: heads in, heads out. Where keys and values are kept is the context's business."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor, nn

from octavo.attention.backend import AttentionLayer, FusedAttentionBackend
from octavo.layers.norm import QueryKeyNorm
from octavo.layers.rotary import Rotation, rotate


class AttentionContext(Protocol):
    """The part of an attention backend that a model calls, once per layer, in order of depth."""

    def forward(self, layer: AttentionLayer, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """query: [T, num_heads, head_dim]; key, value: [T, num_kv_heads, head_dim]; positions already encoded.

        Strides are free, but for the last dimension. Returns a tensor of query's shape.
        """
        ...


class Attention(nn.Module):
    """Causal attention of one layer. Query i sees key j iff j <= i and, under a window, i - j < sliding_window."""

    def __init__(
        self, layer_index: int, num_heads: int, num_kv_heads: int, head_dim: int, sliding_window: int | None
    ) -> None:
        super().__init__()
        self.layer_index = layer_index
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.scale = head_dim**-0.5
        self.sliding_window = sliding_window

    def forward(
        self, qkv: Tensor, rotation: Rotation, qk_norm: QueryKeyNorm | None, context: AttentionContext
    ) -> Tensor:
        """Split, normalise, rotate, attend. qkv: [T, (num_heads + 2 * num_kv_heads) * head_dim], contiguous: queries,
        keys, values; it may be overwritten. Returns [T, num_heads * head_dim]."""
        if isinstance(context, FusedAttentionBackend):
            norm = None if qk_norm is None else (qk_norm.weight, qk_norm.eps)
            return context.forward_fused(self, qkv, rotation, norm).view(-1, self.num_heads * self.head_dim)
        heads = qkv.view(qkv.shape[0], -1, self.head_dim)
        queries_keys, value = heads.split((self.num_heads + self.num_kv_heads, self.num_kv_heads), 1)
        if qk_norm is not None:
            queries_keys = qk_norm(queries_keys)
        query, key = rotate(queries_keys, *rotation).split((self.num_heads, self.num_kv_heads), 1)
        return context.forward(self, query, key, value).reshape(-1, self.num_heads * self.head_dim)
