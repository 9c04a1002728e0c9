"""POST /v1/score and /v1/rerank (vLLM's, Jina's and Cohere's shape): how well texts go together.

Of a model that is made to score, a score is what it says of the two texts in one prompt, as a probability. Of any
other it is the cosine of the angle between two embeddings, -1..1: of one model, comparable; no probability.
"""

from __future__ import annotations

import time
import uuid
from typing import Annotated, Any, ClassVar, Literal

import msgspec
from msgspec import Meta

from octavo.protocol.fields import MAX_INPUTS
from octavo.protocol.lora import LoRARequest
from octavo.protocol.pooling import PoolingParams, floats
from octavo.server.adapters import ServedModel
from octavo.server.context import ServerState
from octavo.server.openai.cross_scores import CrossScores
from octavo.server.openai.embedder import Embedder, EmbeddingFields, EmbeddingUsage
from octavo.server.openai.errors import invalid
from octavo.server.openai.json_endpoint import JsonEndpoint
from octavo.server.openai.prompts import encode_text
from octavo.server.openai.schema import Label

Texts = str | Annotated[list[str], Meta(min_length=1, max_length=MAX_INPUTS)]
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "activation": (),
    "instruction": (),
    "max_tokens_per_doc": (),
    "mm_processor_kwargs": (),
    "softmax": (),
    "truncate_prompt_tokens": (),
}


class ScoringFields(EmbeddingFields, kw_only=True, frozen=True):
    """use_activation: of a model that scores, false for the numbers whose sigmoids are the probabilities."""

    UNSUPPORTED: ClassVar[dict[str, tuple[Any, ...]]] = _UNSUPPORTED

    use_activation: bool | None = None
    user: Label | None = None


class ScoreBody(ScoringFields, kw_only=True, frozen=True):
    """One of the first three and one of the second three: one text against each of several, or pairs."""

    text_1: Texts | None = None
    queries: Texts | None = None
    data_1: Texts | None = None
    text_2: Texts | None = None
    documents: Texts | None = None
    data_2: Texts | None = None


class Score(msgspec.Struct, frozen=True):
    index: int
    score: float
    object: Literal["score"] = "score"


class ScoreList(msgspec.Struct, frozen=True):
    id: str
    created: int
    model: str
    data: list[Score]
    usage: EmbeddingUsage
    object: Literal["list"] = "list"


