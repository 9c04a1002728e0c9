"""The sampler of a GPU: every row is drawn inside the step's CUDA graph, and the few that need more once more.

Parameters live on the device, one record a slot; nothing here waits for the device before `rows_from_host`, but for
logits processors and the log-probabilities of prompts.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from octavo.kernels.triton import sampling as kernels
from octavo.kernels.triton.sampling_rows import bias_rows, count_tokens, penalize, top_logprobs
from octavo.kernels.triton.sampling_truncation import truncation_cuts
from octavo.protocol.plan import PlanRow, RowResult, TokenLogprobs
from octavo.protocol.sampling import SamplingParams
from octavo.worker.sampler.device_token_lists import DeviceTokenLists
from octavo.worker.sampler.sampler import failed
from octavo.worker.sampler.slots import SlotParams, slot_params
from octavo.worker.sampler.token_masks import apply_masks

Ints = NDArray[np.int32]

# Bits of a record's flags.
PENALIZED, BIASED, TRUNCATED, BARRED, LISTED, MASKED = 1, 2, 4, 8, 16, 32

# float32 copies of rows are made a few at a time: at most 256 MiB of them.
_MOST_ELEMENTS_AT_ONCE = 2**26
_NO_BIAS = (np.empty(0, np.int32), np.empty(0, np.float32))


@dataclass(frozen=True, slots=True, eq=False)
class More:
    """What `draw_more` leaves on the device for the host.

    logprobs: int32 [L, 3 + 2k] (see top_logprobs), of the rows in logprob_rows, each of which asked for its number of
    alternatives in num_logprobs; None where no row asked.
    """

    logprobs: Tensor | None
    logprob_rows: list[int]
    num_logprobs: list[int]


@dataclass(frozen=True, slots=True, eq=False)
class _Special:
    """A slot that at some position needs more than the plain draw.

    bias: ids and values that are always added. barred: the same with the ending tokens at -inf, and for positions
    below barred_until.
    """

    params: SlotParams
    flags: int
    bias: tuple[Ints, NDArray[np.float32]]
    barred: tuple[Ints, NDArray[np.float32]]
    barred_until: int

    def bias_at(self, position: int) -> tuple[Ints, NDArray[np.float32]]:
        return self.barred if position < self.barred_until else self.bias

    def is_processed(self, position: int) -> bool:
        """Whether the logits change before the draw."""
        return bool(self.flags & (PENALIZED | BIASED | LISTED | MASKED)) or position < self.barred_until

    def is_redrawn(self, position: int) -> bool:
        return bool(self.flags & TRUNCATED) or self.is_processed(position)


class DeviceSampler:
    """Owns the sampling state of every slot but the records, which the runner uploads; it is their only maker.

    max_num_seqs: slots. A row's draw is a function of its own logits, parameters, tokens and position.
    """

    def __init__(self, max_num_seqs: int, vocab_size: int, device: torch.device) -> None:
        self._max_num_seqs = max_num_seqs
        self._vocab_size = vocab_size
        self._device = device
        self._special: dict[int, _Special] = {}
        self._lists = DeviceTokenLists(device)
        # One a row, of the step that is being launched; written by `set_masks`.
        self._masks: list[bytes | None] = []
        # Rows of the table of counts, by slot; those of slots that entered since they last drew are not filled yet.
        self._penalty_rows: dict[int, int] = {}
        self._free_penalty_rows: list[int] = []
        self._unfilled: set[int] = set()
        self._seen = torch.zeros(0, vocab_size, dtype=torch.int32, device=device)

    def set_slot(
        self,
        slot: int,
        sampling: SamplingParams,
        eos_token_ids: tuple[int, ...],
        token_ids: list[int],
        num_prompt_tokens: int,
    ) -> Ints:
        """A sequence enters a slot; the record, int32 [16], that must be at params[slot] when it draws.

        No work for the device: the counts that penalties need are made at the slot's first `draw_more`, from the
        tokens that the device's table holds by then. Raises ValueError without a seed, or for tokens or a slot
        that do not exist.
        """
        if not 0 <= slot < self._max_num_seqs:
            raise ValueError(f"slot={slot} is out of range; allowed: 0..{self._max_num_seqs - 1}")
        if not 0 <= num_prompt_tokens <= len(token_ids):
            raise ValueError(f"num_prompt_tokens={num_prompt_tokens} is out of range; allowed: 0..{len(token_ids)}")
        params = slot_params(sampling, eos_token_ids, num_prompt_tokens, self._vocab_size)
        self._lists.set_slot(slot, params)
        special = _special(params)
        if special.flags or params.num_logprobs is not None:
            self._special[slot] = special
        else:
            self._special.pop(slot, None)
        return _record(params, special.flags, self._penalty_row(slot, params.is_penalized))

    def draw(
        self,
        logits: Tensor,
        row_slots: Tensor,
        positions: Tensor,
        params: Tensor,
        samples: Tensor,
        token_ids_table: Tensor,
        out: Tensor,
    ) -> None:
        """The plain draw of every row, for a CUDA graph: see `octavo.kernels.triton.sampling.draw_tokens`."""
        kernels.draw_tokens(logits, row_slots, positions, params, samples, token_ids_table, out)

    def set_masks(self, rows: Iterable[PlanRow]) -> None:
        """The rows of the step whose `draw_more` comes next: their masks say which tokens may be drawn."""
        # A slot with masks is special: where none is, no row is looked at.
        self._masks = [row.masks[0] if row.masks is not None else None for row in rows] if self._special else []

    def needs_more(self, slots: Sequence[int], positions: Sequence[int]) -> list[int]:
        """The rows that `draw_more` must see. slots: of all rows, -1 where one draws nothing; positions: of draws."""
        if not self._special:
            return []
        found = []
        for row, slot in enumerate(slots):
            special = self._special.get(slot)
            if special and (special.params.num_logprobs is not None or special.is_redrawn(positions[row])):
                found.append(row)
        return found

    @torch.inference_mode()
    def draw_more(
        self,
        logits: Tensor,
        rows: list[int],
        slots: Sequence[int],
        positions: Sequence[int],
        params: Tensor,
        token_ids_table: Tensor,
        out: Tensor,
        true_positions: Tensor | None = None,
    ) -> More:
        """Draw the rows that `needs_more` named once more, after `draw`, and find their log-probabilities.

        logits: [R, V], left as they are. slots, positions: of all rows, on the host. params, token_ids_table, out:
        as for `draw`; the table and out are overwritten for the rows whose draw is not the plain one. Rows of one slot
        follow each other, each as if what is drawn before it were the sequence's. true_positions: int32 [R], where
        those of the host are upper bounds; they are right for slots whose draws depend on the output.
        """
        tables = _Tables(logits, params, token_ids_table, out, true_positions)
        redrawn = [r for r in rows if self._special[slots[r]].is_redrawn(positions[r])]
        processed = [r for r in redrawn if self._special[slots[r]].is_processed(positions[r])]
        if truncated := sorted(set(redrawn).difference(processed)):
            self._redraw(tables, truncated, slots, positions)
        step = max(1, _MOST_ELEMENTS_AT_ONCE // self._vocab_size)
        rounds = self._rounds(processed, slots)
        for some in rounds:
            for begin in range(0, len(some), step):
                self._process_and_redraw(tables, some[begin : begin + step], slots, positions)
        # What was counted there may turn out not to be of the output.
        repeated = {slots[row] for some in rounds[1:] for row in some}
        self._unfilled |= repeated & self._penalty_rows.keys()
        return self._logprobs(tables, rows, slots)

    def _rounds(self, rows: list[int], slots: Sequence[int]) -> list[list[int]]:
        """The rows, in turns where a slot's draw depends on the one before it."""
        rounds: list[list[int]] = [[]]
        counts: dict[int, int] = {}
        for row in rows:
            slot, turn = slots[row], 0
            if self._special[slot].flags & (PENALIZED | LISTED):
                turn = counts.get(slot, 0)
                counts[slot] = turn + 1
            if turn == len(rounds):
                rounds.append([])
            rounds[turn].append(row)
        return rounds

    def pack_more(self, out: Tensor, more: More | None) -> Tensor:
        """All that the host needs of a step in one tensor, for one copy; int32, flat."""
        if more is None or more.logprobs is None:
            return out.flatten()
        return torch.cat([out.flatten(), more.logprobs.flatten()])

    def rows_from_host(self, host: Ints, samples: Sequence[bool], more: More | None) -> list[RowResult]:
        """RowResults of the first len(samples) rows. host: what `pack_more` made, copied; int32, flat."""
        draws = host[: 2 * len(samples)].tolist()
        logprobs = {} if more is None else _host_logprobs(host, more)
        results = []
        for row, drawn in enumerate(samples):
            if not drawn:
                results.append(RowResult(token_ids=[]))
            elif draws[2 * row + 1]:
                results.append(failed(draws[2 * row + 1]))
            else:
                results.append(RowResult(token_ids=[draws[2 * row]], logprobs=logprobs.get(row)))
        return results

    @torch.inference_mode()
    def prompt_logprobs(self, logits: Tensor, targets: Tensor, num: int) -> list[TokenLogprobs]:
        """Of the prompt's own tokens: targets[i], [n], under logits[i], [n, V]; num alternatives each. Waits."""
        rows = torch.arange(targets.shape[0], dtype=torch.int32, device=logits.device)
        packed = top_logprobs(logits, rows, targets.int(), min(num, self._vocab_size))
        return [_token_logprobs(record, num) for record in packed.cpu().numpy()]

    def _penalty_row(self, slot: int, is_penalized: bool) -> int:
        """The slot's row of counts, taken or kept; -1, with the row given back, where it has no penalties."""
        self._unfilled.discard(slot)
        if not is_penalized:
            if slot in self._penalty_rows:
                self._free_penalty_rows.append(self._penalty_rows.pop(slot))
            return -1
        self._unfilled.add(slot)
        if slot not in self._penalty_rows:
            taken = len(self._penalty_rows)
            self._penalty_rows[slot] = self._free_penalty_rows.pop() if self._free_penalty_rows else taken
        return self._penalty_rows[slot]

    def _fill_counts(self, tables: _Tables, slots: list[int], positions: list[int]) -> None:
        """Count the tokens of slots that draw with penalties for the first time."""
        num_rows = 1 + max(self._penalty_rows.values())
        if num_rows > self._seen.shape[0]:
            grown = torch.zeros(
                max(num_rows, 2 * self._seen.shape[0]), self._vocab_size, dtype=torch.int32, device=self._device
            )
            grown[: self._seen.shape[0]] = self._seen
            self._seen = grown
        for slot in slots:
            self._seen[self._penalty_rows[slot]].zero_()
        row_slots, num_tokens = _upload([_ints(slots), _ints(positions)], self._device)
        count_tokens(row_slots, num_tokens, max(positions), tables.params, tables.token_ids, self._seen)
        self._unfilled.difference_update(slots)

    def _redraw(self, tables: _Tables, rows: list[int], slots: Sequence[int], positions: Sequence[int]) -> None:
        """Rows whose logits stay as they are, read where they lie."""
        own_slots = [slots[r] for r in rows]
        own_positions = [positions[r] for r in rows]
        target, row_slots, at = _upload([_ints(rows), _ints(own_slots), _ints(own_positions)], self._device)
        self._draw_kept(tables, tables.logits, target, (target, row_slots, tables.true(at, target)), is_truncated=True)

    def _process_and_redraw(
        self, tables: _Tables, rows: list[int], slots: Sequence[int], positions: Sequence[int]
    ) -> None:
        """Rows whose logits change: in float32 copies, biased, then penalized."""
        own_slots, own_positions = [slots[r] for r in rows], [positions[r] for r in rows]
        specials = [self._special[slot] for slot in own_slots]
        unfilled = [i for i, slot in enumerate(own_slots) if slot in self._unfilled]
        if unfilled:
            self._fill_counts(tables, [own_slots[i] for i in unfilled], [own_positions[i] for i in unfilled])
        biases = [special.bias_at(position) for special, position in zip(specials, own_positions)]
        offsets = np.cumsum([0, *(ids.size for ids, _ in biases)], dtype=np.int32)
        target, source, row_slots, at, where, ids, values = _upload(
            [
                _ints(rows),
                np.arange(len(rows), dtype=np.int32),
                _ints(own_slots),
                _ints(own_positions),
                offsets,
                np.concatenate([ids for ids, _ in biases]),
                np.concatenate([values for _, values in biases]).view(np.int32),
            ],
            self._device,
        )
        is_penalized = any(special.flags & PENALIZED for special in specials)
        is_biased = bool(offsets[-1])
        copies = torch.empty(len(rows), self._vocab_size, dtype=torch.float32, device=self._device)
        comes_before = is_biased or self._lists.has_processors(own_slots)
        seen = self._seen if is_penalized and not comes_before else None
        penalize(tables.logits, target, row_slots, tables.params, seen, copies)
        self._lists.process(copies, own_slots, own_positions, tables.token_ids)
        if is_biased:
            bias_rows(copies, where, ids, values.view(torch.float32))
        if is_penalized and comes_before:
            penalize(copies, source, row_slots, tables.params, self._seen, copies)
        self._lists.bar(copies, own_slots, own_positions, tables.token_ids)
        apply_masks(copies, [self._masks[r] for r in rows] if self._masks else [])
        is_truncated = any(special.flags & TRUNCATED for special in specials)
        self._draw_kept(tables, copies, source, (target, row_slots, tables.true(at, target)), is_truncated)

    def _draw_kept(
        self, tables: _Tables, logits: Tensor, source: Tensor, where: tuple[Tensor, Tensor, Tensor], is_truncated: bool
    ) -> None:
        """where: rows of out, slots, positions; int32 [n] each."""
        target, row_slots, positions = where
        cuts = truncation_cuts(logits, source, row_slots, tables.params) if is_truncated else None
        kernels.redraw_tokens(
            logits, source, target, row_slots, positions, tables.params, cuts, self._seen, tables.token_ids, tables.out
        )

    def _logprobs(self, tables: _Tables, rows: list[int], slots: Sequence[int]) -> More:
        asked = {r: n for r in rows if (n := self._special[slots[r]].params.num_logprobs) is not None}
        if not asked:
            return More(None, [], [])
        num = min(max(asked.values()), self._vocab_size)
        [where] = _upload([_ints(list(asked))], self._device)
        found = top_logprobs(tables.logits, where, tables.out[:, 0], num)
        for index, row in enumerate(asked):
            if ids := self._special[slots[row]].params.logprob_ids:
                [chosen] = _upload([_ints(list(ids))], self._device)
                values = tables.logits[row].float().log_softmax(-1)[chosen.long()]
                found[index, 2 : 2 + len(ids)] = chosen
                found[index, 3 + num : 3 + num + len(ids)] = values.view(torch.int32)
        return More(found, list(asked), list(asked.values()))


