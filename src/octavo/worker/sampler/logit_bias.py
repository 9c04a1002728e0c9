"""logit_bias: what the caller adds to single tokens' logits."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from octavo.worker.sampler.slots import SlotParams


def add_bias(logits: Tensor, params: list[SlotParams]) -> None:
    """Add each row's biases in place. logits: float32 [R, V]."""
    biased = [(r, p) for r, p in enumerate(params) if p.bias_ids.size]
    if not biased:
        return
    rows = np.repeat([r for r, _ in biased], [p.bias_ids.size for _, p in biased])
    where = torch.from_numpy(np.stack([rows, np.concatenate([p.bias_ids for _, p in biased])])).to(logits.device)
    values = torch.from_numpy(np.concatenate([p.bias_values for _, p in biased])).to(logits.device)
    logits[where[0], where[1]] += values  # ids of a row are distinct
