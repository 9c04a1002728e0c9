"""What some rows need around the draw: penalties, biases, token counts, log-probabilities."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.kernels.triton.launch import _cdiv
from octavo.kernels.triton.sampling import (
    FREQUENCY,
    NUM_PARAMS,
    NUM_PROMPT_TOKENS,
    PENALTY_ROW,
    PRESENCE,
    REPETITION,
)

_BLOCK = 2048
_LOGPROBS_BLOCK = 8192

_WORDS = tl.constexpr(NUM_PARAMS)
_REPETITION = tl.constexpr(REPETITION)
_FREQUENCY = tl.constexpr(FREQUENCY)
_PRESENCE = tl.constexpr(PRESENCE)
_NUM_PROMPT_TOKENS = tl.constexpr(NUM_PROMPT_TOKENS)
_PENALTY_ROW = tl.constexpr(PENALTY_ROW)
_NO_ID = tl.constexpr(2**31 - 1)


@triton.jit
def _count_kernel(
    row_slots,  # int32 [n]
    num_tokens,  # int32 [n]
    records,  # int32 [num_slots, _WORDS]
    token_ids_table,  # int32 [num_slots, table_stride]
    seen,  # int32 [*, vocab_size]
    table_stride,
    vocab_size,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    slot = tl.load(row_slots + row)
    length = tl.load(num_tokens + row)
    index = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    ids = tl.load(token_ids_table + slot.to(tl.int64) * table_stride + index, mask=index < length, other=-1)
    inside = (ids >= 0) & (ids < vocab_size)
    in_prompt = index < tl.load(records + slot * _WORDS + _NUM_PROMPT_TOKENS)
    counts = seen + tl.load(records + slot * _WORDS + _PENALTY_ROW).to(tl.int64) * vocab_size
    tl.atomic_or(counts + ids, 1, mask=inside & in_prompt)
    tl.atomic_add(counts + ids, 2, mask=inside & (index >= tl.load(records + slot * _WORDS + _NUM_PROMPT_TOKENS)))


def count_tokens(
    row_slots: Tensor, num_tokens: Tensor, longest: int, params: Tensor, token_ids_table: Tensor, seen: Tensor
) -> None:
    """Add to the zeroed rows of `seen` what the slots' sequences hold so far.

    row_slots, num_tokens: int32 [n]: the slot, and how many of its tokens count; longest: the most of them.
    token_ids_table: int32 [num_slots, N]. seen: int32 [*, V], one row a penalized slot (PENALTY_ROW of its record):
    bit 0 is set for tokens of the prompt, the bits above count those of the output.
    """
    _count_kernel[(row_slots.shape[0], _cdiv(longest, _BLOCK))](
        row_slots, num_tokens, params, token_ids_table, seen, token_ids_table.stride(0), seen.shape[1], BLOCK=_BLOCK
    )


@triton.jit
def _penalize_kernel(
    source,  # [*, vocab_size]
    source_rows,  # int32 [n]
    row_slots,  # int32 [n]
    records,  # int32 [num_slots, _WORDS]
    seen,  # int32 [*, vocab_size]
    target,  # float32 [n, vocab_size]; may be the source, where source_rows[i] is i
    source_stride,
    vocab_size,
    PENALIZED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    ids = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = ids < vocab_size
    x = tl.load(source + tl.load(source_rows + row).to(tl.int64) * source_stride + ids, mask=mask, other=0.0)
    x = x.to(tl.float32)
    if PENALIZED:
        record = records + tl.load(row_slots + row) * _WORDS
        penalty_row = tl.load(record + _PENALTY_ROW)
        if penalty_row >= 0:
            repetition = tl.load(record + _REPETITION).to(tl.float32, bitcast=True)
            frequency = tl.load(record + _FREQUENCY).to(tl.float32, bitcast=True)
            presence = tl.load(record + _PRESENCE).to(tl.float32, bitcast=True)
            found = tl.load(seen + penalty_row.to(tl.int64) * vocab_size + ids, mask=mask, other=0)
            count = found >> 1
            repeated = tl.where(x > 0, tl.div_rn(x, repetition), x * repetition)
            x = tl.where(found != 0, repeated, x)
            x -= frequency * count.to(tl.float32)
            x -= tl.where(count > 0, presence, 0.0)
    tl.store(target + row.to(tl.int64) * vocab_size + ids, x, mask=mask)


def penalize(
    source: Tensor,
    source_rows: Tensor,
    row_slots: Tensor,
    params: Tensor,
    seen: Tensor | None,
    target: Tensor,
) -> None:
    """target[i] = source[source_rows[i]] in float32, with the penalties of its slot.

    Repetition (Keskar et al. 2019): logits of tokens of prompt or output are divided by it where positive, else
    multiplied. Frequency and presence: subtracted, by count and fact, over the output. source: [*, V];
    source_rows, row_slots: int32 [n]; params: int32 [num_slots, NUM_PARAMS]; seen: see `count_tokens`, or None for
    no penalties; target: float32 [n, V], contiguous. It may be the source itself, where source_rows is 0..n-1.
    """
    num_rows, vocab_size = target.shape
    _penalize_kernel[(num_rows, _cdiv(vocab_size, _BLOCK))](
        source, source_rows, row_slots, params, row_slots if seen is None else seen, target, source.stride(0),
        vocab_size, PENALIZED=seen is not None, BLOCK=_BLOCK, num_warps=8,
    )  # fmt: skip


@triton.jit
def _bias_kernel(
    logits,  # float32 [n, vocab_size]
    offsets,  # int32 [n + 1]
    ids,  # int32 [offsets[n]]
    values,  # float32 [offsets[n]]
    vocab_size,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    end = tl.load(offsets + row + 1)
    base = logits + row.to(tl.int64) * vocab_size
    for start in range(tl.load(offsets + row), end, BLOCK):
        index = start + tl.arange(0, BLOCK)
        mask = index < end
        at = base + tl.load(ids + index, mask=mask, other=0)
        tl.store(at, tl.load(at, mask=mask, other=0.0) + tl.load(values + index, mask=mask, other=0.0), mask=mask)


def bias_rows(logits: Tensor, offsets: Tensor, ids: Tensor, values: Tensor) -> None:
    """Add values[j] to logits[i, ids[j]] for j in [offsets[i], offsets[i + 1]), in place; -inf bars a token.

    logits: float32 [n, V], contiguous. offsets: int32 [n + 1]. ids: int32, those of a row distinct; values: float32.
    """
    _bias_kernel[(logits.shape[0],)](logits, offsets, ids, values, logits.shape[1], BLOCK=128)


@triton.jit(do_not_specialize=["num"])
def _logprobs_kernel(
    logits,  # [*, vocab_size]
    rows,  # int32 [n]
    tokens,  # int32 [*], tokens_stride apart, by row of logits
    out,  # int32 [n, 3 + 2 * num]: rank, 1 + num ids, 1 + num float32 bits
    logits_stride,
    tokens_stride,
    vocab_size,
    num,
    BLOCK: tl.constexpr,
):
    row = tl.load(rows + tl.program_id(0)).to(tl.int64)
    base = logits + row * logits_stride
    token = tl.load(tokens + row * tokens_stride)
    own = tl.load(base + token).to(tl.float32)
    record = out + tl.program_id(0).to(tl.int64) * (3 + 2 * num)
    largest = tl.full([BLOCK], float("-inf"), tl.float32)
    ranks = tl.zeros([BLOCK], tl.int32)
    for start in range(0, vocab_size, BLOCK):
        ids = start + tl.arange(0, BLOCK)
        x = tl.load(base + ids, mask=ids < vocab_size, other=float("-inf")).to(tl.float32)
        largest = tl.maximum(largest, x)
        ranks += (x > own).to(tl.int32)
    row_max = tl.max(largest, 0)
    sums = tl.zeros([BLOCK], tl.float32)
    for start in range(0, vocab_size, BLOCK):
        ids = start + tl.arange(0, BLOCK)
        x = tl.load(base + ids, mask=ids < vocab_size, other=float("-inf")).to(tl.float32)
        sums += tl.exp(x - row_max)
    log_sum = tl.log(tl.sum(sums, 0))
    tl.store(record, tl.sum(ranks, 0) + 1)
    tl.store(record + 1, token)
    tl.store(record + 2 + num, tl.minimum(own - row_max - log_sum, 0.0).to(tl.int32, bitcast=True))
    # The next alternative is the first of the largest among those that come after the last one.
    last = row_max
    last_id = token * 0 - 1
    for index in range(num):
        best = tl.full([BLOCK], float("-inf"), tl.float32)
        best_id = tl.full([BLOCK], _NO_ID, tl.int32)
        for start in range(0, vocab_size, BLOCK):
            ids = start + tl.arange(0, BLOCK)
            x = tl.load(base + ids, mask=ids < vocab_size, other=float("-inf")).to(tl.float32)
            after = (ids < vocab_size) & ((x < last) | ((x == last) & (ids > last_id)))
            better = after & ((x > best) | (best_id == _NO_ID))
            best = tl.where(better, x, best)
            best_id = tl.where(better, ids, best_id)
        last = tl.max(best, 0)
        last_id = tl.min(tl.where(best == last, best_id, _NO_ID), 0)
        tl.store(record + 2 + index, last_id)
        tl.store(record + 3 + num + index, tl.minimum(last - row_max - log_sum, 0.0).to(tl.int32, bitcast=True))


def top_logprobs(logits: Tensor, rows: Tensor, tokens: Tensor, num: int) -> Tensor:
    """Log-softmax of one token and of the most likely ones, for n rows; int32 [n, 3 + 2 * num].

    logits: [*, V], bfloat16, float16 or float32, finite or -inf. rows: int32 [n], of logits. tokens: int32 [*], by
    row of logits, any distance apart. num: 0..V alternatives, in descending order, equal ones by ascending id.
    A row of the result: the token's rank (1 + the number of more likely ones), 1 + num ids, the token's own first,
    and the bits of their 1 + num float32 log-probabilities.
    """
    out = torch.empty(rows.shape[0], 3 + 2 * num, dtype=torch.int32, device=logits.device)
    _logprobs_kernel[(rows.shape[0],)](
        logits, rows, tokens, out, logits.stride(0), tokens.stride(0), logits.shape[1], num,
        BLOCK=_LOGPROBS_BLOCK, num_warps=16,
    )  # fmt: skip
    return out
