"""POST /v1/embeddings (OpenAI's shape): what a model's last hidden states say of a text."""

from __future__ import annotations

import base64
from typing import Any, ClassVar, Literal, cast

import msgspec

from octavo.protocol.fields import MAX_INPUTS
from octavo.protocol.pooling import PoolingParams, floats
from octavo.server.adapters import ServedModel
from octavo.server.context import ServerState
from octavo.server.openai.embedder import Embedder, EmbeddingFields, EmbeddingUsage
from octavo.server.openai.errors import invalid
from octavo.server.openai.json_endpoint import JsonEndpoint
from octavo.server.openai.prompts import check_ids, encode_text
from octavo.server.openai.schema import Label


class EmbeddingsBody(EmbeddingFields, kw_only=True, frozen=True):
    """input: text(s), or token ids of one prompt or several. dimensions: how many numbers to give, of a model whose
    embeddings may be cut (1..hidden_size, or those that its config lists). normalize: by default as the model says.
    """

    UNSUPPORTED: ClassVar[dict[str, tuple[Any, ...]]] = {
        "embed_dtype": ("float32",),
        "endianness": ("little",),
        "messages": (),
        "truncate_prompt_tokens": (),
    }

    input: str | list[str | int | list[int]]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = None
    normalize: bool | None = None
    user: Label | None = None


class Embedding(msgspec.Struct, frozen=True):
    """embedding: as base64, little-endian float32."""

    index: int
    embedding: list[float] | str
    object: Literal["embedding"] = "embedding"


class EmbeddingList(msgspec.Struct, frozen=True):
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage
    object: Literal["list"] = "list"


class Embeddings(JsonEndpoint[EmbeddingsBody]):
    """The endpoint."""

    body_type = EmbeddingsBody

    def __init__(self, state: ServerState) -> None:
        super().__init__(state)
        self._embedder = Embedder(state)

    def places(self, body: EmbeddingsBody) -> tuple[int, str]:
        return len(_inputs(body.input)), "input"

    async def answer(self, body: EmbeddingsBody, model: ServedModel) -> EmbeddingList:
        outputs = self.context.outputs
        if outputs.head == "scores":
            raise invalid(
                f"{body.model} scores pairs of texts and embeds none; allowed: /v1/score, /v1/rerank", "model"
            )
        pooling = PoolingParams(
            body.pooling or outputs.pooling,
            outputs.normalize if body.normalize is None else body.normalize,
            self._dimensions(body.dimensions),
        )
        prompts = []
        for given in _inputs(body.input):
            if isinstance(given, str):
                text = outputs.prefix + given
                ids = await encode_text(self.state, text, body.add_special_tokens is not False, "input")
            else:
                ids = check_ids(self.state, given, "input")
            prompts.append(self._embedder.fitting(ids, "input"))
        vectors = await self._embedder.embed(prompts, body, pooling, model.lora)
        as_text = body.encoding_format == "base64"
        shown = [base64.b64encode(vector).decode() if as_text else floats(vector) for vector in vectors]
        num_tokens = sum(map(len, prompts))
        return EmbeddingList(
            [Embedding(index, each) for index, each in enumerate(shown)],
            model.name,
            EmbeddingUsage(num_tokens, num_tokens),
        )

    def _dimensions(self, given: int | None) -> int | None:
        """Raises APIError 400 for a number that the model's embeddings cannot be cut to."""
        if given is not None:
            try:
                self.context.outputs.check_dimensions(given)
            except ValueError as error:
                raise invalid(str(error), "dimensions") from None
        return given


def _inputs(given: str | list[str | int | list[int]]) -> list[str | list[int]]:
    """The body's inputs, each a text or token ids. Raises APIError 400 for none, too many, or a mixture."""
    kinds: set[type] = set() if isinstance(given, str) else set(map(type, given))
    if isinstance(given, str):
        inputs: list[str | list[int]] = [given]
    elif kinds == {int}:
        inputs = [cast(list[int], given)]
    elif len(kinds) <= 1:
        inputs = cast(list[str | list[int]], given)
    else:
        raise invalid("input mixes texts and token ids", "input", "invalid_type")
    if len(inputs) > MAX_INPUTS:
        message = f"input has {len(inputs)} prompts; at most {MAX_INPUTS} are allowed"
        raise invalid(message, "input", "array_above_max_length")
    if not inputs or not all(inputs):
        raise invalid("input is empty", "input")
    return inputs
