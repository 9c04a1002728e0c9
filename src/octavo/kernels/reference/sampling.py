"""Sampling in plain torch, float64 and full sorts: the oracles of the fused kernels.

A row's parameters are given one by one here; lists have an entry a row.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MASK = 2**32 - 1
_GOLDEN = 0x9E3779B9
_MULTIPLIERS = (0x21F0AAAD, 0x735A2D97)
_REACHED = 1 - 1e-6  # of top_p, where it counts as reached


def _mixed(state: int) -> int:
    state ^= state >> 16
    state = state * _MULTIPLIERS[0] & _MASK
    state ^= state >> 15
    state = state * _MULTIPLIERS[1] & _MASK
    return state ^ (state >> 15)


def random_words(num: int, stream: int, position: int) -> Tensor:
    """The 32 random bits of tokens 0..num-1 at a position of a stream (uint64); int64 [num]."""
    low, high = stream & _MASK, stream >> 32
    at = _mixed((low + position * _GOLDEN) & _MASK)
    key_0, key_1 = _mixed((high + at) & _MASK), _mixed((at + _GOLDEN) & _MASK)
    state = (torch.arange(num) + key_0) & _MASK
    state ^= state >> 16
    state = (state * _MULTIPLIERS[0] + key_1) & _MASK  # below 2**62: int64 does not overflow
    state ^= state >> 15
    state = state * _MULTIPLIERS[1] & _MASK
    return state ^ (state >> 15)


def gumbel_scores(logits: Tensor, temperature: float, stream: int, position: int) -> Tensor:
    """x - T log(E), whose largest is drawn; float64 [V]. logits: [V]. E = -log(1 - u), u = (word + 1/2) / 2**32."""
    if temperature == 0:
        return logits.double()
    uniforms = (random_words(logits.shape[0], stream, position).double() + 0.5) * 2.0**-32
    return logits.double() - temperature * (-torch.log1p(-uniforms)).log()


def draw_tokens(
    logits: Tensor, temperatures: list[float], streams: list[int], positions: list[int]
) -> tuple[Tensor, Tensor]:
    """(tokens, int64 [R], the lowest id of equal scores; bad, bool [R], whose tokens are 0). logits: [R, V]."""
    return redraw_tokens(logits, torch.ones_like(logits, dtype=torch.bool), temperatures, streams, positions)


def redraw_tokens(
    logits: Tensor, kept: Tensor, temperatures: list[float], streams: list[int], positions: list[int]
) -> tuple[Tensor, Tensor]:
    """As draw_tokens, among the kept tokens, bool [R, V], alone."""
    bad = ~logits.float().amax(-1).isfinite()
    scores = [gumbel_scores(*row) for row in zip(logits, temperatures, streams, positions)]
    return torch.stack(scores).masked_fill(~kept, -torch.inf).argmax(-1).masked_fill(bad, 0), bad


def truncation_cuts(logits: Tensor, temperature: float, top_k: int, top_p: float, min_p: float) -> Tensor:
    """The tokens of one row, [V], that are kept; bool [V]. Temperature > 0; top_k 0, top_p 1, min_p 0 are off."""
    values = logits.double()
    weights = ((values - values.max()) / temperature).exp()
    order = values.sort(descending=True, stable=True).indices
    if top_k:
        order = order[:top_k]
    order = order[weights[order] >= min_p]
    if top_p < 1:
        cumulative = weights[order].cumsum(0)
        order = order[: int((cumulative <= top_p * _REACHED * cumulative[-1]).sum()) + 1]
    kept = torch.zeros_like(logits, dtype=torch.bool)
    kept[order] = True
    return kept


def count_tokens(token_ids: list[int], num_prompt_tokens: int, vocab_size: int) -> Tensor:
    """2 * (times in the output) + (whether in the prompt), of every token; int32 [V]."""
    output = torch.tensor(token_ids[num_prompt_tokens:], dtype=torch.int64)
    counts = torch.bincount(output, minlength=vocab_size).mul_(2)
    counts[sorted(set(token_ids[:num_prompt_tokens]))] += 1
    return counts.int()


def penalize(logits: Tensor, seen: Tensor, repetition: float, frequency: float, presence: float) -> Tensor:
    """The penalized logits of one row, float32 [V]; seen: as count_tokens makes it."""
    values, count = logits.float(), seen // 2
    repeated = torch.where(values > 0, values / repetition, values * repetition)
    values = torch.where(seen > 0, repeated, values)
    return values - frequency * count - presence * (count > 0)


def bias_rows(logits: Tensor, biases: list[dict[int, float]]) -> Tensor:
    """logits, [n, V], plus each row's biases by token id."""
    result = logits.clone()
    for row, bias in zip(result, biases):
        for token, value in bias.items():
            row[token] += value
    return result


def top_logprobs(logits: Tensor, tokens: Tensor, num: int) -> tuple[Tensor, Tensor, Tensor]:
    """(ranks [n], ids [n, 1 + num], log-probabilities, float64 [n, 1 + num]). logits: [n, V]; tokens: int64 [n]."""
    values = logits.double()
    own = tokens[:, None]
    ids = torch.cat([own, values.sort(dim=-1, descending=True, stable=True).indices[:, :num]], -1)
    ranks = (values > values.gather(-1, own)).sum(-1) + 1
    return ranks, ids, values.log_softmax(-1).gather(-1, ids)
