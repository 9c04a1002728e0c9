"""Step: a step as the scheduler knows it."""

from __future__ import annotations

from octavo.protocol.plan import NO_ADAPTER, NewSequence, PlanRow
from octavo.scheduler.sequence import Sequence


class Step:
    """A step being planned, then in flight."""

    __slots__ = (
        "adapters",
        "budget",
        "detached_tables",
        "new_sequences",
        "registered_blocks",
        "room",
        "rows",
        "sequences",
        "spare",
        "step_id",
    )

    def __init__(self, step_id: int, budget: int, room: int) -> None:
        self.step_id = step_id
        self.budget = budget  # tokens that may still be added
        self.room = room  # rows that may still be added, each guess counted as one more
        self.spare = 0  # of both, how many guesses may take, so that every sequence gets its own
        self.adapters: list[tuple[int, int]] = []  # (slot, adapter id) of those to bring in
        self.new_sequences: list[NewSequence] = []
        self.rows: list[PlanRow] = []
        self.sequences: list[Sequence | None] = []  # one a row; None once its result no longer matters
        self.registered_blocks: list[int] = []  # cache entries that hold only if this step succeeds
        self.detached_tables: list[list[int]] = []  # released when this step is committed

    def detach(self, sequence: Sequence) -> None:
        if sequence in self.sequences:
            self.sequences[self.sequences.index(sequence)] = None

    def sort_by_adapter(self) -> None:
        """Bring the rows of each adapter together, in whatever order these come."""
        adapters = [NO_ADAPTER if sequence is None else sequence.adapter_slot for sequence in self.sequences]
        order = sorted(range(len(adapters)), key=adapters.__getitem__)
        self.rows = [self.rows[index] for index in order]
        self.sequences = [self.sequences[index] for index in order]

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of rows that compute more than their last known token and guesses."""
        return sum(row.length for row in self.rows if row.length > 1 + row.num_drafts)
