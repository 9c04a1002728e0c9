"""From a prompt in a body to token ids that fit the model."""

from __future__ import annotations

from octavo.server.context import ServerState
from octavo.server.openai.errors import context_too_long, invalid


async def encode_text(state: ServerState, text: str, add_special_tokens: bool, param: str) -> list[int]:
    """Token ids of a text. One that cannot fit the context is refused before it is tokenized. Raises APIError 400."""
    tokenizer, limit = state.context.tokenizer, state.context.max_model_len
    if tokenizer is None:
        raise invalid("the server runs without a tokenizer: give the prompt as token ids", param)
    if len(text) > state.max_prompt_chars:
        raise context_too_long(
            f"{param} has {len(text)} characters, which cannot fit the model's context of {limit} tokens", param
        )
    ids = await state.in_thread(tokenizer.encode, text, add_special_tokens)
    if not ids:
        raise invalid(f"{param} has no tokens", param)
    return ids


def check_ids(state: ServerState, ids: list[int], param: str) -> list[int]:
    """The ids, which are some. Raises APIError 400 for one out of range, or for more than the context holds."""
    vocab_size, limit = state.context.vocab_size, state.context.max_model_len
    if len(ids) > limit:
        raise context_too_long(f"the prompt has {len(ids)} tokens; the model's context is {limit}", param)
    if min(ids) < 0 or max(ids) >= vocab_size:
        token_id = next(i for i in ids if not 0 <= i < vocab_size)
        raise invalid(f"{param}: token id {token_id} is out of range; allowed: 0..{vocab_size - 1}", param)
    return ids