class Document(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    text: str


class RerankBody(ScoringFields, kw_only=True, frozen=True):
    """top_n: how many of the best, null or 0 for all."""

    query: str
    documents: Annotated[list[str | Document], Meta(min_length=1, max_length=MAX_INPUTS - 1)]
    top_n: int | None = None
    return_documents: bool = True


class Ranked(msgspec.Struct, frozen=True, omit_defaults=True):
    index: int
    relevance_score: float
    document: Document | None = None


class Ranking(msgspec.Struct, frozen=True):
    id: str
    model: str
    results: list[Ranked]
    usage: EmbeddingUsage


class _Scorer:
    """Two sides of texts to scores, in whichever way the model has."""

    def __init__(self, state: ServerState) -> None:
        self._state = state
        self._embedder = Embedder(state)
        self._cross = CrossScores(state) if state.context.outputs.head == "scores" else None

    def num_sequences(self, sides: dict[str, list[str]]) -> int:
        return max(map(len, sides.values())) if self._cross is not None else sum(map(len, sides.values()))

    async def scores(
        self, sides: dict[str, list[str]], body: ScoringFields, lora: LoRARequest | None
    ) -> tuple[list[float], EmbeddingUsage]:
        """One for each pair of the two sides, by the body's names for them; one text goes with all of the others.
        Raises APIError."""
        left, right = sides.values()
        if self._cross is not None:
            pairs = list(zip(left * len(right) if len(left) == 1 else left, right, strict=True))
            as_probabilities = body.use_activation is not False
            return await self._cross.scores(pairs, body, lora, as_probabilities, list(sides)[1])
        if body.use_activation:
            raise invalid(
                "use_activation=true needs a model that scores; this one's scores are cosines", "use_activation"
            )
        vectors, usage = await self._vectors(sides, body, lora)
        first, second = vectors[: len(left)], vectors[len(left) :]
        first = first * len(second) if len(first) == 1 else first
        return [cosine(a, b) for a, b in zip(first, second, strict=True)], usage

    async def _vectors(
        self, sides: dict[str, list[str]], body: ScoringFields, lora: LoRARequest | None
    ) -> tuple[list[list[float]], EmbeddingUsage]:
        """The embeddings of the texts of one side after the other. Raises APIError."""
        outputs = self._state.context.outputs
        prompts, special = [], body.add_special_tokens is not False
        for param, texts in sides.items():
            for text in texts:
                ids = await encode_text(self._state, outputs.prefix + text, special, param)
                prompts.append(self._embedder.fitting(ids, param))
        pooling = PoolingParams(body.pooling or outputs.pooling)
        found = [floats(vector) for vector in await self._embedder.embed(prompts, body, pooling, lora)]
        num_tokens = sum(map(len, prompts))
        return found, EmbeddingUsage(num_tokens, num_tokens)


class Scores(JsonEndpoint[ScoreBody]):
    """The endpoint."""

    body_type = ScoreBody

    def __init__(self, state: ServerState) -> None:
        super().__init__(state)
        self._scorer = _Scorer(state)

    def places(self, body: ScoreBody) -> tuple[int, str]:
        sides = _sides(body)
        return self._scorer.num_sequences(sides), list(sides)[-1]

    async def answer(self, body: ScoreBody, model: ServedModel) -> ScoreList:
        scores, usage = await self._scorer.scores(_sides(body), body, model.lora)
        return ScoreList(
            f"score-{uuid.uuid4().hex}",
            int(time.time()),
            model.name,
            [Score(index, score) for index, score in enumerate(scores)],
            usage,
        )


class Rerank(JsonEndpoint[RerankBody]):
    """The endpoint."""

    body_type = RerankBody

    def __init__(self, state: ServerState) -> None:
        super().__init__(state)
        self._scorer = _Scorer(state)

    def places(self, body: RerankBody) -> tuple[int, str]:
        return self._scorer.num_sequences({"query": [body.query], "documents": [""] * len(body.documents)}), "documents"

    async def answer(self, body: RerankBody, model: ServedModel) -> Ranking:
        documents = [each if isinstance(each, Document) else Document(each) for each in body.documents]
        sides = {"query": [body.query], "documents": [document.text for document in documents]}
        scores, usage = await self._scorer.scores(sides, body, model.lora)
        ranked = [
            Ranked(index, score, document if body.return_documents else None)
            for index, (document, score) in enumerate(zip(documents, scores, strict=True))
        ]
        ranked.sort(key=lambda each: -each.relevance_score)
        return Ranking(f"rerank-{uuid.uuid4().hex}", model.name, ranked[: body.top_n or None], usage)


def cosine(a: list[float], b: list[float]) -> float:
    """Of vectors of length 1."""
    return sum(x * y for x, y in zip(a, b, strict=True))


def _sides(body: ScoreBody) -> dict[str, list[str]]:
    """The two sides by the body's names for them. Raises APIError 400 where they are not two, or make no pairs."""
    sides: dict[str, list[str]] = {}
    for names in (("text_1", "queries", "data_1"), ("text_2", "documents", "data_2")):
        given = [name for name in names if getattr(body, name) is not None]
        if len(given) != 1:
            raise invalid(f"give one of {', '.join(names)}", (given or names)[-1])
        texts = getattr(body, given[0])
        sides[given[0]] = [texts] if isinstance(texts, str) else texts
    (first, left), (second, right) = sides.items()
    if len(left) not in (1, len(right)):
        message = f"{first} has {len(left)} texts and {second} {len(right)}; allowed: one, or as many as {second}"
        raise invalid(message, first)
    return sides
