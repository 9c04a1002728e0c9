"""Drawing tokens from logits: argmax at temperature 0, else Gumbel-max with random numbers by counter.

Token t of a row is drawn where x_t - T * log(E_t) is largest; the E_t are independent exponential variates, so t comes
with probability softmax(x / T)_t (Gumbel-max, also known as the exponential race; Maddison, Tarlow, Minka 2014). No
sum over the row is needed, and the division by T is avoided, so no temperature can overflow. E_t is a hash of (the
request's stream, the token's position, t): a draw is a function of the row's own logits, parameters and position.

A row's parameters are one record of NUM_PARAMS int32 words, floats by their bits; the words are named below.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.kernels.triton.launch import _after_previous, _cdiv, _overlap, _power_of_two

NUM_PARAMS = 16
TEMPERATURE, TOP_P, MIN_P, TOP_K, REPETITION, FREQUENCY, PRESENCE = range(7)
STREAM_LOW, STREAM_HIGH, NUM_PROMPT_TOKENS, MIN_TOKENS, FLAGS, NUM_LOGPROBS, PENALTY_ROW = range(7, 14)

_BLOCK = 1024
# A launch aims at this many programs: 32 for each of a large chip's 132 multiprocessors.
PROGRAMS = 132 * 32
_MAX_SPLITS = 256

_WORDS = tl.constexpr(NUM_PARAMS)
_TEMPERATURE = tl.constexpr(TEMPERATURE)
_STREAM_LOW = tl.constexpr(STREAM_LOW)
_STREAM_HIGH = tl.constexpr(STREAM_HIGH)
_PENALTY_ROW = tl.constexpr(PENALTY_ROW)
_NO_ID = tl.constexpr(2**31 - 1)
_GOLDEN = tl.constexpr(0x9E3779B9)
# The multipliers of the 32-bit hash of Wellons' search ("prospector", 2018), two rounds.
_MULTIPLIER_0 = tl.constexpr(0x21F0AAAD)
_MULTIPLIER_1 = tl.constexpr(0x735A2D97)
# v in [0, 2**32) -> u = v * (1 - 2**-24) / 2**32 + 2**-33: above 0 and, rounded to float32, at most 1 - 2**-24.
_TO_UNIT = tl.constexpr((1 - 2.0**-24) * 2.0**-32)
_HALF_STEP = tl.constexpr(2.0**-33)
_LOG2_E = tl.constexpr(1.4426950408889634)
_LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _mixed(state):
    state ^= state >> 16
    state *= _MULTIPLIER_0
    state ^= state >> 15
    state *= _MULTIPLIER_1
    return state ^ (state >> 15)


# Triton's interpreter, which tests use where there is no GPU, has no assembly.
_INTERPRETED = tl.constexpr(not isinstance(_mixed, triton.JITFunction))


@triton.jit
def _fast_log2(x):
    """One instruction, where tl.log2 is a polynomial of 14: its error is at most 2**-22, plus 2**-22 of the result."""
    if _INTERPRETED:
        return tl.log2(x)
    else:  # noqa: RET505
        return tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)


@triton.jit
def _row_keys(record, position):
    """Two uint32 keys, a bijection of the two words of the stream at every position."""
    low = tl.load(record + _STREAM_LOW).to(tl.uint32, bitcast=True)
    high = tl.load(record + _STREAM_HIGH).to(tl.uint32, bitcast=True)
    at = _mixed(low + position.to(tl.uint32) * _GOLDEN)
    return _mixed(high + at), _mixed(at + _GOLDEN)


@triton.jit
def _log2_exponential(ids, key_0, key_1):
    """log2 of -log2(1 - u): of an exponential variate, up to a constant that is the same for every token.

    1 - u has no bits for small u, where the draws of unlikely tokens are decided: there the logarithm's series is
    used. Its first term left out is 1.2e-7 of the result.
    """
    state = ids.to(tl.uint32) + key_0
    state ^= state >> 16
    state *= _MULTIPLIER_0
    state += key_1
    state ^= state >> 15
    state *= _MULTIPLIER_1
    state ^= state >> 15
    u = state.to(tl.float32) * _TO_UNIT + _HALF_STEP
    series = u * (_LOG2_E + u * (_LOG2_E / 2 + u * (_LOG2_E / 3)))
    return _fast_log2(tl.where(u < 1 / 128, series, -_fast_log2(1.0 - u)))


@triton.jit
def _ordered_key(x):
    """uint32 keys that ascend with the float32 values; -0.0 and 0.0 have the same."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.uint32, bitcast=True) ^ 0x80000000


# Their pointers' alignment is of no use, and the callers' buffers have any: one compilation serves them all.
_BY_ROW = ["source_rows", "target_rows", "row_slots", "positions", "samples", "cut_keys", "cut_ids", "out"]


