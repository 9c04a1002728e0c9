"""The sampler: which step runs on which rows, and the order of the steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from octavo.protocol.plan import RowResult, TokenLogprobs
from octavo.protocol.sampling import SamplingParams
from octavo.worker.sampler import temperature, top_k, top_p
from octavo.worker.sampler.histories import Histories
from octavo.worker.sampler.logit_bias import add_bias
from octavo.worker.sampler.logprobs import Logprobs, concatenate, gather_logprobs, pack, to_protocol
from octavo.worker.sampler.min_tokens import bar_stops
from octavo.worker.sampler.penalties import Penalties
from octavo.worker.sampler.random import uniform
from octavo.worker.sampler.rows import random_rows
from octavo.worker.sampler.slots import SlotParams, slot_params
from octavo.worker.sampler.token_masks import apply_masks

Masks = list[bytes | None]
Method = Literal["greedy", "all", "top_k", "top_p"]
_DRAWS = {"all": temperature.draw, "top_k": top_k.draw, "top_p": top_p.draw}

# Rows are worked on a few at a time, so that their scratch fits a core's cache, and is bounded elsewhere.
_ELEMENTS_AT_ONCE = {"cpu": 2**19}
_MOST_ELEMENTS_AT_ONCE = 2**26

_FAILURES = {
    1: "the model's output for this request, or what logits_processors made of it, is not a number",
    2: "no token is possible: allowed_token_ids, bad_words, min_tokens and structured outputs together exclude all",
}


def failed(reason: int) -> RowResult:
    """Of a row that draws nothing. reason: 1 where the logits hold NaN or +inf or no finite one, which is the model's
    doing; 2 where masks leave no finite one, which is the request's."""
    return RowResult(token_ids=[], error=_FAILURES[reason], refused=reason == 2)


@dataclass(frozen=True, slots=True, eq=False)
class Sampled:
    """What one call of `Sampler.sample` drew, on the device.

    token_ids: int64 [R]. bad: int8 [R], why a row has no distribution, see `failed`, or 0; such a row's token is 0.
    logprobs: of the rows in logprob_rows, in their order, each of which asked for its number in
    num_logprobs; None where no row asked.
    """

    token_ids: Tensor
    bad: Tensor
    logprobs: Logprobs | None
    logprob_rows: list[int]
    num_logprobs: list[int]


class Sampler:
    """Turns logits into tokens. Owns the sampling state of every slot and is its only writer.

    max_num_seqs: slots. What a row draws is a function of its own logits, parameters, tokens and
    position: neighbours, preemption and replay change nothing. On a GPU nothing here waits for it.
    """

    def __init__(self, max_num_seqs: int, vocab_size: int, device: torch.device) -> None:
        self._vocab_size = vocab_size
        self._slots: list[SlotParams | None] = [None] * max_num_seqs
        self._penalties = Penalties(vocab_size, device)
        self._histories = Histories()

    @torch.inference_mode()
    def set_slot(
        self,
        slot: int,
        sampling: SamplingParams,
        eos_token_ids: tuple[int, ...],
        token_ids: list[int],
        num_prompt_tokens: int,
    ) -> None:
        """A sequence enters a slot: a new one, or one that comes back with the output it had.

        token_ids: all its tokens so far, the prompt first. Raises ValueError if it has no seed.
        """
        params = slot_params(sampling, eos_token_ids, num_prompt_tokens, self._vocab_size)
        self._slots[slot] = params
        self._histories.set_slot(slot, params, token_ids)
        if params.is_penalized:
            self._penalties.set_slot(slot, token_ids[:num_prompt_tokens], token_ids[num_prompt_tokens:])

    @torch.inference_mode()
    def sample(self, logits: Tensor, slots: list[int], positions: list[int], masks: Masks | None = None) -> Sampled:
        """Draw one token for each row, and count it where the slot has penalties.

        logits: [R, V], R >= 1, bfloat16 or float32, left as they are. slots: distinct, set before.
        positions: of the tokens being drawn in their sequences, so output index + num_prompt_tokens.
        masks: one a row, as in PlanRow; None where no row has one.
        Raises ValueError for a slot that was never set.
        """
        params = [self._params(slot) for slot in slots]
        asked = {row: p.num_logprobs for row, p in enumerate(params) if p.num_logprobs is not None}
        num_alternatives = max(asked.values(), default=0)
        drawn, logprobs = [], []
        step = _rows_at_once(logits)
        for begin in range(0, len(slots), step):
            some = slice(begin, begin + step)
            own_masks = masks[some] if masks is not None else []
            drawn.append(self._sample_some(logits[some], slots[some], params[some], positions[some], own_masks))
            if wanted := [row - begin for row in asked if begin <= row < begin + step]:
                raw, tokens = _take((logits[some], drawn[-1][0]), wanted)
                chosen = [params[begin + row].logprob_ids for row in wanted]
                logprobs.append(gather_logprobs(raw, tokens, num_alternatives, chosen))
        token_ids, bad = (torch.cat(column) for column in zip(*drawn))
        return Sampled(token_ids, bad, concatenate(logprobs) if asked else None, list(asked), list(asked.values()))

    def _sample_some(
        self, logits: Tensor, slots: list[int], params: list[SlotParams], positions: list[int], masks: Masks
    ) -> tuple[Tensor, Tensor]:
        """Token ids and bad, of rows few enough to be worked on at once."""
        processed = self._process(logits, slots, params, positions, masks)
        row_max = processed.amax(-1, keepdim=True).float()
        bad = ~row_max.isfinite().squeeze(-1)  # amax hands on NaN; +inf has no softmax either
        # A masked or biased NaN is still one.
        is_model = bad if processed is logits else ~logits.amax(-1).isfinite()
        bad = bad | is_model
        token_ids = _draw(processed, row_max, bad, params, positions)
        self._penalties.count(slots, params, token_ids)
        self._histories.append(slots, token_ids)
        is_masked = ~is_model & (row_max == -torch.inf).squeeze(-1)
        return token_ids, bad.to(torch.int8) + is_masked

    def to_rows(self, sampled: Sampled) -> list[RowResult]:
        """Bring a sample to the host, in one copy: a RowResult a row. Waits for the device."""
        parts = [sampled.token_ids.double(), sampled.bad.double()]
        if sampled.logprobs is not None:
            parts.append(pack(sampled.logprobs).flatten())
        host = torch.cat(parts).tolist()
        num_rows = sampled.token_ids.shape[0]
        token_ids, bad, packed = host[:num_rows], host[num_rows : 2 * num_rows], host[2 * num_rows :]
        width = len(packed) // max(1, len(sampled.logprob_rows))
        entries = [packed[i : i + width] for i in range(0, len(packed), width or 1)]
        logprobs = dict(zip(sampled.logprob_rows, to_protocol(entries, sampled.num_logprobs)))
        return [
            failed(int(bad[row]))
            if bad[row]
            else RowResult(token_ids=[int(token_ids[row])], logprobs=[logprobs[row]] if row in logprobs else None)
            for row in range(num_rows)
        ]

    @torch.inference_mode()
    def prompt_logprobs(self, logits: Tensor, targets: Tensor, num: int) -> list[TokenLogprobs]:
        """Of the prompt's own tokens: targets[i], int64 [n], under logits[i], [n, V]; num alternatives each."""
        return to_protocol(pack(gather_logprobs(logits, targets, num)).tolist(), [num] * targets.shape[0])

    def _params(self, slot: int) -> SlotParams:
        params = self._slots[slot]
        if params is None:
            raise ValueError(f"slot {slot} was never set")
        return params

    def _process(
        self, logits: Tensor, slots: list[int], params: list[SlotParams], positions: list[int], masks: Masks
    ) -> Tensor:
        """The logits that tokens are drawn from: a float32 copy where any row changes them."""
        if not any(masks) and not any(
            p.is_penalized or p.bias_ids.size or p.is_listed or p.bars_stops(at) for p, at in zip(params, positions)
        ):
            return logits
        processed = logits.to(torch.float32, copy=True)
        self._histories.process(processed, slots, params)
        bar_stops(processed, params, positions)
        add_bias(processed, params)
        self._penalties.apply(processed, slots, params)
        self._histories.bar(processed, slots, params)  # last or first is the same: -inf stays what it is
        apply_masks(processed, masks)
        return processed


