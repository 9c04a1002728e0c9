"""What a pass begins with: its tokens' rows of the embedding table, and the angles of their positions (RoPE: Su et al.,
2021), in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.kernels.triton.launch import _after_previous, _cdiv, _launch, _power_of_two

_BLOCK = 1024  # columns of a program: few tokens are spread over several multiprocessors


@triton.jit
def _embed_and_rotate_kernel(
    input_ids_ptr,
    positions_ptr,
    table_ptr,
    frequencies_ptr,
    signed_amplitude_ptr,
    embedded_ptr,
    cos_ptr,
    sin_ptr,
    amplitude,
    SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """The first program of each token makes its angles, the others copy BLOCK columns each. BLOCK_DIM >= HEAD_DIM."""
    parts: tl.constexpr = 1 + (SIZE + BLOCK - 1) // BLOCK
    _after_previous(OVERLAP)
    token = (tl.program_id(0) // parts).to(tl.int64)
    part = tl.program_id(0) % parts
    if part == 0:
        dim = tl.arange(0, BLOCK_DIM)
        in_dim = dim < HEAD_DIM
        angles = tl.load(positions_ptr + token).to(tl.float32) * tl.load(frequencies_ptr + dim, mask=in_dim, other=0.0)
        signed = tl.load(signed_amplitude_ptr + dim, mask=in_dim, other=0.0)
        target = token * HEAD_DIM + dim
        tl.store(cos_ptr + target, (tl.cos(angles) * amplitude).to(cos_ptr.dtype.element_ty), mask=in_dim)
        tl.store(sin_ptr + target, (tl.sin(angles) * signed).to(sin_ptr.dtype.element_ty), mask=in_dim)
    else:
        column = (part - 1) * BLOCK + tl.arange(0, BLOCK)
        in_row = column < SIZE
        row = tl.load(input_ids_ptr + token).to(tl.int64)
        elements = tl.load(table_ptr + row * SIZE + column, mask=in_row)
        tl.store(embedded_ptr + token * SIZE + column, elements, mask=in_row)


def embed_and_rotate(
    input_ids: Tensor,
    positions: Tensor,
    table: Tensor,
    frequencies: Tensor,
    signed_amplitude: Tensor,
    amplitude: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The rows of T tokens, [T, H], and the cosines and signed sines of their positions, [T, 1, head_dim] each, all of
    the table's dtype: F.embedding and what RotaryEmbedding.forward makes.

    input_ids: int32 or int64 [T], each in [0, V). positions: int64 [T]. table: [V, H], contiguous. frequencies,
    signed_amplitude: float32 [head_dim]; the angles are position * frequency, taken in float32. amplitude: factor of
    the cosines.
    """
    num_tokens, size, head_dim = len(input_ids), table.shape[1], len(frequencies)
    embedded = table.new_empty(num_tokens, size)
    cos = table.new_empty(num_tokens, 1, head_dim)
    sin = torch.empty_like(cos)
    block = min(_BLOCK, _power_of_two(size))
    tensors = input_ids, positions, table, frequencies, signed_amplitude, embedded, cos, sin
    constants = size, head_dim, block, _power_of_two(head_dim)
    programs = num_tokens * (1 + _cdiv(size, block))
    _launch(_embed_and_rotate_kernel, programs, tensors, (float(amplitude),), constants, 4)
    return embedded, cos, sin
