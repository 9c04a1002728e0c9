"""A head on the model's own states as drafter on a GPU, without waiting for the host (EAGLE, Li et al. 2024, 2025)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from octavo.attention.triton import TritonAttention
from octavo.kernels import triton
from octavo.models.base import DraftHead
from octavo.protocol.plan import NewSequence, PlanRow
from octavo.worker.device_speculation import DeviceDraftBatch
from octavo.worker.drafters.device_passes import (
    Asked,
    DraftPasses,
    PassSizes,
    asked_of,
    prompts_of,
    reach_of,
)
from octavo.worker.drafters.recent_features import RecentFeatures
from octavo.worker.staging import upload
from octavo.worker.step_buffers import NUM_PARAMS


class DeviceHeadDrafter:
    """Guesses what the head holds likeliest, each from what it made of the one before.

    At position i the head reads the features there and the token after it. The tokens of a prompt go through it beside
    the model's own step. After that, a pass over what the last steps computed of each sequence puts their KV in the
    place of what guesses left there, and gives the first guess; each further one takes a pass of one token. Its KV has
    gaps where a sequence was asked for no guesses for longer than the features are kept; those cost acceptance.
    """

    def __init__(
        self,
        head: DraftHead,
        recent: RecentFeatures,
        attention: TritonAttention,
        block_tables: Tensor,
        sizes: tuple[int, int],
        most: int,
        use_graphs: bool,
    ) -> None:
        """recent: as far as reach_of(most). The others: as of DeviceModelDrafter; attention is of one layer."""
        self._head = head
        self._recent = recent
        self._attention = attention
        self._widest = reach_of(most)
        self._begins: dict[int, int] = {}  # by slot: the first position with features
        passes = PassSizes(*sizes, most, sorted({2, (most + 3) // 2, most + 1, self._widest}), lag=1)
        self._passes = DraftPasses(self._compute, attention, block_tables, passes, use_graphs)
        self._kernels = triton.get()
        device, count = block_tables.device, self._passes.max_sequences
        # Of each sequence of a pass: its guesses so far, the last one, and the features that go with it.
        self._guesses = torch.zeros(count, most, dtype=torch.int32, device=device)
        self._last_ids = torch.zeros(count, dtype=torch.int64, device=device)
        weight = next(head.parameters())
        self._states = torch.zeros(count, head.config.hidden_size, dtype=weight.dtype, device=device)
        # Parameters of draws that are greedy: temperature 0.
        self._greedy = torch.zeros(count, NUM_PARAMS, dtype=torch.int32, device=device)
        self._drawn = torch.zeros(count, 2, dtype=torch.int32, device=device)

    def enter(self, new: NewSequence, start: int) -> None:
        """See Drafter: its KV is that of the slot's blocks."""
        self._begins[new.slot] = start

    def propose(self, batch: DeviceDraftBatch) -> None:
        """See DeviceDrafter."""
        prompts = prompts_of(batch)
        if prompts:
            self._compute_prompts(batch, prompts)
        indices = asked_of(batch, self._passes.max_sequences)
        if not indices:
            return
        most = self._passes.run(batch, [self._asked(batch, index) for index in indices])
        self._put(batch, indices, most)

    def skip(self, rows: Sequence[PlanRow], prompts: Sequence[bool]) -> None:
        """See DeviceDrafter."""

    def record(self, lengths: Tensor, token_ids: Tensor) -> None:
        """See DeviceDrafter."""
        self._passes.record(lengths, token_ids)

    def _asked(self, batch: DeviceDraftBatch, index: int) -> Asked:
        """The pass goes over the step's tokens where the step before was served, which its guesses show: its own pass
        was over all before. Of a prompt over the last token, whose KV is there, since that gives the first guess."""
        row = batch.rows[index]
        width = 1 if batch.prompts[index] else 1 + row.num_drafts if row.num_drafts else self._widest
        return Asked(index, batch.asked[index], width, self._begins[row.slot])

    def _compute_prompts(self, batch: DeviceDraftBatch, prompts: Sequence[int]) -> None:
        """Write the KV of these rows' tokens. All of them know the token after."""
        assert batch.features is not None
        ends = list(accumulate(row.length for row in batch.rows))
        rows = [batch.rows[index] for index in prompts]
        spans = [slice(ends[index] - row.length, ends[index]) for index, row in zip(prompts, rows)]
        features = torch.cat([batch.features[span] for span in spans])
        input_ids, positions = self._passes.place_prompts(rows, batch.token_ids[:, 1:])
        self._head(input_ids, positions, features, self._attention)

    def _put(self, batch: DeviceDraftBatch, indices: Sequence[int], most: int) -> None:
        """Write the guesses of these rows of batch.rows, up to `most` each."""
        guesses, drafts = self._guesses[: len(indices), :most], batch.drafts[:, :most]
        if len(indices) == len(batch.rows):
            drafts.copy_(guesses)
            batch.found.fill_(most)
        else:
            where = upload(np.array(indices, np.int32), drafts.device).long()
            drafts.index_copy_(0, where, guesses)
            batch.found.index_fill_(0, where, most)  # as an assignment it would wait for the device

    def _compute(self, size: int, width: int, lengths: Tensor, token_ids: Tensor) -> None:
        """See device_passes.Compute. Leaves the guesses, and what the next pass reads."""
        if width:
            placed, last = self._passes.place_first(size, width, lengths, token_ids[:, 1:])
            features = self._recent.read(placed.row_slots, placed.token_positions)
            made, hidden = self._head(placed.input_ids, placed.token_positions, features, self._attention)
            made, hidden = made.index_select(0, last), hidden.index_select(0, last)
        else:
            placed = self._passes.place_next(size, lengths, token_ids[:, 1:])
            made, hidden = self._head(
                self._last_ids[:size], placed.token_positions, self._states[:size], self._attention
            )
        self._states[:size].copy_(made)
        count, numbers, drawn = placed.count, self._passes.numbers, self._drawn[:size]
        drawing = numbers[:size], count, self._greedy, numbers[1 : size + 1]  # none of the last is 0
        self._kernels.draw_tokens(self._head.compute_logits(hidden), *drawing, self._guesses, drawn)
        ids = self._head.to_target_ids(drawn[:, 0].long())
        self._last_ids[:size].copy_(ids)
        self._guesses[:size].scatter_(1, count.long()[:, None], ids.int()[:, None])
