"""Drawing from unnormalized weights with one uniform number: the inverse of their cumulative sum.

Sums are float64: in float32, a running sum over 150k tokens loses the tail.
"""

from __future__ import annotations

import torch
from torch import Tensor

BELOW_ONE = 1 - 2.0**-52
_BLOCK = 256


def first_above(cumulative: Tensor, target: Tensor) -> Tensor:
    """Index of the first cumulative sum above the target; int64 [R, 1].

    cumulative: float64 [R, N], ascending, the last one > 0. target: float64 [R, 1], brought into
    [0, total): whatever rounding did to it, the index is that of an entry with a weight > 0.
    """
    inside = torch.minimum(target.clamp(min=0), cumulative[:, -1:] * BELOW_ONE)
    return (cumulative <= inside).sum(-1, keepdim=True)


def invert_cdf(weights: Tensor, uniforms: Tensor) -> Tensor:
    """The entry of each row at the given fraction of its running sum; int64 [R, 1].

    weights: float32 [R, N], >= 0, each row with a sum > 0. uniforms: float64 [R, 1] in [0, 1).
    In two levels, blocks and then one block: running sums of all N entries are never made.
    """
    if weights.shape[-1] % _BLOCK:
        weights = torch.nn.functional.pad(weights, (0, -weights.shape[-1] % _BLOCK))
    blocks = weights.view(weights.shape[0], -1, _BLOCK)
    ends = blocks.sum(-1, dtype=torch.float64).cumsum(-1)
    target = uniforms * ends[:, -1:]
    block = first_above(ends, target)
    before = torch.nn.functional.pad(ends, (1, 0)).gather(-1, block)
    chosen = blocks.take_along_dim(block[:, :, None], 1).squeeze(1)
    return block * _BLOCK + first_above(chosen.double().cumsum(-1), target - before)
