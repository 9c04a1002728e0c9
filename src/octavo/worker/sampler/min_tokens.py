"""min_tokens: no token may end an output that is still too short."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from octavo.worker.sampler.slots import SlotParams


def bar_stops(logits: Tensor, params: list[SlotParams], positions: list[int]) -> None:
    """Set, in place, the ending tokens of rows below min_tokens to -inf. logits: float32 [R, V]."""
    barred = [(r, p.stop_ids) for r, (p, position) in enumerate(zip(params, positions)) if p.bars_stops(position)]
    if not barred:
        return
    rows = np.repeat([r for r, _ in barred], [ids.size for _, ids in barred])
    where = torch.from_numpy(np.stack([rows, np.concatenate([ids for _, ids in barred])])).to(logits.device)
    logits[where[0], where[1]] = -torch.inf