@triton.jit(do_not_specialize=["blocks_per_split"], do_not_specialize_on_alignment=_BY_ROW)
def _best_of_split_kernel(
    logits,  # [*, vocab_size], rows logits_stride apart
    source_rows,  # int32 [R]: the row of logits; read where GATHERED, else row r's is r
    row_slots,  # int32 [R], -1 for padding
    positions,  # int32 [R]
    samples,  # int32 [R], 0: nothing is drawn; read where not GATHERED
    records,  # int32 [num_slots, _WORDS]
    cut_keys,  # int32 [R], bits of ordered keys; read where TRUNCATED
    cut_ids,  # int32 [R]
    partial,  # int32 [3, R, splits]: bits of the best score, its id, whether a logit was NaN or +inf
    logits_stride,
    vocab_size,
    blocks_per_split,
    GATHERED: tl.constexpr,
    TRUNCATED: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    _after_previous(OVERLAP)
    row = tl.program_id(0)
    slot = tl.load(row_slots + row)
    if slot < 0:
        return
    source = row
    if GATHERED:
        source = tl.load(source_rows + row)
    else:
        if tl.load(samples + row) == 0:
            return
    record = records + slot * _WORDS
    temperature = tl.load(record + _TEMPERATURE).to(tl.float32, bitcast=True)
    key_0, key_1 = _row_keys(record, tl.load(positions + row))
    if TRUNCATED:
        cut_key = tl.load(cut_keys + row).to(tl.uint32, bitcast=True)
        cut_id = tl.load(cut_ids + row)
    base = logits + source.to(tl.int64) * logits_stride
    begin = tl.program_id(1) * blocks_per_split * BLOCK
    end = tl.minimum(begin + blocks_per_split * BLOCK, vocab_size)
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    best_id = tl.full([BLOCK], _NO_ID, tl.int32)
    bad = tl.zeros([BLOCK], tl.int32)
    for start in range(begin, end, BLOCK):
        ids = start + tl.arange(0, BLOCK)
        x = tl.load(base + ids, mask=ids < vocab_size, other=float("-inf")).to(tl.float32)
        bad = tl.where(x < float("inf"), bad, 1)
        if TRUNCATED:
            key = _ordered_key(x)
            x = tl.where((key > cut_key) | ((key == cut_key) & (ids < cut_id)), x, float("-inf"))
        if temperature > 0:
            x = tl.fma(_log2_exponential(ids, key_0, key_1), -temperature * _LN_2, x)
        better = x > best  # ids ascend in a lane, so the first of equals stays
        best = tl.where(better, x, best)
        best_id = tl.where(better, ids, best_id)
    value = tl.max(best, 0)
    plane = tl.num_programs(0) * tl.num_programs(1)
    at = partial + row * tl.num_programs(1) + tl.program_id(1)
    tl.store(at, value.to(tl.int32, bitcast=True))
    tl.store(at + plane, tl.min(tl.where(best == value, best_id, _NO_ID), 0))
    tl.store(at + 2 * plane, tl.max(bad, 0))


@triton.jit(do_not_specialize=["splits"], do_not_specialize_on_alignment=_BY_ROW)
def _best_of_row_kernel(
    partial,  # as above
    target_rows,  # int32 [R]: the row of out; read where GATHERED
    row_slots,
    positions,
    samples,
    records,
    token_ids_table,  # int32 [num_slots, table_stride]
    out,  # int32 [*, 2]: token, bad
    seen,  # int32 [*, vocab_size], see count_tokens; where GATHERED
    table_stride,
    vocab_size,
    splits,
    GATHERED: tl.constexpr,
    SPLITS: tl.constexpr,  # splits, rounded up to a power of two
    OVERLAP: tl.constexpr,
):
    _after_previous(OVERLAP)
    row = tl.program_id(0)
    slot = tl.load(row_slots + row)
    draws = slot >= 0
    target = row
    if GATHERED:
        target = tl.load(target_rows + row)
    else:
        draws = draws & (tl.load(samples + row) != 0)
    token = 0
    bad = 0
    if draws:
        split = tl.arange(0, SPLITS)
        mask = split < splits
        plane = tl.num_programs(0) * splits
        at = partial + row * splits + split
        best = tl.load(at, mask=mask, other=0).to(tl.float32, bitcast=True)
        best = tl.where(mask, best, float("-inf"))
        ids = tl.load(at + plane, mask=mask, other=_NO_ID)
        value = tl.max(best, 0)
        bad = tl.max(tl.load(at + 2 * plane, mask=mask, other=0), 0)
        bad = tl.where((value == float("-inf")) & (bad == 0), 2 if GATHERED else 1, bad)
        if GATHERED:
            before = tl.load(out + target * 2 + 1)
            bad = tl.where(before != 0, before, bad)
        token = tl.where(bad != 0, 0, tl.min(tl.where(best == value, ids, _NO_ID), 0))
        position = tl.load(positions + row)
        tl.store(token_ids_table + slot.to(tl.int64) * table_stride + position, token)
        if GATHERED:
            penalty_row = tl.load(records + slot * _WORDS + _PENALTY_ROW)
            if penalty_row >= 0:
                count = seen + penalty_row.to(tl.int64) * vocab_size + token
                tl.store(count, tl.load(count) + 2)
    tl.store(out + target * 2, token)
    tl.store(out + target * 2 + 1, bad)


def _split(num_rows: int, vocab_size: int, programs: int) -> tuple[int, int]:
    """Splits of a row, and the blocks of each: `programs` in all, but a block at least to each, none without."""
    blocks = _cdiv(vocab_size, _BLOCK)
    wanted = max(1, min(blocks, _MAX_SPLITS, programs // num_rows))
    blocks_per_split = _cdiv(blocks, wanted)
    return _cdiv(blocks, blocks_per_split), blocks_per_split


def draw_tokens(
    logits: Tensor,
    row_slots: Tensor,
    positions: Tensor,
    params: Tensor,
    samples: Tensor,
    token_ids_table: Tensor,
    out: Tensor,
    programs: int = PROGRAMS,
) -> None:
    """Draw one token for each row that samples. Two launches; nothing waits, so a CUDA graph can hold it.

    logits: [R, V], bfloat16, float16 or float32, rows any distance apart. row_slots: int32 [R], -1 for padding rows.
    positions: int32 [R], of the token being drawn in its sequence. params: int32 [num_slots, NUM_PARAMS].
    samples: int32 [R], 0 where the row draws nothing. programs: how many programs a launch aims at.
    Written: token_ids_table, int32 [num_slots, N], at (slot, position) of the rows that sample; out, int32 [R, 2],
    all of it: the token, and 1 where the logits hold NaN or +inf or no finite one (its token is then 0).
    """
    num_rows, vocab_size = logits.shape
    splits, blocks_per_split = _split(num_rows, vocab_size, programs)
    partial = torch.empty(3, num_rows, splits, dtype=torch.int32, device=logits.device)
    _best_of_split_kernel[(num_rows, splits)](
        logits, row_slots, row_slots, positions, samples, params, row_slots, row_slots, partial, logits.stride(0),
        vocab_size, blocks_per_split, GATHERED=False, TRUNCATED=False, BLOCK=_BLOCK, num_warps=4, **_overlap(logits),
    )  # fmt: skip
    _best_of_row_kernel[(num_rows,)](
        partial, row_slots, row_slots, positions, samples, params, token_ids_table, out, out,
        token_ids_table.stride(0), vocab_size, splits, GATHERED=False, SPLITS=_power_of_two(splits),
        num_warps=1, **_overlap(logits),
    )  # fmt: skip


def redraw_tokens(
    logits: Tensor,
    source_rows: Tensor,
    target_rows: Tensor,
    row_slots: Tensor,
    positions: Tensor,
    params: Tensor,
    cuts: tuple[Tensor, Tensor] | None,
    seen: Tensor,
    token_ids_table: Tensor,
    out: Tensor,
) -> None:
    """Draw once more for n rows, from processed or truncated logits, with the random numbers of `draw_tokens`.

    logits: [*, V]; row i draws from logits[source_rows[i]] and overwrites out[target_rows[i]], whose bad flag stays
    where it is set, and is 2 where these logits are the first that have no finite one. source_rows, target_rows,
    row_slots, positions: int32 [n]; slots >= 0 and distinct.
    cuts: what `truncation_cuts` found, or None for no truncation. seen: int32 [*, V], see `count_tokens`: the drawn
    token is counted there for the slots that have a penalty row. The rest: as for `draw_tokens`.
    """
    num_rows, vocab_size = row_slots.shape[0], logits.shape[1]
    splits, blocks_per_split = _split(num_rows, vocab_size, PROGRAMS)
    partial = torch.empty(3, num_rows, splits, dtype=torch.int32, device=logits.device)
    cut_keys, cut_ids = cuts if cuts is not None else (row_slots, row_slots)
    _best_of_split_kernel[(num_rows, splits)](
        logits, source_rows, row_slots, positions, row_slots, params, cut_keys, cut_ids, partial, logits.stride(0),
        vocab_size, blocks_per_split, GATHERED=True, TRUNCATED=cuts is not None, BLOCK=_BLOCK, num_warps=4,
        **_overlap(logits),
    )  # fmt: skip
    _best_of_row_kernel[(num_rows,)](
        partial, target_rows, row_slots, positions, row_slots, params, token_ids_table, out, seen,
        token_ids_table.stride(0), vocab_size, splits, GATHERED=True, SPLITS=_power_of_two(splits),
        num_warps=1, **_overlap(logits),
    )  # fmt: skip
