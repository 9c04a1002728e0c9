"""POST /v1/score and /v1/rerank (vLLM's, Jina's and Cohere's shape): how near the embeddings of texts are.

A score is the cosine of the angle between two embeddings, -1..1: of one model, comparable; in themselves, no
probabilities.
"""

from __future__ import annotations

import time
import uuid
from typing import Annotated, Any, ClassVar, Literal

import msgspec
from msgspec import Meta

from octavo.protocol.fields import MAX_INPUTS
from octavo.protocol.pooling import floats
from octavo.server.context import ServerState
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
    "softmax": (False,),
    "truncate_prompt_tokens": (),
    "use_activation": (False,),
}


class ScoreBody(EmbeddingFields, kw_only=True, frozen=True):
    """One of the first three and one of the second three: one text against each of several, or pairs."""

    UNSUPPORTED: ClassVar[dict[str, tuple[Any, ...]]] = _UNSUPPORTED

    text_1: Texts | None = None
    queries: Texts | None = None
    data_1: Texts | None = None
    text_2: Texts | None = None
    documents: Texts | None = None
    data_2: Texts | None = None
    user: Label | None = None


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


class RerankBody(EmbeddingFields, kw_only=True, frozen=True):
    """top_n: how many of the best, null or 0 for all."""

    UNSUPPORTED: ClassVar[dict[str, tuple[Any, ...]]] = _UNSUPPORTED

    query: str
    documents: Annotated[list[str | Document], Meta(min_length=1, max_length=MAX_INPUTS - 1)]
    top_n: int | None = None
    return_documents: bool = True
    user: Label | None = None


class Ranked(msgspec.Struct, frozen=True, omit_defaults=True):
    index: int
    relevance_score: float
    document: Document | None = None


class Ranking(msgspec.Struct, frozen=True):
    id: str
    model: str
    results: list[Ranked]
    usage: EmbeddingUsage


class _Near:
    """Texts to embeddings, and their cosines."""

    def __init__(self, state: ServerState) -> None:
        self._state = state
        self._embedder = Embedder(state)

    async def vectors(
        self, groups: dict[str, list[str]], body: EmbeddingFields
    ) -> tuple[list[list[list[float]]], EmbeddingUsage]:
        """The embeddings of each group of texts; its key is the body's name for it. Raises APIError."""
        prompts, special = [], body.add_special_tokens is not False
        for param, texts in groups.items():
            for text in texts:
                ids = await encode_text(self._state, text, special, param)
                prompts.append(self._embedder.fitting(ids, param))
        found = iter([floats(vector) for vector in await self._embedder.embed(prompts, body)])
        num_tokens = sum(map(len, prompts))
        return [[next(found) for _ in texts] for texts in groups.values()], EmbeddingUsage(num_tokens, num_tokens)


class Scores(JsonEndpoint[ScoreBody]):
    """The endpoint."""

    body_type = ScoreBody

    def __init__(self, state: ServerState) -> None:
        super().__init__(state)
        self._near = _Near(state)

    def places(self, body: ScoreBody) -> tuple[int, str]:
        sides = _sides(body)
        return sum(map(len, sides.values())), list(sides)[-1]

    async def answer(self, body: ScoreBody) -> ScoreList:
        (left, right), usage = await self._near.vectors(_sides(body), body)
        left = left * len(right) if len(left) == 1 else left
        return ScoreList(
            f"score-{uuid.uuid4().hex}",
            int(time.time()),
            self.context.served_model_names[0],
            [Score(index, cosine(a, b)) for index, (a, b) in enumerate(zip(left, right, strict=True))],
            usage,
        )


class Rerank(JsonEndpoint[RerankBody]):
    """The endpoint."""

    body_type = RerankBody

    def __init__(self, state: ServerState) -> None:
        super().__init__(state)
        self._near = _Near(state)

    def places(self, body: RerankBody) -> tuple[int, str]:
        return 1 + len(body.documents), "documents"

    async def answer(self, body: RerankBody) -> Ranking:
        documents = [each if isinstance(each, Document) else Document(each) for each in body.documents]
        groups = {"query": [body.query], "documents": [document.text for document in documents]}
        ((query,), others), usage = await self._near.vectors(groups, body)
        ranked = [
            Ranked(index, cosine(query, vector), document if body.return_documents else None)
            for index, (document, vector) in enumerate(zip(documents, others, strict=True))
        ]
        ranked.sort(key=lambda each: -each.relevance_score)
        name = self.context.served_model_names[0]
        return Ranking(f"rerank-{uuid.uuid4().hex}", name, ranked[: body.top_n or None], usage)


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
