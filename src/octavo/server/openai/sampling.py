"""From a body's fields to SamplingParams: the model's defaults, our checks, errors that name the field."""

from __future__ import annotations

import re
from typing import Any

from octavo.protocol.beam_search import beams_of
from octavo.protocol.sampling import SamplingParams
from octavo.server.context import ServerContext
from octavo.server.openai.errors import context_too_long, invalid
from octavo.server.openai.schema import GenerationBody
from octavo.server.openai.structured import Wish
from octavo.text.bad_words import spell_bad_words
from octavo.text.beam_search import BeamSearch

# Fields of a body that are SamplingParams' own, under the same name.
_FIELDS = (
    "n",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "seed",
    "stop",
    "stop_token_ids",
    "include_stop_str_in_output",
    "ignore_eos",
    "min_tokens",
    "prompt_logprobs",
    "skip_special_tokens",
    "spaces_between_special_tokens",
    "best_of",
    "bad_words",
    "allowed_token_ids",
    "truncate_prompt_tokens",
    "use_beam_search",
    "length_penalty",
    "early_stopping",
    "repetition_detection",
)
_FIELD_AT_START = re.compile(r"[a-z_]+")


def sampling_params(
    body: GenerationBody, context: ServerContext, names: dict[str, str], wish: Wish | None, **values: Any
) -> SamplingParams:
    """wish: what constrains the text. `values` (max_tokens, logprobs, …) join the body's own fields; `names` maps a
    SamplingParams field to the body's name for it, for errors. Raises APIError 400."""
    # Beams are not drawn: what the model's defaults say of drawing does not concern them.
    chosen: dict[str, Any] = {"temperature": 0.0} if body.use_beam_search else dict(context.generation_defaults)
    chosen |= {name: value for name in _FIELDS if (value := getattr(body, name)) is not None}
    chosen |= {name: value for name, value in values.items() if value is not None}
    chosen["max_tokens"] = values.get("max_tokens")
    chosen["detokenize"] = context.tokenizer is not None
    if wish is not None:
        chosen["structured_outputs"] = wish.params
    try:
        if body.logit_bias is not None:
            chosen["logit_bias"] = {int(key): value for key, value in body.logit_bias.items()}
        params = spell_bad_words(SamplingParams(**chosen), context.tokenizer)
        params.check_vocabulary(context.vocab_size)
    except ValueError as error:
        raise _named(error, names) from None
    return params


def with_max_tokens(
    params: SamplingParams, num_prompt_tokens: int, default: int | None, context: ServerContext, names: dict[str, str]
) -> SamplingParams:
    """`params` with max_tokens resolved: as given, else `default` or the rest of the context, whichever is less.

    Raises APIError 400 context_length_exceeded when prompt and output do not fit together.
    """
    name, limit = names.get("max_tokens", "max_tokens"), context.max_model_len
    room = limit - num_prompt_tokens
    if room < 1:
        raise context_too_long(
            f"the prompt has {num_prompt_tokens} tokens; with at least 1 of output that is more than the model's "
            f"context of {limit}",
            names["prompt"],
        )
    if params.max_tokens is not None and params.max_tokens > room:
        raise context_too_long(
            f"{name}={params.max_tokens} is too large: with {num_prompt_tokens} prompt tokens that is more than "
            f"the model's context of {limit}",
            name,
        )
    wanted = params.max_tokens or min(room, default or room)
    try:
        return params.replace(max_tokens=wanted)
    except ValueError as error:  # min_tokens is above it
        raise _named(error, names) from None


def beam_search(params: SamplingParams, context: ServerContext) -> BeamSearch:
    """The search that `params` ask for; its max_tokens is resolved. Raises APIError 400."""
    assert params.max_tokens is not None
    eos_token_ids = () if context.tokenizer is None else context.tokenizer.eos_token_ids
    try:
        return BeamSearch(beams_of(params, params.max_tokens), eos_token_ids)
    except ValueError as error:
        raise _named(error, {"beam_width": "n" if params.best_of is None else "best_of"}) from None


def _named(error: ValueError, names: dict[str, str]) -> Exception:
    """SamplingParams' messages begin with the field."""
    message = str(error)
    start = _FIELD_AT_START.match(message)
    field = start[0] if start else ""
    name = names.get(field, field)
    return invalid(name + message[len(field) :], name or None)
