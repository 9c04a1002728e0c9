"""RoPE, the norm before it and the write to the paged cache in plain torch: the oracle of the fused kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from octavo.kernels.reference.fp8 import to_fp8


def qk_norm_rope_write_kv(
    qkv: Tensor,
    rotation: tuple[Tensor, Tensor],
    norm: tuple[Tensor, float] | None,
    slot_mapping: Tensor,
    cache_layer: Tensor,
    num_heads: int,
    kv_scales: tuple[float, float] = (1.0, 1.0),
) -> Tensor:
    """Writes keys and values to cache_layer [num_blocks, 2, num_kv_heads, block_size, head_dim]; returns the rotated
    queries, a new tensor [T, num_heads, head_dim].

    qkv: [T, (num_heads + 2 * num_kv_heads) * head_dim], not changed. rotation: cosines and signed sines, [T, head_dim].
    norm: RMSNorm's weight [num_heads + num_kv_heads, head_dim] and epsilon; rounded before and after the weight.
    kv_scales: what a float8 cache's keys and values are divided by.
    """
    _, _, num_kv_heads, block_size, head_dim = cache_layer.shape
    dtype = qkv.dtype
    heads = qkv.view(len(qkv), -1, head_dim)
    queries_keys, value = heads.split((num_heads + num_kv_heads, num_kv_heads), 1)
    wide = queries_keys.double()
    if norm is not None:
        weight, eps = norm
        scaled = (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(dtype)
        wide = (scaled.double() * weight.double()).to(dtype).double()
    cos, sin = (part.double().view(len(qkv), 1, head_dim) for part in rotation)
    rotated = (wide * cos + wide.roll(head_dim // 2, -1) * sin).to(dtype)
    query, key = rotated.split((num_heads, num_kv_heads), 1)
    for index, slot in enumerate(slot_mapping.tolist()):
        entry = cache_layer[slot // block_size, :, :, slot % block_size]
        written = torch.stack((key[index], value[index]))
        if cache_layer.dtype == torch.float8_e4m3fn:
            written = to_fp8(written.double() / torch.tensor(kv_scales, device=written.device)[:, None, None])
        entry.copy_(written)
    return query
