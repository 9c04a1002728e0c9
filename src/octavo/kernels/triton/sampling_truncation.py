"""Where top_k, top_p and min_p cut a row, found without sorting it: radix select on order-preserving keys.

Two bits of the key are decided in each pass over the row, from three sums: how many tokens (top_k), or how much
probability (top_p), have a key of at least the three candidates. A bfloat16 row takes 8 passes, others 16.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.kernels.triton.sampling import MIN_P, NUM_PARAMS, TEMPERATURE, TOP_K, TOP_P, _ordered_key

# A cumulative probability this close to top_p, relatively, reaches it: float32 logits are no finer.
TOLERANCE = 1e-6
_BLOCK = 8192

_WORDS = tl.constexpr(NUM_PARAMS)
_TEMPERATURE = tl.constexpr(TEMPERATURE)
_TOP_P = tl.constexpr(TOP_P)
_MIN_P = tl.constexpr(MIN_P)
_TOP_K = tl.constexpr(TOP_K)
_REACHED = tl.constexpr(1 - TOLERANCE)
_LOG2_E = tl.constexpr(1.4426950408889634)
_ALL = tl.constexpr(2**31 - 1)


@triton.jit
def _block_keys(base, start, vocab_size, BITS: tl.constexpr, BLOCK: tl.constexpr):
    """ids, values (-inf outside the row) and the first BITS bits of the keys (0 outside the row)."""
    ids = start + tl.arange(0, BLOCK)
    x = tl.load(base + ids, mask=ids < vocab_size, other=float("-inf")).to(tl.float32)
    key = tl.where(ids < vocab_size, _ordered_key(x) >> (32 - BITS), 0)
    return ids, x, key


@triton.jit
def _weights(x, row_max, scale, floor):
    """Probabilities relative to the largest, 0 where below min_p."""
    weight = tl.exp2((x - row_max) * scale)
    return tl.where(weight >= floor, weight, 0.0)


@triton.jit
def _select(
    base, vocab_size, target, row_max, scale, floor, cut, tie_mass,
    WEIGHTED: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """(the largest key whose tokens from it on sum to more than target, the sum of those above it).

    Tokens count 1 each, or their weights where WEIGHTED; then only those above `cut` do, and tie_mass stands for the
    ones at it.
    """
    key = cut * 0
    above = tl.sum(tl.zeros([BLOCK], tl.float32), 0)
    step = (key + 1) << (BITS - 2)
    for _level in range(BITS // 2):
        key_1 = key + step
        key_2 = key_1 + step
        key_3 = key_2 + step
        sums_1 = tl.zeros([BLOCK], tl.float32)
        sums_2 = tl.zeros([BLOCK], tl.float32)
        sums_3 = tl.zeros([BLOCK], tl.float32)
        for start in range(0, vocab_size, BLOCK):
            _ids, x, keys = _block_keys(base, start, vocab_size, BITS, BLOCK)
            weight = tl.full([BLOCK], 1.0, tl.float32)
            if WEIGHTED:
                weight = tl.where(keys > cut, _weights(x, row_max, scale, floor), 0.0)
            sums_1 += tl.where(keys >= key_1, weight, 0.0)
            sums_2 += tl.where(keys >= key_2, weight, 0.0)
            sums_3 += tl.where(keys >= key_3, weight, 0.0)
        sum_1 = tl.sum(sums_1, 0)
        sum_2 = tl.sum(sums_2, 0)
        sum_3 = tl.sum(sums_3, 0)
        if WEIGHTED:
            sum_1 += tl.where(key_1 <= cut, tie_mass, 0.0)
            sum_2 += tl.where(key_2 <= cut, tie_mass, 0.0)
            sum_3 += tl.where(key_3 <= cut, tie_mass, 0.0)
        above = tl.where(sum_3 > target, above, tl.where(sum_2 > target, sum_3, tl.where(sum_1 > target, sum_2, sum_1)))
        key = tl.where(sum_3 > target, key_3, tl.where(sum_2 > target, key_2, tl.where(sum_1 > target, key_1, key)))
        step = step >> 2
    return key, above


@triton.jit
def _whole_key(key, BITS: tl.constexpr):
    """The 32-bit key of which these are the first BITS: negative values of fewer bits are ones in the rest."""
    whole = key
    if BITS < 32:
        negative = (key >> (BITS - 1)) == 0
        whole = (key << (32 - BITS)) | tl.where(negative, (1 << (32 - BITS)) - 1, 0).to(tl.uint32)
    return whole


@triton.jit
def _value_of(key):
    """The float32 of a 32-bit key."""
    ordered = (key ^ 0x80000000).to(tl.int32, bitcast=True)
    return (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _cuts_kernel(
    logits,  # [*, vocab_size], rows logits_stride apart
    source_rows,  # int32 [n]
    row_slots,  # int32 [n]
    records,  # int32 [num_slots, _WORDS]
    cut_keys,  # int32 [n]
    cut_ids,  # int32 [n]
    logits_stride,
    vocab_size,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    record = records + tl.load(row_slots + row) * _WORDS
    temperature = tl.load(record + _TEMPERATURE).to(tl.float32, bitcast=True)
    top_p = tl.load(record + _TOP_P).to(tl.float32, bitcast=True)
    min_p = tl.load(record + _MIN_P).to(tl.float32, bitcast=True)
    top_k = tl.load(record + _TOP_K)
    if (temperature <= 0) | ((top_k <= 0) & (top_p >= 1) & (min_p <= 0)):
        tl.store(cut_keys + row, 0)
        tl.store(cut_ids + row, vocab_size)
        return
    base = logits + tl.load(source_rows + row).to(tl.int64) * logits_stride
    scale = _LOG2_E / temperature
    largest = tl.full([BLOCK], float("-inf"), tl.float32)
    for start in range(0, vocab_size, BLOCK):
        _ids, x, _keys = _block_keys(base, start, vocab_size, BITS, BLOCK)
        largest = tl.maximum(largest, x)
    row_max = tl.max(largest, 0)

    key = (top_k * 0).to(tl.uint32)  # nothing is below it, so without top_k every token is above or at it
    quota = top_k * 0 + _ALL  # of the tokens at the key, how many are kept, by ascending id
    if top_k > 0:
        target = (top_k - 1).to(tl.float32)
        key, above = _select(base, vocab_size, target, row_max, scale, min_p, key, 0.0, False, BITS, BLOCK)
        quota = top_k - above.to(tl.int32)
    if top_p < 1:
        tie_mass = top_p * 0.0
        if top_k > 0:
            tie_mass = _weights(_value_of(_whole_key(key, BITS)), row_max, scale, min_p) * quota.to(tl.float32)
        sums = tl.zeros([BLOCK], tl.float32)
        for start in range(0, vocab_size, BLOCK):
            _ids, x, keys = _block_keys(base, start, vocab_size, BITS, BLOCK)
            sums += tl.where(keys > key, _weights(x, row_max, scale, min_p), 0.0)
        target = (tl.sum(sums, 0) + tie_mass) * (top_p * _REACHED)
        top_k_key = key
        key, above = _select(base, vocab_size, target, row_max, scale, min_p, top_k_key, tie_mass, True, BITS, BLOCK)
        weight = _weights(_value_of(_whole_key(key, BITS)), row_max, scale, min_p)
        needed = tl.minimum((target - above) / tl.maximum(weight, 1e-30), 1e9).to(tl.int32) + 1
        quota = tl.where(key == top_k_key, tl.minimum(needed, quota), needed)
    if min_p > 0:
        lowest = tl.full([BLOCK], 0xFFFFFFFF, tl.uint32)
        for start in range(0, vocab_size, BLOCK):
            _ids, x, keys = _block_keys(base, start, vocab_size, BITS, BLOCK)
            lowest = tl.minimum(lowest, tl.where(_weights(x, row_max, scale, min_p) > 0, keys, 0xFFFFFFFF))
        min_p_key = tl.min(lowest, 0)
        quota = tl.where(min_p_key > key, _ALL, quota)
        key = tl.maximum(min_p_key, key)

    cut_id = quota * 0 + vocab_size
    start = quota * 0
    if quota < _ALL:
        # Kept tokens at the key end where the quota does: in the block in which it is used up.
        while (start < vocab_size) & (quota > 0):
            ids, _x, keys = _block_keys(base, start, vocab_size, BITS, BLOCK)
            ties = ((keys == key) & (ids < vocab_size)).to(tl.int32)
            found = tl.sum(ties, 0)
            if found >= quota:
                last = (tl.cumsum(ties, 0) == quota) & (ties > 0)
                cut_id = tl.min(tl.where(last, ids, _ALL - 1), 0) + 1
            quota -= found
            start += BLOCK
    tl.store(cut_keys + row, _whole_key(key, BITS).to(tl.int32, bitcast=True))
    tl.store(cut_ids + row, cut_id)


def truncation_cuts(logits: Tensor, source_rows: Tensor, row_slots: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
    """What each of n rows keeps: tokens whose key is above the cut's, and those at it with an id below the cut's.

    logits: [*, V], bfloat16, float16 or float32; row i is logits[source_rows[i]] with the parameters of
    params[row_slots[i]], int32 [num_slots, NUM_PARAMS]. The order is that of the CPU sampler: min_p by probability
    relative to the largest, the top_k largest (equal ones by ascending id), of these the smallest set that reaches
    top_p of their probability. Returns the cuts' keys and ids, int32 [n] each, for `redraw_tokens`. Rows without
    truncation, or with temperature 0, keep everything.
    """
    num_rows = row_slots.shape[0]
    # An even distance: Triton compiles a kernel anew for a pointer that is not at a multiple of 16 bytes.
    cuts = torch.empty(2, -(-num_rows // 4) * 4, dtype=torch.int32, device=logits.device)
    cut_keys, cut_ids = cuts[:, :num_rows].unbind(0)
    _cuts_kernel[(num_rows,)](
        logits, source_rows, row_slots, params, cut_keys, cut_ids, logits.stride(0), logits.shape[1],
        BITS=16 if logits.dtype == torch.bfloat16 else 32, BLOCK=_BLOCK, num_warps=16,
    )  # fmt: skip
    return cut_keys, cut_ids