@dataclass(frozen=True, slots=True, eq=False)
class _Tables:
    """The device's side of a call: logits of all rows, and what belongs to the runner."""

    logits: Tensor
    params: Tensor
    token_ids: Tensor
    out: Tensor
    positions: Tensor | None  # true ones

    def true(self, positions: Tensor, rows: Tensor) -> Tensor:
        """The positions of these rows. positions: as the host has them; rows: int32 [n]."""
        return positions if self.positions is None else self.positions[rows.long()]


def _special(params: SlotParams) -> _Special:
    truncated = params.temperature > 0 and (params.top_k > 1 or (params.top_k != 1 and _has_top_p_or_min_p(params)))
    bias = (params.bias_ids.astype(np.int32), params.bias_values) if params.bias_ids.size else _NO_BIAS
    barred, barred_until = bias, 0
    if params.min_tokens and params.stop_ids.size:
        others = ~np.isin(params.bias_ids, params.stop_ids)
        ids = np.concatenate([params.stop_ids, params.bias_ids[others]]).astype(np.int32)
        minus_infinity = np.full(params.stop_ids.size, -np.inf, dtype=np.float32)
        barred = (ids, np.concatenate([minus_infinity, params.bias_values[others]]))
        barred_until = params.num_prompt_tokens + params.min_tokens
    flags = (
        PENALIZED * params.is_penalized
        | BIASED * bool(params.bias_ids.size)
        | TRUNCATED * truncated
        | BARRED * bool(barred_until)
        | LISTED * params.is_listed
        | MASKED * params.is_masked
    )
    return _Special(params, flags, bias, barred, barred_until)