def _rows_at_once(logits: Tensor) -> int:
    return max(1, _ELEMENTS_AT_ONCE.get(logits.device.type, _MOST_ELEMENTS_AT_ONCE) // logits.shape[-1])


def _method(params: SlotParams) -> Method:
    if params.temperature == 0 or params.top_k == 1:
        return "greedy"
    if params.top_k:
        return "top_k"
    return "top_p" if params.top_p < 1 else "all"


def _draw(logits: Tensor, row_max: Tensor, bad: Tensor, params: list[SlotParams], positions: list[int]) -> Tensor:
    """Token ids, int64 [R], 0 for bad rows. Rows are grouped by method: none pays for another's."""
    groups: dict[Method, list[int]] = {}
    for row, p in enumerate(params):
        groups.setdefault(_method(p), []).append(row)
    token_ids = torch.zeros_like(bad, dtype=torch.int64)
    for method, rows in groups.items():
        group_logits, group_max, group_bad = _take((logits, row_max, bad), rows)
        if method == "greedy":
            found = argmax(group_logits)
        else:
            own = [params[r] for r in rows]
            uniforms = [uniform(p.random_stream, positions[r]) for p, r in zip(own, rows)]
            calm = _calm(group_logits, group_max, group_bad)
            found = _DRAWS[method](random_rows(*calm, own, uniforms)).squeeze(-1)
        if len(rows) == len(params):
            token_ids = found
        else:
            token_ids[torch.tensor(rows, device=bad.device)] = found
    return token_ids.masked_fill(bad, 0)


def argmax(logits: Tensor) -> Tensor:
    """The first of the largest logits of each row, a NaN before all; int64 [R]. logits: [R, V]."""
    if logits.device.type == "cpu":
        # numpy's is vectorized: 15 times as fast on bfloat16, the conversion included.
        return torch.from_numpy(logits.float().numpy().argmax(-1))
    return logits.argmax(-1)


def _calm(logits: Tensor, row_max: Tensor, bad: Tensor) -> tuple[Tensor, Tensor]:
    """The rows with zeros in place of bad ones, whose values would index out of every table."""
    if bad.device.type == "cpu" and not bool(bad.any()):
        return logits, row_max
    return logits.masked_fill(bad[:, None], 0.0), row_max.masked_fill(bad[:, None], 0.0)


def _take(tensors: tuple[Tensor, ...], rows: list[int]) -> tuple[Tensor, ...]:
    """These rows, ascending, of each tensor; the tensors themselves where that is all of them."""
    if len(rows) == tensors[0].shape[0]:
        return tensors
    index = torch.tensor(rows, device=tensors[0].device)
    return tuple(t[index] for t in tensors)
