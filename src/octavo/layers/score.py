"""The head of a model that scores texts."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from octavo.layers.slot import WeightSlot, copied_into


class ScoreHead(nn.Module):
    """One number for a hidden state, in float32 whatever the model's dtype."""

    def __init__(self, hidden_size: int, device: torch.device) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(1, hidden_size, device=device), requires_grad=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden: [R, hidden_size]. Returns float32 [R, 1]."""
        return hidden.float() @ self.weight.T

    def weight_slots(self, path: str) -> dict[str, WeightSlot]:
        return {f"{path}.weight": copied_into(self.weight.data)}
