"""POST /v1/completions."""

from __future__ import annotations

import time
from typing import cast

import msgspec

from octavo.protocol.plan import TokenLogprobs
from octavo.server.openai.endpoint import GenerationEndpoint
from octavo.server.openai.errors import invalid
from octavo.server.openai.logprobs import CompletionLogprobs, PromptToken
from octavo.server.openai.prompts import check_ids
from octavo.server.openai.runner import Choice, Run, Usage
from octavo.server.openai.sampling import sampling_params, with_max_tokens
from octavo.server.openai.schema import MAX_PROMPTS, CompletionBody
from octavo.server.openai.sse import EventEncoder, Frames
from octavo.text.generation import Delta

_DEFAULT_MAX_TOKENS = 16
_PLAIN_TAIL = b',"finish_reason":null,"logprobs":null,"stop_reason":null}'  # of a CompletionChoice that has only text


class CompletionChoice(msgspec.Struct, frozen=True, omit_defaults=True):
    index: int
    text: str
    finish_reason: str | None
    logprobs: CompletionLogprobs | None
    stop_reason: int | str | None
    prompt_logprobs: list[dict[str, PromptToken] | None] | None = None
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None


class Completion(msgspec.Struct, frozen=True):
    id: str
    object: str
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: Usage


class Completions(GenerationEndpoint[CompletionBody]):
    """The endpoint. echo with max_tokens=0 only scores the prompt: one token is sampled and dropped."""

    body_type = CompletionBody

    def num_prompts(self, body: CompletionBody) -> int:
        return len(_prompts(body.prompt))

    async def prepare(self, body: CompletionBody, run: Run) -> None:
        if body.stream and body.echo and body.logprobs is not None:
            raise invalid("echo with logprobs is not available with stream", "echo")
        if body.max_tokens == 0 and not _only_scores(body):
            message = "max_tokens=0 only scores the prompt: it needs echo, and goes without stream; allowed: 1 or more"
            raise invalid(message, "max_tokens")
        names = {"prompt": "prompt"}
        params = sampling_params(
            body,
            self.context,
            names,
            run.wish,
            max_tokens=1 if _only_scores(body) else body.max_tokens,
            logprobs=body.logprobs,
            prompt_logprobs=_num_prompt_logprobs(body),
        )
        for prompt in _prompts(body.prompt):
            limit = self.context.max_model_len
            if isinstance(prompt, str):
                whole = await self.encode(prompt, body.add_special_tokens is not False, "prompt")
                ids = params.truncated(whole, limit)
                text = prompt if len(ids) == len(whole) else self._text_of(ids)
            else:
                ids = check_ids(self.state, params.truncated(prompt, limit), "prompt")
                text = self._text_of(ids) if body.echo else ""
            own = with_max_tokens(params, len(ids), _DEFAULT_MAX_TOKENS, self.context, names)
            run.add(text, ids, own, names)

    def answer(self, body: CompletionBody, run: Run, request_id: str) -> Completion:
        usage = run.usage()
        if _only_scores(body):
            usage = Usage(usage.prompt_tokens, 0, usage.prompt_tokens, usage.prompt_tokens_details)
        return Completion(
            id=f"cmpl-{request_id}",
            object="text_completion",
            created=int(time.time()),
            model=run.model.name,
            system_fingerprint=self.fingerprint,
            choices=[self._choice(body, choice) for choice in run.answered],
            usage=usage,
        )

    def frames(self, body: CompletionBody, run: Run, request_id: str) -> CompletionFrames:
        return CompletionFrames(self, body, run, request_id)

    def _choice(self, body: CompletionBody, choice: Choice) -> CompletionChoice:
        generation = choice.generation
        text, token_ids = generation.text, generation.token_ids
        if _only_scores(body):
            text, token_ids = "", []
        logprobs = None
        if body.logprobs is not None:
            ids = token_ids
            positions: list[TokenLogprobs | None] = list((generation.logprobs or [])[: len(ids)])
            if body.echo:
                ids = choice.request.prompt_token_ids + ids
                positions = [None, *(generation.prompt_logprobs or []), *positions]
            logprobs, _ = self.formatter.completion(ids, positions, body.logprobs, 0)
        shown = generation.prompt_logprobs if body.prompt_logprobs is not None else None
        return CompletionChoice(
            index=choice.index,
            text=choice.prompt + text if body.echo else text,
            finish_reason="length" if _only_scores(body) else generation.finish_reason,
            logprobs=logprobs,
            stop_reason=None if _only_scores(body) else generation.stop_reason,
            prompt_logprobs=None if shown is None else self.formatter.prompt(shown),
            token_ids=token_ids if body.return_token_ids else None,
            prompt_token_ids=choice.request.prompt_token_ids if body.return_token_ids else None,
        )

    def _text_of(self, ids: list[int]) -> str:
        tokenizer = self.context.tokenizer
        return "" if tokenizer is None else tokenizer.decode(ids, False)


