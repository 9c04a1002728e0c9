"""SwiGLU (Shazeer, 2020) of a product to which low-rank adapters (Hu et al., 2021) are still to be added.

The product of gate and up is the widest of a layer. Adding to it in memory, only to read it again for SwiGLU, costs
more than all else that adapters do; here B's product is added to what SwiGLU has just read.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.kernels.triton.activation import _silu_times
from octavo.kernels.triton.lora import (
    _BUCKETS,
    LoraPlan,
    _add_product_of_b,
    _block_r,
    _check,
    _check_hidden,
    _ints,
    _slots_of_tile,
)

# Columns of gate, and as many of up, and warps: both sums, and a few shares of hidden, fit in registers.
_BLOCK_N, _NUM_WARPS = 128, 8


@triton.jit(
    do_not_specialize=["T", "S", "r_sixteenths", "stride_b_sixteenths"],
    do_not_specialize_on_alignment=["ranks_ptr", "token_slots_ptr"],
)
def _silu_and_mul_lora_kernel(
    gate_up_ptr,  # [T, 2 * SIZE]
    hidden_ptr,  # float32 [SPLITS, T, 2 * R]
    b_ptr,  # [S, 2 * SIZE, R], slots stride_b apart
    ranks_ptr,  # int32 [2, S]
    token_slots_ptr,  # int32 [T]
    out_ptr,  # [T, SIZE]
    T,
    S,
    r_sixteenths,
    stride_b_sixteenths,
    SIZE: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Program (tile of columns, tile of tokens), all slots of the tile."""
    R = r_sixteenths * 16
    n, t = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    rows, is_row, is_here = t.to(tl.int64)[:, None], (n < SIZE)[:, None], (t < T)[:, None] & (n < SIZE)[None, :]
    gate_at = gate_up_ptr + rows * (2 * SIZE) + n[None, :]
    gate, up = tl.load(gate_at, mask=is_here, other=0.0), tl.load(gate_at + SIZE, mask=is_here, other=0.0)
    h_rows, per_split = hidden_ptr + rows * (2 * R), T.to(tl.int64) * (2 * R)
    todo = _slots_of_tile(token_slots_ptr, t, T, S, 0, 1)
    slot = tl.min(todo, 0)
    while slot < S:
        mine = (todo == slot)[:, None]
        gate_rank, up_rank = tl.load(ranks_ptr + slot), tl.load(ranks_ptr + S + slot)
        b_rows = b_ptr + slot.to(tl.int64) * (stride_b_sixteenths.to(tl.int64) * 16) + n[:, None] * R
        to_gate, to_up = tl.zeros((BLOCK_M, BLOCK_N), tl.float32), tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        # Both parts at once, so that their loads wait for memory together.
        for at in tl.range(0, tl.maximum(gate_rank, up_rank), BLOCK_R, num_stages=1):
            r = (at + tl.arange(0, BLOCK_R))[None, :]
            to_gate = _add_product_of_b(to_gate, h_rows, b_rows, r, gate_rank, mine, is_row, per_split, SPLITS)
            to_up = _add_product_of_b(to_up, h_rows + R, b_rows + SIZE * R, r, up_rank, mine, is_row, per_split, SPLITS)
        gate = tl.where(mine, (gate.to(tl.float32) + to_gate).to(gate.dtype), gate)  # rounded as if it were stored
        up = tl.where(mine, (up.to(tl.float32) + to_up).to(up.dtype), up)
        todo = tl.where(mine.reshape(BLOCK_M), S, todo)
        slot = tl.min(todo, 0)
    tl.store(out_ptr + rows * SIZE + n[None, :], _silu_times(gate, up).to(gate.dtype), mask=is_here)


def silu_and_mul_lora(
    gate_up: Tensor,
    hidden: Tensor,
    b: Tensor,
    ranks: Tensor,
    token_slots: Tensor,
    *,
    plan: LoraPlan | None = None,
) -> Tensor:
    """`silu_and_mul` of what `expand_lora` makes of gate_up, which is left as it is.

    gate_up: [T, 2 * size], gate first, contiguous; hidden: float32 [splits, T, 2 * R], as `shrink_lora` made it for
    the two parts; b: [S, 2 * size, R], ranks: int32 [2, S], token_slots: int32 [T], as for `add_lora`. gate_up with
    its adapters is rounded to the dtype before SwiGLU, as if it had been stored, and the result once. Returns a new
    [T, size]. plan: instead of the rule's, of which its expand_m, block_n, expand_r and expand_warps count.
    Raises ValueError for shapes, strides or dtypes that do not fit together.
    """
    (num_tokens, width), (num_slots, _, rank) = gate_up.shape, b.shape
    size = width // 2
    _check(gate_up, b, ranks, token_slots, (size, size))
    _check_hidden(hidden, num_tokens, 2 * rank)
    if not gate_up.is_contiguous():
        raise ValueError(f"gate_up {list(gate_up.shape)} has strides {gate_up.stride()}; it must be contiguous")
    out = torch.empty(num_tokens, size, dtype=gate_up.dtype, device=gate_up.device)
    if not num_tokens:
        return out
    plan = _plan_of(num_tokens, rank, rank) if plan is None else plan
    _silu_and_mul_lora_kernel[triton.cdiv(size, plan.block_n), triton.cdiv(num_tokens, plan.expand_m)](
        gate_up,
        hidden,
        b,
        ranks,
        token_slots,
        out,
        num_tokens,
        num_slots,
        rank // 16,
        b.stride(0) // 16,
        SIZE=size,
        SPLITS=len(hidden),
        BLOCK_M=plan.expand_m,
        BLOCK_N=plan.block_n,
        BLOCK_R=_block_r(rank, plan.expand_r),
        num_warps=plan.expand_warps,
    )
    return out


def silu_and_mul_lora_launches(
    in_features: int, size: int, rank: int, dtype: torch.dtype, device: torch.device
) -> dict[Hashable, Callable[[], object]]:
    """As `LoraPlan.launches`, for `silu_and_mul_lora` of a product of in_features."""
    found: dict[Hashable, Callable[[], object]] = {}
    for num_tokens in _BUCKETS:
        plan = _plan_of(num_tokens, in_features, rank)
        key = "silu_and_mul_lora", dtype, size, _block_r(rank, plan.expand_r), plan.splits, plan[5:]
        found.setdefault(key, partial(_launch_silu_and_mul, size, rank, dtype, device, plan))
    return found


def _plan_of(num_tokens: int, in_features: int, rank: int) -> LoraPlan:
    """Only its splits, which are those of hidden, go by in_features."""
    return LoraPlan.of(num_tokens, in_features, 2, rank)._replace(block_n=_BLOCK_N, expand_warps=_NUM_WARPS)


def _launch_silu_and_mul(size: int, rank: int, dtype: torch.dtype, device: torch.device, plan: LoraPlan) -> None:
    """One token without an adapter."""
    gate_up = torch.zeros(1, 2 * size, dtype=dtype, device=device)
    hidden = torch.zeros(plan.splits, 1, 2 * rank, dtype=torch.float32, device=device)
    b = torch.zeros(1, 2 * size, rank, dtype=dtype, device=device)
    silu_and_mul_lora(gate_up, hidden, b, _ints(0, 2, device), _ints(-1, 1, device)[0], plan=plan)
