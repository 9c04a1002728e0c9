"""LLM: the offline front end, over an engine in this process."""

from __future__ import annotations

import itertools
import logging
import random
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Unpack

import msgspec
from tqdm import tqdm

from octavo.assembly import build_engine
from octavo.config import DEFAULT_MODEL, ReasoningParserName, engine_options
from octavo.loading.generation_config import choose_generation_config
from octavo.outputs import (
    BeamSearchOutput,
    BeamSearchSequence,
    CompletionOutput,
    EmbeddingOutput,
    EmbeddingRequestOutput,
    Logprob,
    RequestOutput,
)
from octavo.protocol.beam_search import BeamSearchParams, beams_of
from octavo.protocol.lora import LoRARequest
from octavo.protocol.outputs import SchedulerStats, TokenOutput
from octavo.protocol.plan import TokenLogprobs
from octavo.protocol.pooling import POOLINGS, SAMPLING, Pooling, PoolingParams, floats
from octavo.protocol.reasoning import ReasoningMarks
from octavo.protocol.request import Request
from octavo.protocol.sampling import SamplingParams, generation_defaults, sampling_from
from octavo.structured.compiler import GrammarCompiler
from octavo.structured.reasoning.registry import check_budget, reasoning_marks
from octavo.text.bad_words import spell_bad_words
from octavo.text.beam_search import Beam, BeamSearch
from octavo.text.chat_rendering import ChatRendering, rendered_chats
from octavo.text.generation import Generation, best_first
from octavo.text.prompts import Prompt, ReadPrompt, as_list, one_each, read_prompt
from octavo.text.tokenizer import Tokenizer, load_tokenizer

_log = logging.getLogger(__name__)

Message = dict[str, Any]
LoRARequests = LoRARequest | Sequence[LoRARequest | None] | None

__all__ = ["LLM", "CompletionOutput", "Logprob", "RequestOutput"]


class _Search(NamedTuple):
    """A beam search, what it continues, and with which adapter."""

    search: BeamSearch
    prompt_token_ids: list[int]
    lora: LoRARequest | None


