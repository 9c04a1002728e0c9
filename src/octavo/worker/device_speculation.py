"""What speculation adds to a GPU's steps: the sequences' true lengths there, the verdict on guesses, and new ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from octavo.kernels import triton
from octavo.protocol.plan import NewSequence, PlanRow, RowResult, StepPlan
from octavo.worker.drafters.recent_features import RecentFeatures
from octavo.worker.staging import EarlyCopies
from octavo.worker.step_buffers import SplitRows, StepBuffers, StepShape

Ints = NDArray[np.int32]


class DeviceDraftBatch(NamedTuple):
    """A step that was sampled, on the device.

    rows: those of the plan that ran, G of them, whose starts and lengths are upper bounds. prompts: whether a row is of
    a prompt, and right as it is. asked: guesses wanted, one number a row; of a prompt that goes on, whether there will
    be some. slots, wanted: int32 [G], the same; slot -1 where no guess is wanted now. lengths: int32 [num_slots],
    known tokens. token_ids: int32 [num_slots, max_len]. features: of all tokens of the rows, [T, F], for a draft head.
    Written: drafts, int32 [G, K], and found, int32 [G], 0 so far.
    """

    rows: Sequence[PlanRow]
    prompts: Sequence[bool]
    asked: Sequence[int]
    slots: Tensor
    wanted: Tensor
    lengths: Tensor
    token_ids: Tensor
    features: Tensor | None
    drafts: Tensor
    found: Tensor


class DeviceDrafter(Protocol):
    """As Drafter, without waiting for the device: it writes guesses at the tokens from position lengths[slot] on."""

    def enter(self, new: NewSequence, start: int) -> None: ...

    def propose(self, batch: DeviceDraftBatch) -> None: ...

    def skip(self, rows: Sequence[PlanRow], prompts: Sequence[bool]) -> None:
        """A step in which none are asked for; as in DeviceDraftBatch."""
        ...

    def record(self, lengths: Tensor, token_ids: Tensor) -> None:
        """Record the CUDA graphs that it replays; the tables as in DeviceDraftBatch."""
        ...


class DeviceSpeculation:
    """Knows the true lengths of the sequences that decode, on the device, and which slots those are."""

    def __init__(
        self,
        drafter: DeviceDrafter,
        num_drafts: int,
        sizes: tuple[int, int],
        device: torch.device,
        acceptance: float | None = None,
        recent: RecentFeatures | None = None,
    ) -> None:
        """num_drafts: guesses of a row, at most. sizes: slots, and sequences of a step. acceptance: see verify_rows.
        recent: of a draft head."""
        num_slots, num_groups = sizes
        self._drafter = drafter
        self.verdict_size = 2 + num_drafts  # words of a row's verdict, see `propose`
        self._most = num_drafts
        self._acceptance = acceptance
        self._recent = recent
        self._kernels = triton.get()
        self._lengths = torch.zeros(num_slots, dtype=torch.int32, device=device)
        self._ready = torch.zeros(num_slots, dtype=torch.int32, device=device)
        # Of each sequence of the step: tokens that came, guesses and how many.
        self._counts = torch.zeros(num_groups, dtype=torch.int32, device=device)
        self._found = torch.zeros_like(self._counts)
        self._drafts = torch.zeros(num_groups, num_drafts, dtype=torch.int32, device=device)
        self._asked = torch.zeros(2, num_groups, dtype=torch.int32, device=device)  # slots that want guesses; how many
        self._copies = EarlyCopies(device)
        self._nobody = torch.full((num_groups,), -1, dtype=torch.int32, device=device)  # slots that ask for nothing
        self._follows: set[int] = set()  # slots whose sequences decode

    def split(self, rows: Sequence[PlanRow]) -> SplitRows:
        """The rows of a plan, as they are computed."""
        return SplitRows.of(rows, self._follows)

    def enter(self, plan: StepPlan) -> None:
        """Sequences take slots, whose former tokens are still there."""
        starts = {row.slot: row.start for row in plan.rows}
        for new in plan.new_sequences:
            self._follows.discard(new.slot)
            self._drafter.enter(new, starts[new.slot])

    def follow(self, buffers: StepBuffers, shape: StepShape) -> None:
        """Put the step's rows where their sequences truly end. Launches depend on the shape alone."""
        rows = shape.num_rows
        self._kernels.follow_rows(
            buffers.row_slots[:rows],
            buffers.offsets[:rows],
            self._lengths,
            buffers.starts[:rows],
            buffers.positions[:rows],
            buffers.decode_items[: shape.num_decode_items],
        )

    def verify(self, buffers: StepBuffers, shape: StepShape) -> None:
        """Take the drawn tokens up to the first that is not the guess there. Launches depend on the shape alone."""
        rows = shape.num_rows
        self._kernels.verify_rows(
            buffers.first_rows[:rows],
            buffers.num_drafts[:rows],
            buffers.row_slots[:rows],
            buffers.positions[:rows],
            buffers.cu_q[: rows + 1],
            buffers.input_ids[: shape.num_tokens],
            buffers.out[:rows],
            self._ready,
            self._lengths,
            self._counts[:rows],
            self._most,
            self._acceptance,
        )

    @property
    def reads_states(self) -> bool:
        """Whether `keep` must be given the states of all tokens."""
        return self._recent is not None

    def taps(self, num_tokens: int) -> Tensor | None:
        """What CausalLM.forward is to be given for so many tokens."""
        return None if self._recent is None else self._recent.taps(num_tokens)

    def keep(self, states: Tensor, buffers: StepBuffers, shape: StepShape) -> Tensor | None:
        """Keep what a draft head reads, and return that of the step. states: the taps, or the last hidden ones."""
        return None if self._recent is None else self._recent.keep(states, buffers, shape)

    def propose(
        self,
        rows: Sequence[PlanRow],
        asked: Sequence[int],
        token_ids: Tensor,
        features: Tensor | None,
        verdict: Tensor,
    ) -> None:
        """Make the guesses that are asked for, and put them into the slots. asked: see StepPlan.drafts. features: what
        `keep` returned.

        Written: verdict, int32 [rows, verdict_size], see `results`; of pinned memory, that nobody else uses until the
        step is done.
        """
        prompts = [row.slot not in self._follows for row in rows]
        self._follows.update(row.slot for row in rows if row.samples)
        num_rows = len(rows)
        drafts, found = self._drafts[:num_rows], self._found[:num_rows]
        slots = wanted = self._nobody[:num_rows]
        if not any(asked):
            self._drafter.skip(rows, prompts)
        else:
            wants = [(row.slot, count) if row.samples and count else (-1, 0) for row, count in zip(rows, asked)]
            words = np.full(self._asked.shape, -1, np.int32)
            words[:, :num_rows] = np.array(wants, np.int32).T
            self._copies.copy(words, self._asked)
            slots, wanted = self._asked[:, :num_rows]
            tables = self._lengths, token_ids, features
            self._drafter.propose(DeviceDraftBatch(rows, prompts, asked, slots, wanted, *tables, drafts, found))
        known = self._lengths, self._counts[:num_rows]
        self._kernels.place_drafts(slots, drafts, found, wanted, *known, self._ready, token_ids, verdict)
        self._copies.read()

    def record(self, token_ids: Tensor) -> None:
        """Record what the drafter needs, before the first step."""
        self._drafter.record(self._lengths, token_ids)

    @staticmethod
    def results(verdict: Ints, split: SplitRows, drawn: Sequence[RowResult]) -> list[RowResult]:
        """One result for each row of the plan that ran, from those of the rows that it was split into."""
        results = []
        for first, num_drafts, (count, num_found, *drafts) in zip(split.first_rows, split.num_drafts, verdict.tolist()):
            own = drawn[first : first + max(1, count)]
            if num_drafts < 0 or own[-1].error is not None:
                results.append(own[-1])
                continue
            token_ids = [token_id for result in own for token_id in result.token_ids]
            logprobs = [entry for result in own for entry in result.logprobs or ()]
            results.append(RowResult(token_ids, logprobs or None, draft_ids=tuple(drafts[:num_found])))
        return results
