"""All between the fused projection and attention in one pass: the norm of query and key heads, RoPE (Su et al., 2021;
halves, the NeoX layout), and the write of keys and values to the paged cache (Kwon et al., 2023)."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from octavo.kernels.triton.launch import _after_previous, _cdiv, _launch, _power_of_two


@triton.jit
def _qk_norm_rope_write_kv_kernel(
    qkv_ptr,
    cos_ptr,
    sin_ptr,
    norm_weight_ptr,
    slot_mapping_ptr,
    cache_ptr,
    eps,
    key_scale,
    value_scale,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One program for HEADS heads of a token, whatever they are: queries are rotated in place, keys rotated on their
    way to the cache, values copied there. HALF: HEAD_DIM / 2 padded to a power of two.

    The cache is contiguous [num_blocks, 2, NUM_KV_HEADS, BLOCK_SIZE, HEAD_DIM], so head i of the keys and values
    together, keys first, lies at i * BLOCK_SIZE * HEAD_DIM in its block.
    """
    num_all: tl.constexpr = NUM_HEADS + 2 * NUM_KV_HEADS
    half_dim: tl.constexpr = HEAD_DIM // 2
    groups: tl.constexpr = (num_all + HEADS - 1) // HEADS
    token = (tl.program_id(0) // groups).to(tl.int64)
    head = (tl.program_id(0) % groups) * HEADS + tl.arange(0, HEADS)
    half = tl.arange(0, HALF)
    dtype = qkv_ptr.dtype.element_ty
    is_query = head < NUM_HEADS
    is_rotated = head < NUM_HEADS + NUM_KV_HEADS
    in_half = half < half_dim
    mask = (head < num_all)[:, None] & in_half[None, :]

    _after_previous(OVERLAP)
    source = qkv_ptr + token * (num_all * HEAD_DIM) + head[:, None] * HEAD_DIM + half[None, :]
    low = tl.load(source, mask=mask, other=0.0).to(tl.float32)
    high = tl.load(source + half_dim, mask=mask, other=0.0).to(tl.float32)
    # Both halves turn by the same angles; the first half of the sines bears the minus sign.
    cos = tl.load(cos_ptr + token * HEAD_DIM + half, mask=in_half, other=0.0).to(tl.float32)[None, :]
    sin = tl.load(sin_ptr + token * HEAD_DIM + half, mask=in_half, other=0.0).to(tl.float32)[None, :]
    slot = tl.load(slot_mapping_ptr + token)

    low_in, high_in = low, high
    if HAS_NORM:
        rms = tl.rsqrt((tl.sum(low * low, axis=1) + tl.sum(high * high, axis=1)) / HEAD_DIM + eps)[:, None]
        weighted = is_rotated[:, None] & in_half[None, :]
        weights = norm_weight_ptr + head[:, None] * HEAD_DIM + half[None, :]
        low_weight = tl.load(weights, mask=weighted, other=0.0).to(tl.float32)
        high_weight = tl.load(weights + half_dim, mask=weighted, other=0.0).to(tl.float32)
        # Rounded after the norm and after the weight, as the layer does it in two operators.
        low_in = ((low * rms).to(dtype).to(tl.float32) * low_weight).to(dtype).to(tl.float32)
        high_in = ((high * rms).to(dtype).to(tl.float32) * high_weight).to(dtype).to(tl.float32)
    low_out = tl.where(is_rotated[:, None], low_in * cos + high_in * sin, low)
    high_out = tl.where(is_rotated[:, None], high_in * cos - low_in * sin, high)

    query_mask = is_query[:, None] & in_half[None, :]
    tl.store(source, low_out.to(dtype), mask=query_mask)
    tl.store(source + half_dim, high_out.to(dtype), mask=query_mask)

    cache_dtype = cache_ptr.dtype.element_ty
    block, offset = slot // BLOCK_SIZE, slot % BLOCK_SIZE
    entry = cache_ptr + block * (2 * NUM_KV_HEADS * BLOCK_SIZE * HEAD_DIM) + offset * HEAD_DIM
    target = entry + (head - NUM_HEADS)[:, None] * (BLOCK_SIZE * HEAD_DIM) + half[None, :]
    cache_mask = mask & (head >= NUM_HEADS)[:, None]
    # A float8 cache takes the value that a cache of the model's dtype would hold, scaled and rounded once more.
    low_out, high_out = low_out.to(dtype).to(tl.float32), high_out.to(dtype).to(tl.float32)
    if cache_dtype == tl.float8e4nv:
        scale = tl.where(is_rotated, key_scale, value_scale)[:, None]
        low_out, high_out = low_out / scale, high_out / scale
    tl.store(target, low_out.to(cache_dtype), mask=cache_mask)
    tl.store(target + half_dim, high_out.to(cache_dtype), mask=cache_mask)


def _heads_per_program(num_tokens: int) -> int:
    """Few tokens are spread over more multiprocessors; many fill them anyway, and share the loads of their angles."""
    return 4 if num_tokens < 64 else 16


def qk_norm_rope_write_kv(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    norm_weight: Tensor | None,
    eps: float,
    slot_mapping: Tensor,
    cache_layer: Tensor,
    num_heads: int,
    num_kv_heads: int,
    kv_scales: tuple[float, float] = (1.0, 1.0),
) -> Tensor:
    """Normalise and rotate the heads of T tokens and write their keys and values to the cache.

    qkv: [T, (num_heads + 2 * num_kv_heads) * head_dim], contiguous: queries, keys, values. Its queries are rotated in
        place; its keys and values stay as they were.
    cos, sin: [T, head_dim] or [T, 1, head_dim], contiguous, of qkv's dtype: cosines and signed sines, as
        `layers.rotary.rotate` takes them. Only the first half of a row is read.
    norm_weight: [num_heads + num_kv_heads, head_dim], the RMSNorm of every query and key head, before the rotation;
        None for no norm. eps: added to the mean of squares.
    slot_mapping: int64 [T]; block * block_size + offset of every token. Tokens that share a slot (padding, in block 0)
        leave either one's values.
    cache_layer: [num_blocks, 2, num_kv_heads, block_size, head_dim], contiguous; of qkv's dtype, or float8_e4m3fn
        (what is out of its range saturates).
    kv_scales: what a float8 cache's keys and values are divided by.

    Returns the queries: a view [T, num_heads, head_dim] of qkv. head_dim: even, up to 256.
    """
    num_tokens, num_all = qkv.shape[0], num_heads + 2 * num_kv_heads
    block_size, head_dim = cache_layer.shape[3], cache_layer.shape[4]
    half = _power_of_two(head_dim // 2)
    heads = _heads_per_program(num_tokens)
    tensors = qkv, cos, sin, qkv if norm_weight is None else norm_weight, slot_mapping, cache_layer
    constants = num_heads, num_kv_heads, head_dim, block_size, norm_weight is not None, heads, half
    programs, num_warps = num_tokens * _cdiv(num_all, heads), max(1, heads * half // 256)
    _launch(_qk_norm_rope_write_kv_kernel, programs, tensors, (float(eps), *kv_scales), constants, num_warps)
    return qkv.view(num_tokens, num_all, head_dim)[:, :num_heads]
