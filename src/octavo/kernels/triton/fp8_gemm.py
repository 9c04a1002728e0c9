"""Products of FP8 tokens by an FP8 weight on the FP8 tensor cores (W8A8), for steps of 9 to 384 tokens.

The weight is the left operand: its rows fill the 64 rows that a Hopper warp group multiplies at once, and all tokens,
or half of them, are the other side of a tile, so that each weight is read once or twice. Tiles come by the bulk copy
engine (tensor descriptors). Where a weight has few rows, K is split as in `skinny_gemm`: the same input gives the same
bits.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from octavo.kernels.triton.fp8 import FP8_MAX_M
from octavo.kernels.triton.launch import _after_previous, _cdiv, _launch_compiled
from octavo.kernels.triton.skinny_gemm import _NUM_SMS, _WORKSPACE_FLOATS, _reduce, _workspace

_SHARED_BYTES = 226 << 10  # for one program of a multiprocessor
# rows, tokens, more, of weights that have no more tiles than there are multiprocessors: the smaller first.
_TILES = (64, 32, 0), (64, 64, 0), (64, 128, 0), (64, 128, 64), (128, 128, 0), (128, 128, 64)


@cache
def _suits(device: torch.device) -> bool:
    """Whether the device has the memory that the plans count on. A CPU interprets any."""
    if device.type != "cuda":
        return True
    found = torch.cuda.get_device_properties(device)
    return found.major >= 9 and found.shared_memory_per_block_optin > _SHARED_BYTES


class Fp8Plan(NamedTuple):
    """How a product is cut up: a tile has so many rows of the weight and tokens + more tokens (more: 0, or a second
    product beside the first, for numbers between two powers of two)."""

    rows: int
    tokens: int
    more: int = 0
    block_k: int = 128
    split_k: int = 1
    num_warps: int = 4
    num_stages: int = 4

    @classmethod
    def of(cls, m: int, n: int, k: int, device: torch.device) -> Fp8Plan | None:
        """The plan for x [m, k] by a weight [n, k]; None where torch._scaled_mm is as fast or faster, and for sizes
        that `linear_fp8` does not take.

        Up to 132 tiles of a weight: one program for every multiprocessor, the smallest tiles that allow it, as many
        stages as the shared memory holds. Of weights with more rows only those are multiplied here whose number of
        tokens suits no tile of the library. Measured on an H200 by benchmarks/gpu/kernel_fp8.py.
        """
        takes = m <= FP8_MAX_M and n % 16 == 0 and k % 16 == 0
        return _plan(m, n, k) if takes and _suits(device) else None


# The plan, for so many tokens, of weights with more tiles than there are multiprocessors and at least so many rows.
_MANY_ROWS = (
    (Fp8Plan(128, 32, 0, 256, 1, 4, 5), range(1, 33), 0),
    (Fp8Plan(128, 64, 0, 256, 1, 4, 4), range(33, 65), 128 * _NUM_SMS),
    (Fp8Plan(128, 128, 64, 128, 1, 8, 5), range(129, 193), 0),
)


@cache
def _plan(m: int, n: int, k: int) -> Fp8Plan | None:
    if _cdiv(n, 64) > _NUM_SMS:
        return next((plan for plan, tokens, rows in _MANY_ROWS if m in tokens and n >= rows), None)
    for rows, tokens, more in _TILES:
        programs = _cdiv(n, rows) * _cdiv(m, tokens + more)
        if programs <= _NUM_SMS and tokens >= min(m, 64):
            block_k = 256 if tokens <= 64 else 128
            num_stages = min(8, _SHARED_BYTES // ((rows + tokens + more) * block_k))
            split_k = max(1, min(_NUM_SMS // (programs + programs // 2), k // (4 * block_k)))
            num_warps = 4 if rows * (tokens + more) <= 128 * 128 else 8
            return Fp8Plan(rows, tokens, more, block_k, split_k, num_warps, num_stages)
    return None


@triton.jit
def _finish_tokens(
    acc,  # float32 [ROWS, tokens]
    row,  # of the weight, [ROWS, 1]
    token,  # [1, tokens]
    tile,  # of the counters
    split,
    x_scale_ptr,
    w_scale_ptr,
    bias_ptr,
    out_ptr,
    partial_ptr,
    counter_ptr,
    M,
    N,
    SPLIT_K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """Add up the splits, scale, add the bias, round once, store."""
    mask = (row < N) & (token < M)
    complete = True
    if SPLIT_K > 1:
        complete, acc = _reduce(acc, tile, split, M, token, row, N, partial_ptr, counter_ptr, mask, SPLIT_K)
    if complete:
        scales = tl.load(w_scale_ptr + row, mask=row < N, other=0.0)
        acc = acc * tl.load(x_scale_ptr + token, mask=token < M, other=0.0) * scales
        if HAS_BIAS:
            acc += tl.load(bias_ptr + row, mask=row < N, other=0.0).to(tl.float32)
        tl.store(out_ptr + token.to(tl.int64) * N + row, acc.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["M", "N16", "K"])
def _linear_fp8_kernel(
    x,  # descriptor of float8e4nv [M, K], blocks of [TOKENS, BLOCK_K]
    x_more,  # the same in blocks of [MORE, BLOCK_K]; not read where MORE is 0
    w,  # descriptor of float8e4nv [N, K], blocks of [ROWS, BLOCK_K]
    x_scale_ptr,  # float32 [M]
    w_scale_ptr,  # float32 [N]
    bias_ptr,  # [N] if HAS_BIAS
    out_ptr,  # [M, N], contiguous
    partial_ptr,  # as in _reduce, if SPLIT_K > 1
    counter_ptr,
    M,
    N16,  # N / 16
    K,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    MORE: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    STAGES: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Program (tile, split): a tile of the product over this split's share of K. Tiles of the same rows of the weight
    are neighbours. What lies outside of x and of the weight is read as 0."""
    tile, split, N = tl.program_id(0), tl.program_id(1), N16 * 16
    steps = tl.cdiv(K, BLOCK_K)
    share = tl.cdiv(steps, SPLIT_K)
    first, last = split * share, tl.minimum(steps, (split + 1) * share)
    token_tiles = tl.cdiv(M, TOKENS + MORE)
    first_row, first_token = tile // token_tiles * ROWS, tile % token_tiles * (TOKENS + MORE)
    _after_previous(OVERLAP, FILLS=True)
    acc = tl.zeros((ROWS, TOKENS), tl.float32)
    if MORE:
        acc_more = tl.zeros((ROWS, MORE), tl.float32)
    for step in tl.range(first, last, num_stages=STAGES):
        weight = w.load([first_row, step * BLOCK_K])
        acc = tl.dot(weight, tl.trans(x.load([first_token, step * BLOCK_K])), acc)
        if MORE:
            acc_more = tl.dot(weight, tl.trans(x_more.load([first_token + TOKENS, step * BLOCK_K])), acc_more)
    row = (first_row + tl.arange(0, ROWS))[:, None]
    token = (first_token + tl.arange(0, TOKENS))[None, :]
    _finish_tokens(
        acc, row, token, 2 * tile, split, x_scale_ptr, w_scale_ptr, bias_ptr, out_ptr, partial_ptr, counter_ptr, M, N,
        SPLIT_K, HAS_BIAS,
    )  # fmt: skip
    if MORE:
        token = (first_token + TOKENS + tl.arange(0, MORE))[None, :]
        _finish_tokens(
            acc_more, row, token, 2 * tile + 1, split, x_scale_ptr, w_scale_ptr, bias_ptr, out_ptr, partial_ptr,
            counter_ptr, M, N, SPLIT_K, HAS_BIAS,
        )  # fmt: skip


