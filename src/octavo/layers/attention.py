"""Attention, as a model sees it: heads in, heads out. Where keys and values are kept is the context's business."""

from __future__ import annotations

import math
from functools import partial
from typing import Protocol

from torch import Tensor, nn

from octavo.attention.backend import AttentionLayer, FusedAttentionBackend
from octavo.layers.norm import QueryKeyNorm
from octavo.layers.rotary import Rotation, rotate
from octavo.layers.slot import WeightSlot
from octavo.quantization.scheme import TensorSpec


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
        # Of a float8 cache; written by the slots below, where a checkpoint has them.
        self.key_scale = self.value_scale = 1.0
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

    def weight_slots(self, path: str) -> dict[str, WeightSlot]:
        """The scales of a float8 cache, by all the names that packers have for them. There may be none."""
        parent = path.rpartition(".")[0]
        scales = {
            "k_scale": ("k_scale", "k_proj.k_scale", "k_proj.output_scale", "attn.k_scale"),
            "v_scale": ("v_scale", "v_proj.v_scale", "v_proj.output_scale", "attn.v_scale"),
            "kv_scale": ("kv_scale", "attn.kv_scale"),
        }
        spec = TensorSpec(shape=(), other_shapes=((1,), (1, 1)), required=False)
        return {
            f"{parent}.{name}": WeightSlot(spec, partial(self._take_scale, kind, f"{parent}.{name}"))
            for kind, names in scales.items()
            for name in names
        }

    def _take_scale(self, kind: str, name: str, tensor: Tensor | None) -> None:
        if tensor is None:
            return
        scale = float(tensor)
        if not 0 < scale < math.inf:
            raise ValueError(f"{name} holds {scale}, expected a finite number above 0")
        if kind != "v_scale":
            self.key_scale = scale
        if kind != "k_scale":
            self.value_scale = scale
