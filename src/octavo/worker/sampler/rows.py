"""The rows of a batch that draw at random, with what each one's draw depends on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from octavo.worker.sampler.slots import SlotParams


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """Every field is per row: a row's draw is a function of its own entries.

    logits: [R, V], penalized and biased, model dtype or float32, no NaN.
    row_max: the largest logit, finite; float32 [R, 1]. temperature: float32 [R, 1].
    min_p, top_p, top_k, uniforms (in [0, 1)): float64 [R, 1].
    max_top_k: the largest top_k. uses_min_p: whether any row has one. Both known to the host.
    """

    logits: Tensor
    row_max: Tensor
    temperature: Tensor
    min_p: Tensor
    top_p: Tensor
    top_k: Tensor
    uniforms: Tensor
    max_top_k: int
    uses_min_p: bool


def random_rows(logits: Tensor, row_max: Tensor, params: list[SlotParams], uniforms: list[float]) -> Rows:
    """logits: [R, V]; row_max: float32 [R, 1]; params and uniforms: one each row. One copy to the device."""
    columns = torch.tensor(
        [
            [p.temperature for p in params],
            [p.min_p for p in params],
            [p.top_p for p in params],
            [p.top_k for p in params],
            uniforms,
        ],
        dtype=torch.float64,
    ).to(logits.device, non_blocking=True)
    temperature, min_p, top_p, top_k, uniform = columns[:, :, None].unbind(0)
    return Rows(
        logits=logits,
        row_max=row_max,
        temperature=temperature.float(),
        min_p=min_p,
        top_p=top_p,
        top_k=top_k,
        uniforms=uniform,
        max_top_k=max(p.top_k for p in params),
        uses_min_p=any(p.min_p for p in params),
    )
