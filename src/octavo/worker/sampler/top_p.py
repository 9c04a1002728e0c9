"""top_p: draw from the nucleus, the smallest set of tokens whose probability reaches p (Holtzman et al. 2020).

Tokens are taken in descending order, equal probabilities by ascending id, and drawn in it too.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from octavo.worker.sampler.inverse_cdf import BELOW_ONE, first_above
from octavo.worker.sampler.rows import Rows
from octavo.worker.sampler.temperature import probabilities

# A cumulative probability this close to p, relatively, reaches it: float32 logits are no finer.
TOLERANCE = 1e-6


def draw(rows: Rows) -> Tensor:
    """Draw from each row's nucleus; int64 [R, 1]."""
    weights = probabilities(rows)
    if weights.device.type != "cpu":
        return draw_by_sort(weights, rows.top_p, rows.uniforms)
    wishes = zip(weights.numpy(), rows.top_p.flatten().tolist(), rows.uniforms.flatten().tolist())
    return torch.tensor([[draw_by_bucket(*wish)] for wish in wishes])


def draw_by_sort(weights: Tensor, top_p: Tensor, uniforms: Tensor) -> Tensor:
    """weights: float32 [R, V]; top_p, uniforms: float64 [R, 1]. Needs no value on the host."""
    ordered, ids = weights.sort(dim=-1, descending=True, stable=True)
    return ids.gather(-1, draw_in_order(ordered.double(), top_p, uniforms))


def draw_in_order(weights: Tensor, top_p: Tensor, uniforms: Tensor) -> Tensor:
    """Index into descending weights, float64 [R, N], of the token drawn from their nucleus; int64 [R, 1]."""
    cumulative = weights.cumsum(-1)
    wanted = torch.where(top_p < 1, top_p * (1 - TOLERANCE), 1.0) * cumulative[:, -1:]
    last = first_above(cumulative, wanted)
    drawn = first_above(cumulative, uniforms * cumulative.gather(-1, last))
    return torch.minimum(drawn, last)


def draw_by_bucket(weights: NDArray[np.float32], top_p: float, uniform: float) -> int:
    """The token that draw_by_sort draws from one row, weights [V] and top_p < 1; without sorting the row."""
    order = _Buckets(weights)
    last = order.find(top_p * (1 - TOLERANCE) * order.total)
    drawn = order.find(uniform * order.sum_through(last))
    return order.token(min(drawn, last))


class _Buckets:
    """One row's tokens in descending order, in buckets of near weights; a bucket is sorted when looked into.

    A place in the order is (bucket, index in the bucket).
    """

    _NUM_LOG2 = 13
    _SPAN = 40 << 23  # weights below 2**-40 of the largest share the last bucket

    def __init__(self, weights: NDArray[np.float32]) -> None:
        bits = weights.view(np.int32)  # the bits of floats >= 0 ascend with them
        self._weights = weights
        self._codes = bits.max() - bits
        width = min(int(self._codes.max()), self._SPAN).bit_length()
        self._keys = np.minimum(self._codes >> max(0, width - self._NUM_LOG2), (1 << self._NUM_LOG2) - 1)
        self._ends = np.cumsum(np.bincount(self._keys, weights=weights), dtype=np.float64)
        self._sorted: dict[int, tuple[NDArray[np.int64], NDArray[np.float64]]] = {}

    @property
    def total(self) -> float:
        return float(self._ends[-1])

    def find(self, target: float) -> tuple[int, int]:
        """The place at which the running sum passes the target, in [0, total)."""
        bucket = _first_above(self._ends, target)
        return bucket, _first_above(self._bucket(bucket)[1], target - self._before(bucket))

    def sum_through(self, place: tuple[int, int]) -> float:
        """The sum of the weights up to this place, its own included."""
        bucket, index = place
        return self._before(bucket) + float(self._bucket(bucket)[1][index])

    def token(self, place: tuple[int, int]) -> int:
        bucket, index = place
        return int(self._bucket(bucket)[0][index])

    def _before(self, bucket: int) -> float:
        return float(self._ends[bucket - 1]) if bucket else 0.0

    def _bucket(self, bucket: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Its tokens in order, and their running sum."""
        if bucket not in self._sorted:
            members = np.flatnonzero(self._keys == bucket)
            members = members[np.argsort(self._codes[members], kind="stable")]
            self._sorted[bucket] = members, np.cumsum(self._weights[members], dtype=np.float64)
        return self._sorted[bucket]


def _first_above(cumulative: NDArray[np.float64], target: float) -> int:
    """inverse_cdf.first_above for one row."""
    return int(np.searchsorted(cumulative, min(max(target, 0.0), cumulative[-1] * BELOW_ONE), side="right"))
