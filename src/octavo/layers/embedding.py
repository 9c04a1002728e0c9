"""The token embedding table."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from octavo.layers.lora import EmbeddingAdapters
from octavo.layers.slot import WeightSlot, copied_into


class Embedding(nn.Module):
    """A row of the table for every token id."""

    def __init__(self, vocab_size: int, hidden_size: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.weight = nn.Parameter(
            torch.empty(vocab_size, hidden_size, dtype=dtype, device=device), requires_grad=False
        )
        self.adapters: EmbeddingAdapters | None = None  # of an engine that serves LoRA

    def forward(self, input_ids: Tensor) -> Tensor:
        """input_ids: int64 [T], each in [0, vocab_size). Returns a new tensor [T, hidden_size]."""
        embedded = F.embedding(input_ids, self.weight)
        return embedded if self.adapters is None else self.adapters.add(embedded, input_ids)

    def weight_slots(self, path: str) -> dict[str, WeightSlot]:
        return {f"{path}.weight": copied_into(self.weight.data)}
