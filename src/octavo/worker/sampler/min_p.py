"""min_p: drop the tokens whose probability is below a fraction of the largest (Nguyen et al. 2024)."""

from __future__ import annotations

from torch import Tensor


def drop_unlikely(weights: Tensor, min_p: Tensor) -> Tensor:
    """Set to 0, in place, weights below min_p times the row's largest, and return them.

    weights: [R, N], float32 or float64, unnormalized. min_p: float64 [R, 1].
    """
    floor = min_p.to(weights.dtype) * weights.amax(-1, keepdim=True)
    return weights.mul_(weights >= floor)
