"""Beam search (Lowerre 1976; length normalization as in Wu et al. 2016): the policy, told log-probabilities."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from octavo.protocol.beam_search import BeamSearchParams
from octavo.protocol.fields import ALTERNATIVES
from octavo.protocol.lora import LoRARequest
from octavo.protocol.outputs import FinishReason, TokenOutput
from octavo.protocol.plan import TokenLogprobs
from octavo.protocol.request import Request
from octavo.protocol.sampling import SamplingParams
from octavo.text.generation import Generation
from octavo.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Beam:
    """An output, or the beginning of one.

    token_ids: of the output, an end of sequence included. logprobs: one entry a token, that of the token first.
    cumulative_logprob: the sum over its tokens; score: what ended ones are ranked by.
    ends: whether its last token is an end of sequence.
    """

    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    cumulative_logprob: float = 0.0
    score: float = 0.0
    ends: bool = False

    def generation(
        self,
        tokenizer: Tokenizer | None,
        sampling: SamplingParams,
        prompt_token_ids: Sequence[int],
        num_cached_tokens: int = 0,
    ) -> Generation:
        """The output as a front end's completion, with text as `sampling` wants it."""
        plain = sampling.replace(
            n=1, best_of=None, use_beam_search=False, length_penalty=1.0, early_stopping=False, logprobs=0
        )
        generation = Generation(tokenizer, plain, prompt_token_ids)
        reason: FinishReason = "stop" if self.ends else "length"
        generation.push(
            TokenOutput(
                "",
                list(self.token_ids),
                list(self.logprobs),
                finish_reason=reason,
                num_cached_tokens=num_cached_tokens,
            )
        )
        return generation


class BeamSearch:
    """One prompt's search. `advance` is its only writer.

    running: the most likely beginnings, best first. ended: the best outputs so far, best first.
    num_candidates: how many of the most likely tokens `advance` needs of each running beam: of the best beam_width
    that do not end, none is rarer, since only the ends of sequence may come before it.
    """

    def __init__(self, params: BeamSearchParams, eos_token_ids: Sequence[int]) -> None:
        """Raises ValueError where the engine cannot tell as many candidates as the beams need."""
        self._params = params
        self._num_steps = 0
        self._eos_token_ids = frozenset(() if params.ignore_eos else eos_token_ids)
        self.num_candidates = params.beam_width + len(self._eos_token_ids)
        if self.num_candidates > ALTERNATIVES.high:
            num_ends = len(self._eos_token_ids)
            raise ValueError(
                f"beam_width={params.beam_width} is out of range; allowed: 1..{ALTERNATIVES.high - num_ends} "
                f"for a model with {num_ends} end-of-sequence ids"
            )
        self.running = [Beam()]
        self.ended: list[Beam] = []
        self.done = False

    def requests(
        self, search_id: str, prompt_token_ids: list[int], like: Request | LoRARequest | None = None
    ) -> list[Request]:
        """One for each running beam: its next token, of which `advance` wants the log-probabilities.

        like: whose arrival_time, priority, cache_salt and adapter they have, or the adapter alone. Beginnings come from
        the prefix cache.
        """
        self._num_steps += 1
        if not isinstance(like, Request):
            like = Request(request_id="", prompt_token_ids=[], sampling=SamplingParams(), max_tokens=1, lora=like)
        sampling = SamplingParams(temperature=0, seed=0, max_tokens=1, logprobs=self.num_candidates, detokenize=False)
        return [
            msgspec.structs.replace(
                like,
                request_id=f"{search_id}-{self._num_steps}-{index}",
                prompt_token_ids=[*prompt_token_ids, *beam.token_ids],
                sampling=sampling,
                max_tokens=1,
                eos_token_ids=(),
            )
            for index, beam in enumerate(self.running)
        ]

    def advance(self, candidates: Sequence[TokenLogprobs]) -> None:
        """One token more. candidates: for each running beam, in order, the tokens most likely to follow, which
        begin at the second entry; the first is not looked at."""
        width = self._params.beam_width
        length = len(self.running[0].token_ids) + 1
        longer = [
            self._extended(beam, TokenLogprobs([token_id], [logprob], rank))
            for beam, found in zip(self.running, candidates, strict=True)
            for rank, (token_id, logprob) in enumerate(zip(found.token_ids[1:], found.logprobs[1:]), start=1)
            if logprob > -math.inf
        ]
        longer.sort(key=lambda beam: -beam.cumulative_logprob)
        is_last = length >= self._params.max_tokens
        # One that ends counts only while it is among the best of all, ended or not.
        self.ended += [beam for beam in longer[:width] if beam.ends or is_last]
        self.ended.sort(key=lambda beam: -beam.score)
        del self.ended[width:]
        self.running = [] if is_last else [beam for beam in longer if not beam.ends][:width]
        self.done = not self.running or self._cannot_improve(length)

    def _extended(self, beam: Beam, token: TokenLogprobs) -> Beam:
        token_ids = (*beam.token_ids, *token.token_ids)
        total = beam.cumulative_logprob + token.logprobs[0]
        score = total / len(token_ids) ** self._params.length_penalty
        return Beam(token_ids, (*beam.logprobs, token), total, score, token_ids[-1] in self._eos_token_ids)

    def _cannot_improve(self, length: int) -> bool:
        if len(self.ended) < self._params.beam_width:
            return False
        if self._params.early_stopping is True:
            return True
        # A sum of logarithms only falls, but divided by a length it may rise with it.
        favours_longest = self._params.early_stopping == "never" and self._params.length_penalty > 0
        best_length = self._params.max_tokens if favours_longest else length
        return self.running[0].cumulative_logprob / best_length**self._params.length_penalty <= self.ended[-1].score