def _has_top_p_or_min_p(params: SlotParams) -> bool:
    return params.top_p < 1 or params.min_p > 0


def _record(params: SlotParams, flags: int, penalty_row: int) -> Ints:
    """The words that `octavo.kernels.triton.sampling` names. A top_k of 1 is written as temperature 0."""
    record = np.zeros(kernels.NUM_PARAMS, dtype=np.int32)
    floats = record.view(np.float32)
    floats[kernels.TEMPERATURE] = 0.0 if params.top_k == 1 else params.temperature
    floats[kernels.TOP_P] = params.top_p
    floats[kernels.MIN_P] = params.min_p
    floats[kernels.REPETITION] = params.repetition_penalty
    floats[kernels.FREQUENCY] = params.frequency_penalty
    floats[kernels.PRESENCE] = params.presence_penalty
    words = record.view(np.uint32)
    words[kernels.STREAM_LOW] = params.random_stream & 0xFFFFFFFF
    words[kernels.STREAM_HIGH] = params.random_stream >> 32
    record[kernels.TOP_K] = params.top_k
    record[kernels.NUM_PROMPT_TOKENS] = params.num_prompt_tokens
    record[kernels.MIN_TOKENS] = min(params.min_tokens, 2**31 - 1)
    record[kernels.FLAGS] = flags
    record[kernels.NUM_LOGPROBS] = -1 if params.num_logprobs is None else params.num_logprobs
    record[kernels.PENALTY_ROW] = penalty_row
    return record


