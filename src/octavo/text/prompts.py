"""What a caller of LLM may give as a prompt, and lists of what goes with each prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

_KEYS = {"prompt", "prompt_token_ids", "cache_salt"}


class ReadPrompt(NamedTuple):
    """text: None of a prompt that came as token ids. begun: of a conversation whose last message is to be continued,
    that message's text."""

    text: str | None
    token_ids: list[int]
    cache_salt: str | None = None
    begun: str | None = None


Prompt = str | dict[str, Any] | list[int] | ReadPrompt


def read_prompt(prompt: Prompt, encode: Callable[[str], list[int]], vocab_size: int) -> ReadPrompt:
    """A prompt in any of its forms. encode: text to token ids. Raises ValueError naming what it cannot have."""
    fields: dict[str, Any]
    begun = None
    if isinstance(prompt, ReadPrompt):
        text, token_ids, cache_salt, begun = prompt
        fields = {"prompt": text, "prompt_token_ids": token_ids, "cache_salt": cache_salt}
    elif isinstance(prompt, str):
        fields = {"prompt": prompt}
    elif isinstance(prompt, dict):
        fields = prompt
        if not fields.keys() <= _KEYS or not fields.keys() & {"prompt", "prompt_token_ids"}:
            raise ValueError(f"a prompt has the keys {sorted(fields)}; allowed: {', '.join(sorted(_KEYS))}")
    else:
        fields = {"prompt_token_ids": list(prompt)}
    text = fields.get("prompt")
    token_ids = fields.get("prompt_token_ids")
    if token_ids is None:
        token_ids = encode(str(text))
    if not token_ids:
        raise ValueError(f"prompt={text!r} has no tokens; allowed: at least one")
    for token_id in token_ids:
        if not 0 <= token_id < vocab_size:
            raise ValueError(f"prompt_token_ids has {token_id}; allowed: 0..{vocab_size - 1}")
    return ReadPrompt(text, token_ids, fields.get("cache_salt"), begun)


def as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt, in any of its forms, is a list of one."""
    single = isinstance(prompts, (str, dict)) or (bool(prompts) and isinstance(prompts[0], int))
    return [prompts] if single else list(prompts)  # type: ignore[list-item,arg-type]


def one_each(name: str, given: Any, kind: type, count: int, default: Any) -> list[Any]:
    """A list of `count` from one for all (of type `kind`), one for each, or None: the default, called if it can be.

    Raises ValueError naming the argument where the number differs.
    """
    if given is None:
        return [default() if callable(default) else default] * count
    if isinstance(given, kind):
        return [given] * count
    if len(given) != count:
        raise ValueError(f"{name} has {len(given)} entries; allowed: one, or one for each of the {count} prompts")
    return list(given)
