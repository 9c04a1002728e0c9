"""top_p: draw from the nucleus, the smallest set of tokens whose probability reaches p (Holtzman et al. 2020)."""

from __future__ import annotations

import torch
from torch import Tensor

from octavo.worker.sampler.inverse_cdf import Cdf
from octavo.worker.sampler.rows import Rows
from octavo.worker.sampler.temperature import probabilities

# A cumulative probability this close to p, relatively, reaches it: float32 logits are no finer.
TOP_P_TOLERANCE = 1e-6

_DIGIT = 15
_RADIX = 1 << _DIGIT


def mass_wanted(total: Tensor, top_p: Tensor) -> Tensor:
    """The sum that the nucleus has to pass, of this total; all float64 [R, 1]."""
    return torch.where(top_p < 1, top_p * (1 - TOP_P_TOLERANCE), 1.0) * total


def draw(rows: Rows) -> Tensor:
    """Draw from each row's nucleus in descending order, equal probabilities by ascending id; int64 [R, 1].

    No sort: the token at a given cumulative probability is found by its digits, as a radix sort
    would (`_Descending.find`), once for the end of the nucleus and once for the token drawn.
    """
    order = _Descending(probabilities(rows))
    wanted = mass_wanted(order.total, rows.top_p)
    boundary, above, tied = order.find(wanted)
    num_kept = ((wanted - above) / tied).floor_() + 1  # of the tokens as likely as the boundary
    target = rows.uniforms * (above + num_kept * tied)
    code, above, tied = order.find(target)
    nth = ((target - above) / tied).floor_()
    nth = torch.where(code == boundary, torch.minimum(nth, num_kept - 1), nth)
    return order.token(code, nth)


class _Descending:
    """Tokens in the order of descending weight, told apart by code: 0 for the largest float32 below 2.

    weights: float32 [R, V] in [0, 1]. A code is the weight's bits, which ascend with it, turned around:
    30 bits, two digits. Equal weights share one.
    """

    def __init__(self, weights: Tensor) -> None:
        self._codes = (_RADIX * _RADIX - 1) - weights.view(torch.int32)
        self._mass = weights.double()
        self._leading = Cdf(self._histogram(self._codes >> _DIGIT, _RADIX))

    @property
    def total(self) -> Tensor:
        """The rows' sums; float64 [R, 1]."""
        return self._leading.total

    def _histogram(self, keys: Tensor, num_buckets: int) -> Tensor:
        zeros = self._mass.new_zeros(keys.shape[0], num_buckets)
        return zeros.scatter_add_(-1, keys.long(), self._mass)

    def find(self, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The code at which the descending running sum passes the target, float64 [R, 1] in [0, total).

        Returns (code int64, the sum of all larger weights float64, the code's weight float64), each [R, 1].
        """
        leading, above = self._leading.invert(target)
        base = leading << _DIGIT
        # Codes with another leading digit fall into the buckets at both ends, which are cut off.
        trailing = (self._codes - base.int()).clamp_(-1, _RADIX).add_(1)
        digit, above_in_bucket = Cdf(self._histogram(trailing, _RADIX + 2)[:, 1:-1]).invert(target - above)
        code = base + digit
        weight = ((_RADIX * _RADIX - 1) - code).int().view(torch.float32).double()
        return code, above + above_in_bucket, weight

    def token(self, code: Tensor, nth: Tensor) -> Tensor:
        """The id of the nth (float64 [R, 1], from 0) of the tokens with this code; int64 [R, 1]."""
        ties = (self._codes == code).float()
        return Cdf(ties).invert(nth + 0.5)[0]
