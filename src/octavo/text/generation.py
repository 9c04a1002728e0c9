"""Generation: one completion as a front end sees it, from the engine's tokens to text."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from octavo.protocol.outputs import FinishReason, TokenOutput
from octavo.protocol.plan import TokenLogprobs
from octavo.protocol.sampling import SamplingParams
from octavo.text.detokenizer import IncrementalDetokenizer
from octavo.text.stop_strings import StopStrings
from octavo.text.tokenizer import Tokenizer


class Delta(msgspec.Struct, frozen=True):
    """What one output of the engine added.

    text: newly released; it lags behind token_ids by unfinished characters and possible stop strings.
    logprobs: one entry a token of token_ids, None where none were asked for.
    stop_reason: the stop string or stop token id; None for an end-of-sequence token.
    """

    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None


class Generation:
    """The state of one completion. `push` is its only writer.

    The token that ends an output (end of sequence, or one of stop_token_ids) is in token_ids; its text is not in
    text, unless include_stop_str_in_output. Stop strings count once more than min_tokens tokens are there.
    """

    def __init__(self, tokenizer: Tokenizer | None, sampling: SamplingParams, prompt_token_ids: Sequence[int]) -> None:
        """Without a tokenizer, or with sampling.detokenize off, text stays empty.

        Raises ValueError for stop strings without a tokenizer, or too long.
        """
        self._sampling = sampling
        self._detokenizer: IncrementalDetokenizer | None = None
        if tokenizer is not None and sampling.detokenize:
            self._detokenizer = IncrementalDetokenizer(
                tokenizer,
                prompt_token_ids,
                sampling.skip_special_tokens,
                sampling.spaces_between_special_tokens,
            )
        elif sampling.stop_strings:
            raise ValueError("stop needs a tokenizer: stop strings are looked for in the text")
        self._stops: StopStrings | None = None
        if sampling.stop_strings:
            self._stops = StopStrings(sampling.stop_strings, sampling.include_stop_str_in_output)
        self._text: list[str] = []
        self.token_ids: list[int] = []
        self.logprobs: list[TokenLogprobs] | None = None if sampling.logprobs is None else []
        self._sum_of_logprobs = 0.0
        self.prompt_logprobs: list[TokenLogprobs] | None = None if sampling.prompt_logprobs is None else []
        self.finish_reason: FinishReason | None = None
        self.stop_reason: int | str | None = None
        self.error: str | None = None
        self.num_cached_tokens = 0
        self.finished_early = False  # a stop string ended it: the engine's request is to be aborted
        # Nothing but text to look after: then a token in the middle of the output takes the short way.
        asks_for_logprobs = sampling.logprobs is not None or sampling.prompt_logprobs is not None
        self._plain = self._detokenizer is not None and self._stops is None and not asks_for_logprobs

    @property
    def text(self) -> str:
        """All the text released so far."""
        if len(self._text) > 1:
            self._text = ["".join(self._text)]
        return self._text[0] if self._text else ""

    @property
    def cumulative_logprob(self) -> float | None:
        """The sum over the output's tokens, None where logprobs were not asked for."""
        return None if self.logprobs is None else self._sum_of_logprobs

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None

    def push(self, output: TokenOutput) -> Delta:
        """Take what the engine says of this request. Once it has finished, nothing more is added."""
        if self.finish_reason is not None:
            return Delta("", [])
        if self._plain and output.finish_reason is None:
            return self._push_plain(output)
        self.num_cached_tokens = max(self.num_cached_tokens, output.num_cached_tokens)
        if self.prompt_logprobs is not None:
            self.prompt_logprobs += output.prompt_logprobs or ()
        self.error = output.error
        num_old = len(self.token_ids)
        if self._detokenizer is None:
            self.token_ids += output.new_token_ids
            text = ""
        else:
            text = self._add_tokens(output, self._detokenizer)
        matched = self._stops.matched if self._stops is not None else None
        if matched is not None:
            self.finished_early = output.finish_reason is None
            self.finish_reason, self.stop_reason = "stop", matched
        else:
            self.finish_reason, self.stop_reason = output.finish_reason, output.stop_reason
        if text:
            self._text.append(text)
        token_ids = self.token_ids[num_old:]
        return Delta(text, token_ids, self._add_logprobs(output, len(token_ids)), self.finish_reason, self.stop_reason)

    def _push_plain(self, output: TokenOutput) -> Delta:
        """`push` for the bulk of all tokens: no end, no stop strings, no logprobs."""
        assert self._detokenizer is not None
        token_ids = output.new_token_ids
        if output.num_cached_tokens > self.num_cached_tokens:
            self.num_cached_tokens = output.num_cached_tokens
        self.token_ids += token_ids
        text = self._detokenizer.push(token_ids)
        if text:
            self._text.append(text)
        return Delta(text, token_ids)

    def _add_tokens(self, output: TokenOutput, detokenizer: IncrementalDetokenizer) -> str:
        """Take tokens up to a stop string; returns the text they release."""
        last = len(output.new_token_ids) - 1
        ends_with_stop_token = output.finish_reason == "stop" and not self._sampling.include_stop_str_in_output
        released = []
        for index, token_id in enumerate(output.new_token_ids):
            self.token_ids.append(token_id)
            if not (index == last and ends_with_stop_token):
                released.append(self._filter(detokenizer.push((token_id,))))
                if self._stops is not None and self._stops.matched is not None:
                    return "".join(released)
        if output.finish_reason is not None:
            released.append(self._filter(detokenizer.flush()))
            if self._stops is not None:
                released.append(self._stops.flush())
        return "".join(released)

    def _filter(self, text: str) -> str:
        if self._stops is None:
            return text
        return self._stops.push(text, armed=len(self.token_ids) > self._sampling.min_tokens)

    def _add_logprobs(self, output: TokenOutput, num_tokens: int) -> list[TokenLogprobs] | None:
        if self.logprobs is None or output.logprobs is None:
            return None
        logprobs = output.logprobs[:num_tokens]
        self.logprobs += logprobs
        self._sum_of_logprobs += sum(entry.logprobs[0] for entry in logprobs)
        return logprobs


def best_first(generations: list[Generation], n: int) -> list[Generation]:
    """The n of the highest cumulative log-probability where there are more, failed ones last; else all, as they are."""
    if len(generations) <= n:
        return generations

    def rank(generation: Generation) -> tuple[bool, float]:
        return generation.error is not None, -(generation.cumulative_logprob or 0.0)

    return sorted(generations, key=rank)[:n]
