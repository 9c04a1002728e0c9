"""What speculation adds to a CPU's steps: where rows truly are, and the guesses for the next step."""

from __future__ import annotations

import msgspec
import torch
from torch import Tensor

from octavo.protocol.plan import PlanRow, RowResult, StepPlan
from octavo.worker.drafters.drafter import Drafter, DraftRow
from octavo.worker.slots import Slots


class Speculation:
    """Knows how many tokens each slot's sequence has, and how many guesses lie after them; their only writer."""

    def __init__(self, drafter: Drafter, slots: Slots) -> None:
        self._drafter = drafter
        self._slots = slots
        self._num_tokens: dict[int, int] = {}  # by slot
        self._num_drafts: dict[int, int] = {}

    def enter(self, plan: StepPlan) -> None:
        """Sequences take slots, whose former tokens are still there."""
        starts = {row.slot: row.start for row in plan.rows}
        for new in plan.new_sequences:
            self._drafter.enter(new, starts[new.slot])
            self._num_tokens[new.slot] = len(new.token_ids)
            self._num_drafts[new.slot] = 0

    def true_rows(self, rows: list[PlanRow]) -> list[PlanRow]:
        """The rows as they are: see PlanRow.num_drafts."""
        return [self._true_row(row) if row.samples else row for row in rows]

    def _true_row(self, row: PlanRow) -> PlanRow:
        own = row.length - row.num_drafts
        start = self._num_tokens[row.slot] - own
        num_drafts = min(row.num_drafts, self._num_drafts[row.slot])
        if start == row.start and num_drafts == row.num_drafts:
            return row
        return msgspec.structs.replace(row, start=start, length=own + num_drafts, num_drafts=num_drafts)

    def propose(
        self, rows: list[PlanRow], results: list[RowResult], counts: list[int], features: Tensor | None
    ) -> list[RowResult]:
        """The results of the rows, with the guesses that were asked for. counts: see StepPlan.drafts."""
        draft_rows = []
        for row, result, count in zip(rows, results, counts):
            if row.samples:
                known = row.start + row.length - row.num_drafts + len(result.token_ids)
                self._num_tokens[row.slot] = known
            else:
                known = row.start + row.length
            wanted = count if row.samples and result.error is None else 0
            draft_rows.append(DraftRow(row.slot, row.start, row.length, known, wanted, not row.samples and count > 0))
        drafts = self._drafter.propose(draft_rows, features)
        for row, guesses in zip(rows, drafts):
            self._num_drafts[row.slot] = len(guesses)
            if guesses:
                known = self._num_tokens[row.slot]
                self._slots.token_ids[row.slot, known : known + len(guesses)] = torch.tensor(guesses)
        return [
            msgspec.structs.replace(result, draft_ids=tuple(guesses)) if guesses else result
            for result, guesses in zip(results, drafts)
        ]
