"""Log-probabilities from the raw distribution: the logits as the model gave them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from octavo.protocol.plan import PlanRow, TokenLogprobs
from octavo.protocol.sampling import SamplingParams
from octavo.worker.sampler.top_k import stable_topk


@dataclass(frozen=True, slots=True, eq=False)
class Logprobs:
    """Of L positions, on the device; k is the most alternatives that any of them asked for.

    token_ids: int64 [L, 1 + k], the position's own token, then the ones that were chosen, or the most likely ones in
    descending order (equal ones by id). logprobs: float32 [L, 1 + k]. ranks: int64 [L], 1 + the number of
    tokens that are more likely than the position's own.
    """

    token_ids: Tensor
    logprobs: Tensor
    ranks: Tensor


def num_prompt_targets(row: PlanRow, sampling: SamplingParams, num_prompt_tokens: int) -> int:
    """How many of the prompt's tokens the row's first tokens predict, where their logprobs are asked for."""
    if sampling.prompt_logprobs is None:
        return 0
    return max(0, min(row.length, num_prompt_tokens - 1 - row.start))


def gather_logprobs(
    logits: Tensor, token_ids: Tensor, num_alternatives: int, chosen: Sequence[tuple[int, ...]] = ()
) -> Logprobs:
    """logits: [L, V], model dtype. token_ids: int64 [L]. num_alternatives: >= 0.

    chosen: for each position the alternatives' ids, at most num_alternatives, or () for the most likely ones.
    """
    values = logits.float()
    own = token_ids[:, None]
    alternatives = stable_topk(values, min(num_alternatives, values.shape[-1]))
    for row, ids in enumerate(chosen):
        if ids:
            alternatives[row, : len(ids)] = torch.tensor(ids, device=values.device)
    ids = torch.cat([own, alternatives], dim=-1)
    logprobs = values.log_softmax(-1).gather(-1, ids)
    ranks = (values > values.gather(-1, own)).sum(-1) + 1
    return Logprobs(ids, logprobs, ranks)


def concatenate(parts: list[Logprobs]) -> Logprobs:
    """One after the other; all with the same k."""
    return Logprobs(
        torch.cat([p.token_ids for p in parts]),
        torch.cat([p.logprobs for p in parts]),
        torch.cat([p.ranks for p in parts]),
    )


def to_protocol(packed: list[list[float]], num_alternatives: list[int]) -> list[TokenLogprobs]:
    """Rows of `pack`, brought to the host, as protocol objects; num_alternatives: what each asked for."""
    found = []
    for (rank, *rest), num in zip(packed, num_alternatives):
        half = len(rest) // 2
        ids, logprobs = rest[:half][: 1 + num], rest[half:][: 1 + num]
        found.append(TokenLogprobs([int(i) for i in ids], logprobs, int(rank)))
    return found


def pack(logprobs: Logprobs) -> Tensor:
    """All of it in one tensor, for one copy; float64 [L, 1 + 2 (1 + k)], which holds every int exactly."""
    return torch.cat([logprobs.ranks[:, None].double(), logprobs.token_ids.double(), logprobs.logprobs.double()], -1)
