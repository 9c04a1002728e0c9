"""Slots: the per-sequence state that lives on the device between steps."""

from __future__ import annotations

import torch
from torch import Tensor

from octavo.protocol.plan import StepPlan


class Slots:
    """Token values and block tables of the sequences that run, one row a slot.

    token_ids: int64 [max_num_seqs, max_model_len]. A step writes what it samples straight into
    it, so the next step can be built before the host has seen the token.
    block_tables: int64 [max_num_seqs, ceil(max_model_len / block_size)].
    """

    def __init__(self, max_num_seqs: int, max_model_len: int, block_size: int, device: torch.device) -> None:
        num_blocks = -(-max_model_len // block_size)
        self.token_ids = torch.zeros(max_num_seqs, max_model_len, dtype=torch.int64, device=device)
        self.block_tables = torch.zeros(max_num_seqs, num_blocks, dtype=torch.int64, device=device)
        self.block_size = block_size
        self._num_blocks = [0] * max_num_seqs  # host: how far each slot's table is filled

    def apply(self, plan: StepPlan) -> None:
        """Bring the slots to the state the plan's rows start from."""
        for new in plan.new_sequences:
            self.token_ids[new.slot, : len(new.token_ids)] = torch.tensor(new.token_ids)
            self._num_blocks[new.slot] = 0
            self._append_blocks(new.slot, new.block_table)
        for row in plan.rows:
            if row.new_block_ids:
                self._append_blocks(row.slot, row.new_block_ids)

    def _append_blocks(self, slot: int, block_ids: list[int]) -> None:
        begin = self._num_blocks[slot]
        end = begin + len(block_ids)
        self.block_tables[slot, begin:end] = torch.tensor(block_ids)
        self._num_blocks[slot] = end

    def positions_to_kv(self, slots: Tensor, positions: Tensor) -> Tensor:
        """KV slot (block * block_size + offset) of each (slot, position); all int64 [T]."""
        blocks = self.block_tables[slots, positions // self.block_size]
        return blocks * self.block_size + positions % self.block_size