class CompletionFrames(Frames):
    """The chunks of one streamed answer."""

    def __init__(self, endpoint: Completions, body: CompletionBody, run: Run, request_id: str) -> None:
        self._formatter = endpoint.formatter
        self._body = body
        self._run = run
        self._options = endpoint.stream_options(body)
        self._encoder = EventEncoder(
            {
                "id": f"cmpl-{request_id}",
                "object": "text_completion",
                "created": int(time.time()),
                "model": run.model.name,
                "system_fingerprint": endpoint.fingerprint,
            }
        )
        self._opened: set[int] = set()  # choices of which a chunk was made
        # Nothing but text in all chunks but each choice's last.
        self._plain = not (
            body.echo or body.return_token_ids or body.logprobs is not None or self._options.continuous_usage_stats
        )

    def frame(self, choice: Choice, delta: Delta) -> bytes:
        """See Frames.frame."""
        if self._plain and delta.finish_reason is None:
            if not delta.text:
                return b""
            return self._encoder.text_chunk(b'{"index":%d,"text":' % choice.index, delta.text, _PLAIN_TAIL)
        opens = choice.index not in self._opened
        chunk = self._chunk(choice, delta, opens)
        if chunk is None:
            return b""
        self._opened.add(choice.index)
        return self._encoder.chunk(chunk, self._run.usage() if self._options.continuous_usage_stats else None)

    def last(self) -> bytes:
        """See Frames.last."""
        return self._encoder.chunk(None, self._run.usage()) if self._options.include_usage else b""

    def _chunk(self, choice: Choice, delta: Delta, opens: bool) -> CompletionChoice | None:
        """None: there is nothing to say yet. opens: of the choice's first chunk, which tells of the prompt."""
        body = self._body
        echoed = choice.prompt if body.echo and opens else ""
        logprobs = None
        if delta.logprobs and body.logprobs is not None:
            logprobs, choice.text_offset = self._formatter.completion(
                delta.token_ids, delta.logprobs, body.logprobs, choice.text_offset
            )
        shows_tokens = bool(delta.token_ids) and (logprobs is not None or bool(body.return_token_ids))
        text = echoed if _only_scores(body) else echoed + delta.text
        if not (text or delta.finish_reason or shows_tokens):
            return None
        return CompletionChoice(
            index=choice.index,
            text=text,
            finish_reason=delta.finish_reason,
            logprobs=logprobs,
            stop_reason=delta.stop_reason,
            token_ids=delta.token_ids if body.return_token_ids else None,
            prompt_token_ids=choice.request.prompt_token_ids if body.return_token_ids and opens else None,
        )


def _only_scores(body: CompletionBody) -> bool:
    return bool(body.echo) and body.max_tokens == 0 and not body.stream


def _num_prompt_logprobs(body: CompletionBody) -> int | None:
    """What the engine is asked for: the body's own wish, and what echo with logprobs needs."""
    wishes = [body.prompt_logprobs, body.logprobs if body.echo else None]
    return max((wish for wish in wishes if wish is not None), default=None)


def _prompts(prompt: str | list[str | int | list[int]]) -> list[str | list[int]]:
    """The body's prompts, each a text or token ids. Raises APIError 400 for none, too many, or a mixture."""
    # Of the items' types there are few; of token ids, maybe 100,000.
    kinds: set[type] = set() if isinstance(prompt, str) else set(map(type, prompt))
    if isinstance(prompt, str):
        prompts: list[str | list[int]] = [prompt]
    elif kinds == {int}:
        prompts = [cast(list[int], prompt)]
    elif len(kinds) <= 1:
        prompts = cast(list[str | list[int]], prompt)
    else:
        raise invalid("prompt mixes texts and token ids", "prompt", "invalid_type")
    if len(prompts) > MAX_PROMPTS:
        message = f"prompt has {len(prompts)} prompts; at most {MAX_PROMPTS} are allowed"
        raise invalid(message, "prompt", "array_above_max_length")
    if not prompts or not all(prompts):
        raise invalid("prompt is empty", "prompt")
    return prompts
