"""What a draft head reads of the model's steps on a GPU: the features of each sequence's last tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from octavo.kernels import triton
from octavo.models.base import CausalLM, DraftHead
from octavo.worker.step_buffers import StepBuffers, StepShape


class RecentFeatures:
    """Keeps them by slot, that of position p at p % K. Written by the steps, within their CUDA graphs.

    A step may write features of guesses that do not come true: as many places as those are hold nothing then that is
    older. So K is no less than `reach`, the tokens that are read, and the guesses of a step together.
    """

    def __init__(self, head: DraftHead, target: CausalLM, num_slots: int, reach: int, most: int) -> None:
        """reach: how far behind a sequence's last known token features are read. most: guesses of a row."""
        weight = target.embed_tokens.weight
        self._head = head
        self._num_tapped = len(head.tap_layers) * target.config.hidden_size
        self._dtype, self._device = weight.dtype, weight.device
        self._kernels = triton.get()
        self._kept = 1 << (reach + most - 1).bit_length()
        self._recent = torch.zeros(
            num_slots, self._kept, head.config.hidden_size, dtype=weight.dtype, device=weight.device
        )

    def taps(self, num_tokens: int) -> Tensor | None:
        """Room for what CausalLM.forward is to write of so many tokens; None where the last hidden states do."""
        if not self._num_tapped:
            return None
        return torch.empty(num_tokens, self._num_tapped, dtype=self._dtype, device=self._device)

    def keep(self, states: Tensor, buffers: StepBuffers, shape: StepShape) -> Tensor:
        """Take in a step whose rows stand where their sequences end. states: of its tokens, the taps or the last hidden
        ones. Returns the features of all its tokens, [T, hidden_size]. Launches depend on the shape alone."""
        features = self._head.fuse(states)
        rows = shape.num_rows
        where = buffers.row_slots[:rows], buffers.starts[:rows], buffers.cu_q[: rows + 1]
        longest = 1 if shape.decodes else shape.num_tokens
        self._kernels.keep_features(features, *where, self._recent, longest)
        return features

    def read(self, slots: Tensor, positions: Tensor) -> Tensor:
        """The features at these positions, [T, hidden_size]; anything where a slot is -1. slots: int32 [T]; positions:
        int64 [T]."""
        return self._recent[slots.clamp(min=0), positions % self._kept]
