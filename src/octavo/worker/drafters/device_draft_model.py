"""A smaller model of the same tokens as drafter on a GPU, without waiting for the host (Leviathan et al. 2023)."""

from __future__ import annotations

import torch
from torch import Tensor

from octavo.attention.triton import TritonAttention
from octavo.kernels import triton
from octavo.models.base import CausalLM
from octavo.protocol.plan import NewSequence
from octavo.worker.device_speculation import DeviceDraftBatch
from octavo.worker.drafters.device_passes import (
    Asked,
    DraftPasses,
    PassSizes,
    asked_of,
    prompts_of,
    put_guesses,
    reach_of,
)
from octavo.worker.step_buffers import NUM_PARAMS

_WIDTHS = (2, 3)  # tokens of each sequence in the first pass, on average, that graphs are recorded for


class DeviceModelDrafter:
    """Guesses what the smaller model holds likeliest, token after token.

    The tokens of a prompt go through the smaller model beside the model's own step. After that, a pass over the last
    known tokens of each sequence brings its KV up to date, whatever was accepted, and gives the first guess; each
    further one takes a pass of one token. The last two tokens do where the step before made guesses too; where none
    were wanted for long there remain gaps, before the last `most + 2`.
    """

    def __init__(
        self,
        model: CausalLM,
        attention: TritonAttention,
        block_tables: Tensor,
        sizes: tuple[int, int],
        most: int,
        use_graphs: bool,
    ) -> None:
        """attention: over a cache with as many blocks as the model's own. block_tables: of all slots. sizes: tokens of
        a KV block, and sequences that are served in a step, beyond which none is. most: guesses of a sequence."""
        self._model = model
        self._attention = attention
        self._widest = reach_of(most)
        # By slot: how many of the last known tokens have no KV yet, at most; negative after guesses, which have theirs.
        self._missing: dict[int, int] = {}
        passes = PassSizes(*sizes, _WIDTHS, self._widest)
        self._passes = DraftPasses(self._compute, attention, block_tables, passes, use_graphs)
        self._kernels = triton.get()
        device, most_sequences = block_tables.device, self._passes.max_sequences
        # Parameters of slots whose draws are greedy: temperature 0.
        self._greedy = torch.zeros(len(block_tables), NUM_PARAMS, dtype=torch.int32, device=device)
        self._drawn = torch.zeros(most_sequences, 2, dtype=torch.int32, device=device)

    def enter(self, new: NewSequence, start: int) -> None:  # noqa: ARG002
        """See Drafter: its KV is that of the slot's blocks."""
        self._missing[new.slot] = 0

    def propose(self, batch: DeviceDraftBatch) -> None:
        """See DeviceDrafter."""
        prompts = [batch.rows[index] for index in prompts_of(batch)]
        if prompts:
            self._model(*self._passes.place_prompts(prompts, batch.token_ids), self._attention)
        computed = {row.slot for row in prompts}
        for row, is_prompt in zip(batch.rows, batch.prompts):
            missing = 0 if row.slot in computed else self._missing[row.slot] + row.length
            missing += is_prompt and row.samples  # its length is without the token that was drawn
            self._missing[row.slot] = max(int(row.samples), missing)
        indices = asked_of(batch, self._passes.max_sequences)
        if not indices:
            return
        widths = [min(self._missing[batch.rows[index].slot], self._widest) for index in indices]
        most = self._passes.run(
            batch, [Asked(index, batch.asked[index], width) for index, width in zip(indices, widths)]
        )
        self._missing |= {batch.rows[index].slot: 1 - batch.asked[index] for index in indices}
        # The draws are in the table by now, behind the known tokens.
        slots = self._passes.slots[: len(indices)].long()
        columns = batch.lengths[slots].long()[:, None] + torch.arange(most, device=slots.device)
        columns = columns.clamp(max=batch.token_ids.shape[1] - 1)
        put_guesses(batch, indices, batch.token_ids[slots[:, None], columns])

    def record(self, lengths: Tensor, token_ids: Tensor) -> None:
        """See DeviceDrafter."""
        self._passes.record(lengths, token_ids)

    def _compute(self, size: int, width: int, lengths: Tensor, token_ids: Tensor) -> None:
        """See device_passes.Compute. Puts the likeliest tokens into the table, where the next pass reads."""
        if width:
            placed, last = self._passes.place_first(size, width, lengths, token_ids)
            hidden = self._model(placed.input_ids, placed.positions, self._attention)[last]
            slots, positions = self._passes.slots[:size], placed.next_positions[last]
        else:
            placed = self._passes.place_next(size, lengths, token_ids)
            hidden = self._model(placed.input_ids, placed.positions, self._attention)
            slots, positions = placed.row_slots, placed.next_positions
        samples = self._passes.numbers[1 : size + 1]  # none is 0
        drawing = slots, positions, self._greedy, samples, token_ids
        self._kernels.draw_tokens(self._model.compute_logits(hidden), *drawing, self._drawn[:size])