@dataclass(slots=True)
class _Job:
    """One prompt under way: its completions by engine request id, in index order, or the search for them."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    sampling: SamplingParams
    completions: dict[str, Generation] = field(default_factory=dict)
    num_unfinished: int = 0
    search: _Search | None = None


class LLM:
    """Generate text offline: `LLM("smollm2").generate(["Hello"], SamplingParams(max_tokens=32))`.

    Arguments are the fields of octavo.config.EngineOptions, and reasoning_parser: the format of the model's reasoning
    (the names are those of `octavo serve --reasoning-parser`), which structured outputs then come after and
    thinking_token_budget bounds; the text has it either way. Raises TypeError for an unknown one, ValueError for a
    value out of range, and what loading the model raises.
    """

    def __init__(
        self, model: str = DEFAULT_MODEL, *, reasoning_parser: ReasoningParserName | None = None, **options: Any
    ) -> None:
        if reasoning_parser is not None:
            reasoning_marks(reasoning_parser, "")
        self._reasoning_parser = reasoning_parser
        self._options = engine_options({"model": model, **options})
        built = build_engine(self._options)
        self._engine = built.engine
        self.config = built.config
        self._defaults = generation_defaults(
            choose_generation_config(self._options.generation_config, built.source.generation_config)
        )
        self._outputs = built.source.outputs
        self._vocab_size = built.ready.vocab_size
        self._max_model_len = built.ready.max_model_len
        self._eos_token_ids = built.source.eos_token_ids
        self._tokenizer: Tokenizer | None = None
        if not self._options.skip_tokenizer_init:
            self._tokenizer = load_tokenizer(built.source.tokenizer_path)
            self._eos_token_ids = self._tokenizer.eos_token_ids
        self._grammars: GrammarCompiler | None = None
        if self._tokenizer is not None:
            self._grammars = GrammarCompiler(self._tokenizer, self._vocab_size)
        self._request_ids = itertools.count()
        # Unseeded requests draw from here: the same calls on a fresh LLM give the same outputs.
        self._seeds = random.Random(self._options.seed)

    def get_tokenizer(self) -> Tokenizer:
        """The model's tokenizer. Raises ValueError under skip_tokenizer_init."""
        if self._tokenizer is None:
            raise ValueError("skip_tokenizer_init=True: this LLM has no tokenizer; give prompt_token_ids")
        return self._tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """What generate() uses when it is given none: the model's generation_config.json over the defaults."""
        return sampling_from(self._defaults)

    def stats(self) -> SchedulerStats:
        """Where the engine stands: running, waiting, KV blocks, prefix-cache hits, totals."""
        return self._engine.stats()

    def audit(self) -> None:
        """Recompute every invariant of the KV bookkeeping; raises naming the one that is broken."""
        self._engine.audit()

    def reset_prefix_cache(self) -> bool:
        """Forget cached prefixes. False while requests run."""
        return self._engine.reset_prefix_cache()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        lora_request: LoRARequests = None,
        priority: Sequence[int] | None = None,
    ) -> list[RequestOutput]:
        """Complete each prompt; results come in the order of the prompts.

        prompts: one or a list of: text, token ids, {"prompt": text}, {"prompt_token_ids": ids}; a dict may
        carry "cache_salt". A bare list of ints is one prompt.
        sampling_params, lora_request: one for all, or one each, None among them. priority: one each, lower first;
        needs the "priority" policy.
        Raises ValueError naming what is wrong with which prompt, before anything runs, or with which adapter.
        """
        self._check_head("tokens")
        batch = as_list(prompts)
        priorities = one_each("priority", priority, int, len(batch), 0)
        if any(priorities) and self._options.scheduling_policy != "priority":
            raise ValueError("priority is given, but scheduling_policy='fcfs'; allowed: only under 'priority'")
        default = self.get_default_sampling_params
        params = one_each("sampling_params", sampling_params, SamplingParams, len(batch), default)
        loras = self._adapters(lora_request, len(batch))
        prepared = [self._prepare(*each) for each in zip(batch, params, priorities, loras)]
        jobs, requests = [job for job, _ in prepared], [request for _, own in prepared for request in own]
        self._search({job.request_id: job.search for job in jobs if job.search is not None})
        if requests:
            if all(request.patient for request in requests):
                requests.sort(key=lambda request: -request.max_tokens)  # the longest one's end is the batch's
            self._run([job for job in jobs if job.search is None], requests, use_tqdm)
        return [self._output(job) for job in jobs]

    def beam_search(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: BeamSearchParams,
        *,
        lora_request: LoRARequests = None,
    ) -> list[BeamSearchOutput]:
        """The most likely outputs that a beam search finds for each prompt, the best first.

        prompts, lora_request: as for `generate`. Raises ValueError, before anything runs, for what cannot be.
        """
        self._check_head("tokens")
        searches: dict[str, _Search] = {}
        batch = as_list(prompts)
        for prompt, lora in zip(batch, self._adapters(lora_request, len(batch))):
            token_ids = self._read(prompt).token_ids
            own = msgspec.structs.replace(params, max_tokens=min(params.max_tokens, self._room(token_ids)))
            search = BeamSearch(own, self._eos_token_ids)
            searches[str(next(self._request_ids))] = _Search(search, token_ids, lora)
        self._search(searches)
        keeps_end = params.include_stop_str_in_output
        return [
            BeamSearchOutput([self._sequence(beam, own.prompt_token_ids, keeps_end) for beam in own.search.ended])
            for own in searches.values()
        ]

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        lora_request: LoRARequests = None,
        **rendering: Unpack[ChatRendering],
    ) -> list[RequestOutput]:
        """Answer one conversation, or each of a list of them, through the model's chat template.

        rendering: the fields of octavo.text.chat_rendering.ChatRendering, such as tools and chat_template. Calls come
        in the output's text as the model writes them.
        Raises TypeError for another argument, ValueError for what is not allowed, for a template that refuses the
        conversation, or where there is none.
        """
        tokenizer = self.get_tokenizer()
        conversations: Any = [messages] if messages and isinstance(messages[0], dict) else messages
        prompts = rendered_chats(tokenizer, conversations, rendering)
        return self.generate(prompts, sampling_params, use_tqdm=use_tqdm, lora_request=lora_request)

    def embed(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        use_tqdm: bool = True,
        lora_request: LoRARequests = None,
        pooling: Pooling | None = None,
        dimensions: int | None = None,
        normalize: bool | None = None,
    ) -> list[EmbeddingRequestOutput]:
        """The embedding of each prompt, in the order of the prompts; these, and lora_request, as in `generate`.

        pooling: the last hidden state of the last token, or the mean over all tokens. dimensions: only so many of its
        first numbers, of a model whose embeddings may be cut. normalize: scale it to length 1. None: as the model
        says, which is "last", all of them, and True where it says nothing.
        Raises ValueError for what is wrong with which prompt, RuntimeError for one that the engine failed on.
        """
        if pooling not in (*POOLINGS, None):
            raise ValueError(f"pooling={pooling!r} is unknown; allowed: {', '.join(POOLINGS)}")
        self._check_head("tokens", "embeddings")
        if dimensions is not None:
            self._outputs.check_dimensions(dimensions)
        normalizes = self._outputs.normalize if normalize is None else normalize
        wanted = PoolingParams(pooling or self._outputs.pooling, normalizes, dimensions)
        jobs = [(self._read(prompt, self._outputs.prefix), str(next(self._request_ids))) for prompt in as_list(prompts)]
        requests = []
        for ((_, token_ids, cache_salt, _), request_id), lora in zip(jobs, self._adapters(lora_request, len(jobs))):
            self._room(token_ids)
            requests.append(
                Request(
                    request_id=request_id,
                    prompt_token_ids=token_ids,
                    sampling=SAMPLING,
                    max_tokens=1,
                    arrival_time=time.monotonic(),
                    cache_salt=cache_salt,
                    pooling=wanted,
                    lora=lora,
                )
            )
        found = self._embed(requests, use_tqdm)
        return [
            EmbeddingRequestOutput(
                request_id,
                text,
                token_ids,
                EmbeddingOutput(floats(found[request_id].embedding or b"")),
                found[request_id].num_cached_tokens,
            )
            for (text, token_ids, _, _), request_id in jobs
        ]

    def _embed(self, requests: list[Request], use_tqdm: bool) -> dict[str, TokenOutput]:
        """The output of each request, by its id. Raises RuntimeError for one that failed."""
        found: dict[str, TokenOutput] = {}
        names = [request.request_id for request in requests]
        try:
            for request in requests:
                self._engine.add(request)
            with tqdm(total=len(requests), desc="Prompts", disable=not use_tqdm, dynamic_ncols=True) as bar:
                while len(found) < len(requests):
                    for output in self._engine.step():
                        if output.error is not None:
                            raise RuntimeError(f"prompt {names.index(output.request_id)} failed: {output.error}")
                        found[output.request_id] = output
                        bar.update()
        finally:
            self._drain(names)
        return found

    def _adapters(self, given: LoRARequests, count: int) -> list[LoRARequest | None]:
        """One for each prompt. Raises ValueError for any in an engine without LoRA."""
        loras: list[LoRARequest | None] = one_each("lora_request", given, LoRARequest, count, None)
        first = next((lora for lora in loras if lora is not None), None)
        if first is not None and self.config.lora is None:
            raise ValueError(f"lora_request={first.lora_name!r} needs enable_lora=True")
        return loras

    def _check_head(self, *allowed: str) -> None:
        """Raises ValueError unless the model is for one of these."""
        if self._outputs.head not in allowed:
            raise ValueError(f"the model is made for {self._outputs.head}; this call needs one for {allowed[0]}")

    def _prepare(
        self, prompt: Prompt, sampling: SamplingParams, priority: int, lora: LoRARequest | None
    ) -> tuple[_Job, list[Request]]:
        text, token_ids, cache_salt, begun = self._read(prompt)
        sampling = spell_bad_words(sampling, self._tokenizer)
        sampling.check_vocabulary(self._vocab_size)
        token_ids = sampling.truncated(token_ids, self._max_model_len)
        room = self._room(token_ids)
        grammar = self._grammar(sampling)
        reasoning = self._marks(sampling, text, token_ids, begun)
        job = _Job(str(next(self._request_ids)), text, token_ids, sampling, num_unfinished=sampling.num_completions)
        requests: list[Request] = []
        if sampling.use_beam_search:
            if lora is not None:
                raise ValueError("lora_request is not supported with use_beam_search; allowed: either")
            beams = beams_of(sampling, min(room, sampling.max_tokens or room))
            job.search = _Search(BeamSearch(beams, self._eos_token_ids), token_ids, lora)
            return job, requests
        for index, own in enumerate(sampling.completions(lambda: self._seeds.getrandbits(63))):
            request = Request(
                request_id=f"{job.request_id}-{index}",
                prompt_token_ids=token_ids,
                sampling=own,
                max_tokens=min(room, sampling.max_tokens or room),
                eos_token_ids=self._eos_token_ids,
                arrival_time=time.monotonic(),
                priority=priority,
                cache_salt=cache_salt,
                grammar=grammar,
                reasoning=reasoning,
                lora=lora,
                patient=own.has_fixed_length,
            )
            job.completions[request.request_id] = Generation(self._tokenizer, own, token_ids)
            requests.append(request)
        return job, requests

    def _room(self, token_ids: list[int]) -> int:
        """Tokens that fit after a prompt. Raises ValueError where there are none."""
        room = self._max_model_len - len(token_ids)
        if room < 1:
            raise ValueError(
                f"the prompt has {len(token_ids)} tokens; allowed: at most {self._max_model_len - 1}, "
                f"so that one more fits max_model_len={self._max_model_len}"
            )
        return room

    def _grammar(self, sampling: SamplingParams) -> str | None:
        if sampling.structured_outputs is None:
            return None
        if self._grammars is None:
            raise ValueError("structured_outputs needs a tokenizer; allowed: only without skip_tokenizer_init")
        self._engine.open_grammars()  # meanwhile
        return self._grammars.compile(sampling.structured_outputs)

    def _marks(
        self, sampling: SamplingParams, text: str | None, token_ids: list[int], begun: str | None
    ) -> ReasoningMarks | None:
        """The marks that the outputs are to be watched for. Raises ValueError for a budget without them."""
        if sampling.thinking_token_budget is not None:
            check_budget(self._reasoning_parser)
        elif sampling.structured_outputs is None:
            return None
        if self._reasoning_parser is None:
            return None
        if text is None:
            text = self.get_tokenizer().decode(token_ids, skip_special_tokens=False)
        return reasoning_marks(self._reasoning_parser, text, begun)

    def _read(self, prompt: Prompt, prefix: str = "") -> ReadPrompt:
        """prefix: stands before a text."""
        return read_prompt(
            prompt, lambda text: self.get_tokenizer().encode(prefix + text, add_special_tokens=True), self._vocab_size
        )

    def _search(self, searches: dict[str, _Search]) -> None:
        """Run searches, by id and each with its prompt, side by side to their ends. RuntimeError if a step fails."""
        submitted: list[str] = []
        try:
            while running := {name: own for name, own in searches.items() if not own.search.done}:
                requests = {
                    name: own.search.requests(name, own.prompt_token_ids, own.lora) for name, own in running.items()
                }
                submitted = [request.request_id for own in requests.values() for request in own]
                for own in requests.values():
                    for request in own:
                        self._engine.add(request)
                found: dict[str, TokenLogprobs] = {}
                while len(found) < len(submitted):
                    for output in self._engine.step():
                        if output.error is not None or not output.logprobs:
                            raise RuntimeError(f"beam search: a step failed: {output.error}")
                        found[output.request_id] = output.logprobs[0]
                for name, searched in running.items():
                    searched.search.advance([found[request.request_id] for request in requests[name]])
        finally:
            self._drain(submitted)

    def _sequence(self, beam: Beam, prompt_token_ids: list[int], keeps_end: bool) -> BeamSearchSequence:
        tokens = [*prompt_token_ids, *beam.token_ids]
        if beam.ends and not keeps_end:
            tokens.pop()
        return BeamSearchSequence(
            tokens=tokens,
            logprobs=self._by_token(beam.logprobs),
            cum_logprob=beam.cumulative_logprob,
            score=beam.score,
            text=None if self._tokenizer is None else self._tokenizer.decode(tokens, skip_special_tokens=False),
            finish_reason="stop" if beam.ends else "length",
            stop_reason=beam.token_ids[-1] if beam.ends else None,
        )

    def _drain(self, request_ids: Iterable[str]) -> None:
        """Interrupted or not, nothing of a call stays in the engine."""
        self._engine.abort(request_ids)
        while self._engine.has_work:
            self._engine.step()

    def _run(self, jobs: list[_Job], requests: list[Request], use_tqdm: bool) -> None:
        owners = {request_id: job for job in jobs for request_id in job.completions}
        done = 0
        try:
            for request in requests:
                self._engine.add(request)
            with tqdm(total=len(jobs), desc="Prompts", disable=not use_tqdm, dynamic_ncols=True) as bar:
                began, num_tokens = time.perf_counter(), 0
                while done < len(owners):
                    outputs = self._engine.step()
                    early: list[str] = []
                    for output in outputs:
                        job = owners[output.request_id]
                        generation = job.completions[output.request_id]
                        if generation.finish_reason is not None:
                            continue  # the abort that followed a stop string
                        num_tokens += len(generation.push(output).token_ids)
                        if generation.finish_reason is None:
                            continue
                        if output.refused and not output.scheduled_time:
                            raise ValueError(f"prompt {jobs.index(job)}: {output.error}")
                        if output.error is not None:
                            _log.error("request %s failed: %s", output.request_id, output.error)
                        if generation.finished_early:
                            early.append(output.request_id)
                        done += 1
                        job.num_unfinished -= 1
                        if job.num_unfinished == 0:
                            bar.set_postfix_str(f"{num_tokens / (time.perf_counter() - began):.0f} tokens/s", False)
                            bar.update()
                    if early:
                        self._engine.abort(early)
        finally:
            self._drain(owners)

    def _generations(self, job: _Job) -> list[Generation]:
        """What is returned of a prompt's completions: all, or the best, best first."""
        if job.search is not None:
            found = [b.generation(self._tokenizer, job.sampling, job.prompt_token_ids) for b in job.search.search.ended]
            return found[: job.sampling.n]
        return best_first(list(job.completions.values()), job.sampling.n)

    def _output(self, job: _Job) -> RequestOutput:
        generations = self._generations(job)
        first = generations[0]
        output = RequestOutput(
            request_id=job.request_id,
            prompt=job.prompt,
            prompt_token_ids=job.prompt_token_ids,
            num_cached_tokens=first.num_cached_tokens,
        )
        if job.sampling.prompt_logprobs is not None:
            output.prompt_logprobs = [None, *self._by_token(first.prompt_logprobs or [])]
        wanted = job.sampling.logprobs is not None
        is_ranked = job.sampling.use_beam_search or job.sampling.num_completions > job.sampling.n
        for index, generation in enumerate(generations):
            output.outputs.append(
                CompletionOutput(
                    index=index,
                    text=generation.text,
                    token_ids=generation.token_ids,
                    cumulative_logprob=generation.cumulative_logprob if wanted or is_ranked else None,
                    logprobs=self._by_token(generation.logprobs or [], job.sampling) if wanted else None,
                    finish_reason=generation.finish_reason,
                    stop_reason=generation.stop_reason,
                )
            )
        return output

    def _by_token(
        self, positions: Iterable[TokenLogprobs], sampling: SamplingParams | None = None
    ) -> list[dict[int, Logprob]]:
        """vLLM's shape: at each position candidates by token id, the token that stands there first. Those that
        `sampling` chose have no rank."""
        chosen = sampling is not None and sampling.logprob_token_ids is not None
        found: list[dict[int, Logprob]] = []
        for entry in positions:
            candidates: dict[int, Logprob] = {}
            for place, (token_id, logprob) in enumerate(zip(entry.token_ids, entry.logprobs)):
                text = self._tokenizer.token_text(token_id) if self._tokenizer else None
                rank = entry.rank if place == 0 else None if chosen else place
                candidates.setdefault(token_id, Logprob(logprob, rank, text))
            found.append(candidates)
        return found