def linear_fp8(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
    *,
    plan: Fp8Plan,
) -> Tensor:
    """(x x_scale) (weight weight_scale)ᵀ + bias, accumulated in float32 and rounded once: [M, N] of dtype.

    x: float8_e4m3fn [M, K]; x_scale: float32 [M, 1], as `quantize_fp8` makes them; weight: float8_e4m3fn [N, K];
    weight_scale: float32 [N]; bias: [N]. All contiguous, K and N multiples of 16. plan: as `Fp8Plan.of` has it. One
    product at a time on a device, as for `skinny_linear`. Raises ValueError for shapes or dtypes that do not fit.
    """
    (m, k), n = x.shape, len(weight)
    if x.dtype != torch.float8_e4m3fn or weight.dtype != x.dtype or weight.shape[1] != k or k % 16 or n % 16:
        raise ValueError(
            f"x is {x.dtype} {list(x.shape)} and weight {weight.dtype} {list(weight.shape)}; expected float8_e4m3fn "
            "[M, K] and [N, K], K and N multiples of 16"
        )
    if x_scale.numel() != m or weight_scale.numel() != n:
        raise ValueError(f"scales of {x_scale.numel()} tokens and {weight_scale.numel()} rows; expected {m} and {n}")
    out = torch.empty(m, n, dtype=dtype, device=x.device)
    rows, tokens, more, block_k, split_k, num_warps, num_stages = plan
    tiles = _cdiv(n, rows) * _cdiv(m, tokens + more)
    split_k = max(1, min(split_k, _cdiv(k, block_k), _WORKSPACE_FLOATS // (m * n)))  # of few tiles alone
    partial, counters = _workspace(x.device) if split_k > 1 else (out, out)  # out: not read
    rows_read = _cdiv(m, tokens + more) * (tokens + more)
    # Reading past the last row is slow, and needless where there is memory: those columns of a tile are not stored.
    if x.untyped_storage().nbytes() - x.storage_offset() >= rows_read * k:
        x = x.as_strided((rows_read, k), (k, 1))
    x_blocks = TensorDescriptor.from_tensor(x, [tokens, block_k])
    x_more = TensorDescriptor.from_tensor(x, [more, block_k]) if more else x_blocks
    w_blocks = TensorDescriptor.from_tensor(weight, [rows, block_k])
    has_bias = bias is not None
    added = out if bias is None else bias  # out: not read
    pointers = x_scale, weight_scale, added, out, partial, counters
    aligned = (x_scale.data_ptr() | weight_scale.data_ptr() | added.data_ptr()) % 16 == 0
    constants = rows, tokens, more, block_k, split_k, has_bias, num_stages
    _launch_compiled(
        ("linear_fp8", x.get_device(), dtype, added.dtype, aligned, constants, num_warps),
        _linear_fp8_kernel,
        (tiles, split_k, 1),
        (x_blocks, x_more, w_blocks, *pointers, m, n // 16, k, *constants),
        x,
        num_warps=num_warps,
        num_stages=num_stages,
    )
    return out
