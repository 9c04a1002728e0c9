"""top_k: draw among the k most likely tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from octavo.worker.sampler.min_p import drop_unlikely
from octavo.worker.sampler.rows import Rows
from octavo.worker.sampler.top_p import draw_in_order


def stable_topk(values: Tensor, k: int) -> Tensor:
    """Ids of the k largest of each row, in descending order, equal values by ascending id; int64 [R, k].

    values: float32 [R, V], no NaN. torch.topk leaves open which of equal values it takes, and bfloat16
    logits are full of them; so it gets int64 keys that all differ: the value's bits, put into the
    order of integers, above the reversed id.
    """
    bits = (values + 0.0).view(torch.int32)  # + 0.0 makes -0.0 and 0.0 equal
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    last = values.shape[-1] - 1
    keys = ordered.long().bitwise_left_shift_(32).add_(torch.arange(last, -1, -1, device=values.device))
    return last - (keys.topk(k).values & 0xFFFFFFFF)


def draw(rows: Rows) -> Tensor:
    """Draw from the top_k of each row, then its top_p, in descending order; int64 [R, 1].

    All rows have a top_k. Only the candidates are ever exponentiated.
    """
    logits = rows.logits.float()
    ids = stable_topk(logits, rows.max_top_k)
    exponents = (logits.gather(-1, ids) - rows.row_max).double().div_(rows.temperature)
    beyond = torch.arange(rows.max_top_k, device=ids.device) >= rows.top_k
    weights = drop_unlikely(exponents.exp_().masked_fill_(beyond, 0.0), rows.min_p)
    return ids.gather(-1, draw_in_order(weights, rows.top_p, rows.uniforms))