def _host_logprobs(host: Ints, more: More) -> dict[int, list[TokenLogprobs]]:
    """By row, from the end of what `pack_more` made."""
    if more.logprobs is None:
        return {}
    records = host[host.size - more.logprobs.numel() :].reshape(more.logprobs.shape)
    wishes = zip(more.logprob_rows, records, more.num_logprobs)
    return {row: [_token_logprobs(record, num)] for row, record, num in wishes}


def _token_logprobs(record: Ints, num: int) -> TokenLogprobs:
    """A row of top_logprobs' result; num: the alternatives that were asked for."""
    ids, logprobs = np.split(record[1:], 2)
    return TokenLogprobs(ids[: 1 + num].tolist(), logprobs.view(np.float32)[: 1 + num].tolist(), int(record[0]))


def _ints(values: list[int]) -> Ints:
    return np.array(values, dtype=np.int32)


def _upload(arrays: list[Ints], device: torch.device) -> list[Tensor]:
    """int32 arrays on the device, in one copy that does not wait. Each starts at a multiple of 16 bytes: Triton
    compiles a kernel anew for a pointer that does not."""
    starts = np.cumsum([0, *(-(-array.size // 4) * 4 for array in arrays)])
    packed = torch.empty(int(starts[-1]), dtype=torch.int32, pin_memory=device.type == "cuda")
    host = packed.numpy()
    for start, array in zip(starts, arrays):
        host[start : start + array.size] = array
    copied = packed.to(device, non_blocking=True)
    return [copied[start : start + array.size] for start, array in zip(starts.tolist(), arrays)]
