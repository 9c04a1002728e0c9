"""Drawing from unnormalized weights with one uniform number: the inverse of their cumulative sum.

Sums are float64: in float32, a running sum over 150k tokens loses the tail.
"""

from __future__ import annotations

import torch
from torch import Tensor

_BLOCK = 256
_BELOW_ONE = 1 - 2.0**-52


def first_above(cumulative: Tensor, target: Tensor) -> Tensor:
    """Index of the first cumulative sum above the target; int64 [R, 1].

    cumulative: float64 [R, N], ascending, the last one > 0. target: float64 [R, 1], brought into
    [0, total): whatever rounding did to it, the index is that of an entry with a weight > 0.
    """
    inside = torch.minimum(target.clamp(min=0), cumulative[:, -1:] * _BELOW_ONE)
    return (cumulative <= inside).sum(-1, keepdim=True)


def entry_before(cumulative: Tensor, index: Tensor) -> Tensor:
    """cumulative[r, index[r] - 1], or 0 where the index is 0; [R, 1]."""
    return torch.nn.functional.pad(cumulative, (1, 0)).gather(-1, index)


class Cdf:
    """The running sum of [R, N] weights in two levels, blocks and then one block: never [R, N] sums.

    weights: float32 or float64, >= 0, each row with a sum > 0.
    """

    def __init__(self, weights: Tensor) -> None:
        if weights.shape[-1] % _BLOCK:
            weights = torch.nn.functional.pad(weights, (0, -weights.shape[-1] % _BLOCK))
        self._blocks = weights.unflatten(-1, (-1, _BLOCK))
        self._block_ends = self._blocks.sum(-1, dtype=torch.float64).cumsum(-1)

    @property
    def total(self) -> Tensor:
        """The rows' sums; float64 [R, 1]."""
        return self._block_ends[:, -1:]

    def invert(self, target: Tensor) -> tuple[Tensor, Tensor]:
        """Where the running sum passes the target, float64 [R, 1] in [0, total), and the sum before that place.

        Returns (index int64 [R, 1], sum float64 [R, 1]). The entry at the index is never 0.
        """
        block = first_above(self._block_ends, target)
        before_block = entry_before(self._block_ends, block)
        inner = self._blocks.take_along_dim(block[:, :, None], 1).squeeze(1).double().cumsum(-1)
        index = first_above(inner, target - before_block)
        return block * _BLOCK + index, before_block + entry_before(inner, index)
