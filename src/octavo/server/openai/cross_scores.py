"""Scores of pairs of texts by a model that is made for them: both texts go through it together."""

from __future__ import annotations

import math

from octavo.protocol.lora import LoRARequest
from octavo.protocol.pooling import SCORE, floats
from octavo.server.context import ServerState
from octavo.server.openai.embedder import Embedder, EmbeddingFields, EmbeddingUsage
from octavo.server.openai.errors import invalid

Pair = tuple[str, str]


class CrossScores:
    """Pairs to scores, 0..1, or to what they are the sigmoid of."""

    def __init__(self, state: ServerState) -> None:
        self._state = state
        self._embedder = Embedder(state)

    async def scores(
        self, pairs: list[Pair], body: EmbeddingFields, lora: LoRARequest | None, as_probabilities: bool, param: str
    ) -> tuple[list[float], EmbeddingUsage]:
        """param: the body's name for the second texts. Raises APIError."""
        if body.pooling is not None:
            raise invalid("pooling is refused: the model scores by the last token", "pooling")
        prompts = []
        for pair in pairs:
            ids = await self._state.in_thread(self._encode, pair, body.add_special_tokens is not False, param)
            prompts.append(self._embedder.fitting(ids, param))
        vectors = await self._embedder.embed(prompts, body, SCORE, lora)
        found = [floats(vector)[0] for vector in vectors]
        num_tokens = sum(map(len, prompts))
        return [sigmoid(x) if as_probabilities else x for x in found], EmbeddingUsage(num_tokens, num_tokens)

    def _encode(self, pair: Pair, add_special_tokens: bool, param: str) -> list[int]:
        """Token ids of a pair: through the server's chat template, where it was given one, as messages of the roles
        "query" and "document"; else as the tokenizer joins two texts."""
        context = self._state.context
        if context.tokenizer is None:
            raise invalid("the server runs without a tokenizer", param)
        if sum(map(len, pair)) > self._state.max_prompt_chars:
            raise invalid(f"{param} has a text that cannot fit the model's context of {context.max_model_len}", param)
        try:
            if context.options.chat_template is None or context.chat_template is None:
                ids = context.tokenizer.encode_pair(*pair, add_special_tokens)
            else:
                messages = [{"role": "query", "content": pair[0]}, {"role": "document", "content": pair[1]}]
                text = context.chat_template.render(messages, add_generation_prompt=True)
                ids = context.tokenizer.encode(text, add_special_tokens=False)
        except ValueError as error:
            raise invalid(str(error), param) from None
        if not ids:
            raise invalid(f"{param} has no tokens", param)
        return ids


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))
