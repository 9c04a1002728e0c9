"""A step's inputs, made on the device from one buffer of int32 words that the host filled.

Counts and offsets change with every step, so none of them may specialise a kernel: each compiles once.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from octavo.kernels.triton.launch import _after_previous, _cdiv, _launch, _overlap, _power_of_two

_WORDS = 1024  # words that a program of apply_diff copies
_TOKENS = 128  # tokens that a program of build_inputs serves
_COLUMNS = 1024  # elements that a program of gather_last copies


@triton.jit(
    do_not_specialize=[
        "token_segments_at",
        "num_segments",
        "longest",
        "block_entries_at",
        "num_block_entries",
        "params_at",
        "num_params",
    ]
)
def _apply_diff_kernel(
    packed_ptr,
    token_ids_ptr,
    block_tables_ptr,
    params_ptr,
    token_segments_at,
    num_segments,
    longest,
    block_entries_at,
    num_block_entries,
    params_at,
    num_params,
    token_ids_stride,
    block_tables_stride,
    PARAMS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The first programs copy token segments, chunk by chunk of each, the next ones block entries, the last params."""
    program = tl.program_id(0)
    lanes = tl.arange(0, BLOCK)
    chunks = (longest + BLOCK - 1) // BLOCK
    first_block_program = num_segments * chunks
    first_params_program = first_block_program + (num_block_entries + BLOCK - 1) // BLOCK
    if program < first_block_program:
        segment_ptr = packed_ptr + token_segments_at + (program // chunks) * 4
        row_ptr = token_ids_ptr + tl.load(segment_ptr).to(tl.int64) * token_ids_stride
        position = tl.load(segment_ptr + 1)
        count = tl.load(segment_ptr + 2)
        source = tl.load(segment_ptr + 3)
        index = (program % chunks) * BLOCK + lanes
        mask = index < count
        ids = tl.load(packed_ptr + source + index, mask=mask, other=0)
        tl.store(row_ptr + position + index, ids, mask=mask)
    elif program < first_params_program:
        index = (program - first_block_program) * BLOCK + lanes
        mask = index < num_block_entries
        entry_ptr = packed_ptr + block_entries_at + index * 3
        slot = tl.load(entry_ptr, mask=mask, other=0).to(tl.int64)
        column = tl.load(entry_ptr + 1, mask=mask, other=0)
        block = tl.load(entry_ptr + 2, mask=mask, other=0)
        tl.store(block_tables_ptr + slot * block_tables_stride + column, block, mask=mask)
    else:
        index = (program - first_params_program) * BLOCK + lanes
        mask = index < num_params * PARAMS
        entry_ptr = packed_ptr + params_at + (index // PARAMS) * (1 + PARAMS)
        slot = tl.load(entry_ptr, mask=mask, other=0).to(tl.int64)
        word = tl.load(entry_ptr + 1 + index % PARAMS, mask=mask, other=0)
        tl.store(params_ptr + slot * PARAMS + index % PARAMS, word, mask=mask)


# A draft head reads the table from its second column on.
@triton.jit(
    do_not_specialize=["num_tokens", "num_rows", "num_halvings"], do_not_specialize_on_alignment=["token_ids_ptr"]
)
def _build_inputs_kernel(
    row_slots_ptr,
    starts_ptr,
    cu_q_ptr,
    token_ids_ptr,
    block_tables_ptr,
    input_ids_ptr,
    positions_ptr,
    slot_mapping_ptr,
    num_tokens,
    num_rows,
    num_halvings,
    token_ids_stride,
    block_tables_stride,
    BLOCK_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """num_halvings: bits of num_rows + 1, enough to search cu_q [num_rows + 1]."""
    _after_previous(OVERLAP)
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    in_range = token < num_tokens
    # The first entry of cu_q past the token's index; rows without tokens are stepped over. It stays in [low, high].
    low = tl.zeros((BLOCK,), tl.int32)
    high = tl.zeros((BLOCK,), tl.int32) + num_rows + 1
    for _ in range(num_halvings):
        middle = (low + high) // 2
        searching = low < high
        before = searching & (tl.load(cu_q_ptr + middle, mask=searching, other=0) <= token)
        low = tl.where(before, middle + 1, low)
        high = tl.where(before, high, middle)
    row = low - 1  # num_rows where no row has the token
    has_row = in_range & (row >= 0) & (row < num_rows)
    slot = tl.load(row_slots_ptr + row, mask=has_row, other=-1)
    real = has_row & (slot >= 0)
    slot = tl.where(real, slot, 0).to(tl.int64)
    start = tl.load(starts_ptr + row, mask=real, other=0)
    begin = tl.load(cu_q_ptr + row, mask=real, other=0)
    position = tl.where(real, start + token - begin, 0)
    input_id = tl.load(token_ids_ptr + slot * token_ids_stride + position, mask=real, other=0)
    block = tl.load(block_tables_ptr + slot * block_tables_stride + position // BLOCK_SIZE, mask=real, other=0)
    # Tokens of no row are spread over block 0, which nobody reads.
    offset = tl.where(real, position, token) % BLOCK_SIZE
    tl.store(input_ids_ptr + token, input_id, mask=in_range)
    tl.store(positions_ptr + token, position.to(tl.int64), mask=in_range)
    tl.store(slot_mapping_ptr + token, block.to(tl.int64) * BLOCK_SIZE + offset, mask=in_range)


@triton.jit
def _gather_last_kernel(hidden_ptr, cu_q_ptr, out_ptr, SIZE: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr):
    """One program for BLOCK elements of a row."""
    _after_previous(OVERLAP)
    chunks: tl.constexpr = (SIZE + BLOCK - 1) // BLOCK
    row = tl.program_id(0) // chunks
    offsets = (tl.program_id(0) % chunks) * BLOCK + tl.arange(0, BLOCK)
    begin = tl.load(cu_q_ptr + row)
    end = tl.load(cu_q_ptr + row + 1)
    size = tl.where(end > begin, SIZE, 0)
    values = tl.load(hidden_ptr + (end - 1).to(tl.int64) * SIZE + offsets, mask=offsets < size, other=0.0)
    tl.store(out_ptr + row.to(tl.int64) * SIZE + offsets, values, mask=offsets < SIZE)


def apply_diff(
    packed: Tensor,
    token_segments_at: int,
    num_segments: int,
    longest: int,
    block_entries_at: int,
    num_block_entries: int,
    params_at: int,
    num_params: int,
    token_ids: Tensor,
    block_tables: Tensor,
    params: Tensor,
) -> None:
    """Write what a step changes of the slots' state, in one launch; none where there is nothing.

    packed: int32 [words]; the *_at are indices of words in it, where entries follow each other:
        num_segments token segments of 4 words: slot, position, count, index in packed of its `count` token ids;
        num_block_entries of 3: slot, index in the slot's table, block id;
        num_params of 1 + P: slot, then P words (floats by their bits).
    longest: the largest count of a segment. No two entries may write to one place.
    token_ids: int32 [num_slots, max_len]; block_tables: int32 [num_slots, max_blocks]; params: int32 [num_slots, P],
        contiguous. All three are written.
    """
    programs = num_segments * _cdiv(longest, _WORDS) + _cdiv(num_block_entries, _WORDS)
    programs += _cdiv(num_params * params.shape[1], _WORDS)
    if programs == 0:
        return
    _apply_diff_kernel[(programs,)](
        packed,
        token_ids,
        block_tables,
        params,
        token_segments_at,
        num_segments,
        longest,
        block_entries_at,
        num_block_entries,
        params_at,
        num_params,
        token_ids.stride(0),
        block_tables.stride(0),
        PARAMS=params.shape[1],
        BLOCK=_WORDS,
        num_warps=4,
    )


def build_inputs(
    row_slots: Tensor,
    starts: Tensor,
    cu_q: Tensor,
    token_ids: Tensor,
    block_tables: Tensor,
    block_size: int,
    input_ids: Tensor,
    positions: Tensor,
    slot_mapping: Tensor,
) -> None:
    """Fill the inputs of a step of T tokens and R rows, padding included. The launch depends on shapes alone.

    row_slots: int32 [R], -1 for a padding row. starts: int32 [R], tokens before the step. cu_q: int32 [>= R + 1], from
        0, not decreasing; row r has the tokens [cu_q[r], cu_q[r + 1]).
    token_ids: int32 [num_slots, max_len]; block_tables: int32 [num_slots, max_blocks].
    input_ids: int32 [T], positions: int64 [T], slot_mapping: int64 [T] are written. Token t of row r has the position
        starts[r] + t - cu_q[r] of the row's slot. Tokens of no row, or of a padding row, get id 0, position 0 and
        slot t % block_size, in block 0.
    """
    num_tokens, num_rows = len(input_ids), len(row_slots)
    _build_inputs_kernel[(_cdiv(num_tokens, _TOKENS),)](
        row_slots,
        starts,
        cu_q,
        token_ids,
        block_tables,
        input_ids,
        positions,
        slot_mapping,
        num_tokens,
        num_rows,
        (num_rows + 1).bit_length(),
        token_ids.stride(0),
        block_tables.stride(0),
        BLOCK_SIZE=block_size,
        BLOCK=_TOKENS,
        num_warps=4,
        **_overlap(cu_q),
    )


def gather_last(hidden: Tensor, cu_q: Tensor, out: Tensor) -> Tensor:
    """The last token's row of every sequence: out[r] = hidden[cu_q[r + 1] - 1]; rows without tokens, which are
    padding, are 0.

    hidden: [T, size], contiguous; cu_q: int32 [>= R + 1]; out: [R, size], contiguous, of hidden's dtype; it is
    written, and returned.
    """
    num_rows, size = out.shape
    block = min(_COLUMNS, _power_of_two(size))
    programs = num_rows * _cdiv(size, block)
    _launch(_gather_last_kernel, programs, (hidden, cu_q, out), (), (size, block), 4)
    return out
