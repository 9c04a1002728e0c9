"""A smaller model of the same tokens as drafter on a GPU, without waiting for the host (Leviathan et al. 2023)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from octavo.attention.triton import TritonAttention
from octavo.kernels import triton
from octavo.models.base import CausalLM, narrow_to
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
from octavo.worker.step_buffers import NUM_PARAMS

_WIDTHS = 2, 3  # tokens of each sequence in the first pass, on average, where guesses are made in every step


def _first(heads: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    """The first token, where none is wanted but keys and values of all: some token must go on."""
    return heads[:1], residual[:1]


class DeviceModelDrafter:
    """Guesses what the smaller model holds likeliest, or what it draws, token after token.

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
        params: Tensor | None = None,
    ) -> None:
        """attention: over a cache with as many blocks as the model's own. block_tables: of all slots. sizes: tokens of
        a KV block, and sequences that are served in a step, beyond which none is. most: guesses of a sequence. params:
        of all slots' sampling, as `draw_tokens` takes them: guesses are drawn at the requests' temperatures, with the
        random numbers that the model's own draws will take. None: the likeliest are taken."""
        self._model = model
        self._attention = attention
        self._widest = reach_of(most)
        # By slot: how many of the last known tokens have no KV yet, at most; negative after guesses, which have theirs.
        self._missing: dict[int, int] = {}
        passes = PassSizes(*sizes, most, sorted({*_WIDTHS, self._widest}))
        self._passes = DraftPasses(self._compute, attention, block_tables, passes, use_graphs)
        self._kernels = triton.get()
        device, most_sequences = block_tables.device, self._passes.max_sequences
        greedy = torch.zeros(len(block_tables), NUM_PARAMS, dtype=torch.int32, device=device)  # temperature 0
        self._params = greedy if params is None else params
        self._drawn = torch.zeros(most_sequences, 2, dtype=torch.int32, device=device)

    def enter(self, new: NewSequence, start: int) -> None:  # noqa: ARG002
        """See Drafter: its KV is that of the slot's blocks."""
        self._missing[new.slot] = 0

    def propose(self, batch: DeviceDraftBatch) -> None:
        """See DeviceDrafter."""
        prompts = [batch.rows[index] for index in prompts_of(batch)]
        if prompts:
            placed = self._passes.place_prompts(prompts, batch.token_ids)
            self._model(*placed, self._attention, None, _first)
        self.skip(batch.rows, batch.prompts)
        self._missing |= {row.slot: int(row.samples) for row in prompts}
        indices = asked_of(batch, self._passes.max_sequences)
        if not indices:
            return
        widths = [min(self._missing[batch.rows[index].slot], self._widest) for index in indices]
        self._passes.run(batch, [Asked(index, batch.asked[index], width) for index, width in zip(indices, widths)])
        self._missing |= {batch.rows[index].slot: 1 - batch.asked[index] for index in indices}
        # The draws are in the table by now, behind the known tokens. Rows after those served have none.
        served = indices[-1] + 1
        found = batch.drafts[:served], batch.found[:served]
        self._kernels.read_drafts(batch.slots[:served], batch.wanted[:served], batch.lengths, batch.token_ids, *found)

    def skip(self, rows: Sequence[PlanRow], prompts: Sequence[bool]) -> None:
        """See DeviceDrafter."""
        for row, is_prompt in zip(rows, prompts):
            # The length of a prompt's row is without the token that was drawn.
            missing = self._missing[row.slot] + row.length + (is_prompt and row.samples)
            self._missing[row.slot] = max(int(row.samples), missing)

    def record(self, lengths: Tensor, token_ids: Tensor) -> None:
        """See DeviceDrafter."""
        self._passes.record(lengths, token_ids)

    def _compute(self, size: int, width: int, lengths: Tensor, token_ids: Tensor) -> None:
        """See device_passes.Compute. Puts the guesses into the table, where the next pass reads."""
        if width:
            placed, last = self._passes.place_first(size, width, lengths, token_ids)
            hidden = self._model(placed.input_ids, placed.token_positions, self._attention, None, narrow_to(last))
            slots, positions = self._passes.slots(size), placed.positions.index_select(0, last)
        else:
            placed = self._passes.place_next(size, lengths, token_ids)
            hidden = self._model(placed.input_ids, placed.token_positions, self._attention)
            slots, positions = placed.row_slots, placed.positions
        samples = self._passes.numbers[1 : size + 1]  # none is 0
        drawing = slots, positions, self._params, samples, token_ids
        self._kernels.draw_tokens(self._model.compute_logits(hidden), *drawing, self._drawn[:size])
