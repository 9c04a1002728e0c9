"""A vocabulary of bytes and words, and what a mask says in plain sets."""

from __future__ import annotations

import json

from octavo.protocol.reasoning import ReasoningMarks
from octavo.protocol.request import Request
from octavo.protocol.sampling import SamplingParams
from octavo.protocol.structured import StructuredOutputsParams
from octavo.structured.grammar import grammar_of
from octavo.structured.grammars import Constraint, Grammars
from octavo.structured.matcher import GrammarMatcher
from octavo.structured.vocabulary import Vocabulary

WORDS = [b"ab", b"abc", b'{"', b'":', b"true", b"false", b" the", b"12", b"<f", b"</f>", b"=a>", b"no", b"yes"]
EOS, OTHER_EOS, BEGIN = 300, 301, 302
SPECIAL = {EOS: b"<eos>", OTHER_EOS: b"<|end|>", BEGIN: b"<|call|>"}
TOKENS = [bytes([i]) for i in range(256)] + WORDS + [b""] * (EOS - 256 - len(WORDS)) + list(SPECIAL.values())
VOCABULARY = Vocabulary(TOKENS, list(SPECIAL), [EOS, OTHER_EOS])


def grammars() -> Grammars:
    """Encodes a byte a token."""
    return Grammars(lambda: (VOCABULARY, lambda text: list(text.encode())))


def request(grammar: str | None, marks: ReasoningMarks | None = None, **sampling: object) -> Request:
    wish = SamplingParams(**sampling)
    return Request(request_id="a", prompt_token_ids=[1], sampling=wish, max_tokens=9, grammar=grammar, reasoning=marks)


def matcher(wish: StructuredOutputsParams, **sampling: object) -> GrammarMatcher:
    made = grammars().compile(request(grammar_of(wish, VOCABULARY), max_tokens=None, **sampling))
    assert isinstance(made, GrammarMatcher)
    return made


def allowed(mask: bytes) -> set[int]:
    return {i for i in range(8 * len(mask)) if mask[i >> 3] >> (i & 7) & 1}


def ids(text: str | bytes) -> list[int]:
    return list(text.encode() if isinstance(text, str) else text)


def took(state: Constraint, token_ids: list[int]) -> str | None:
    """Why the tokens cannot be taken, or be followed by any, if so."""
    state.accept(token_ids)
    return state.error


def accepts(wish: StructuredOutputsParams, text: str | list[int]) -> bool:
    """Whether the whole text, byte by byte, is in the grammar. Masks and `accept` must agree on the way."""
    state = matcher(wish)
    for token_id in ids(text) if isinstance(text, str) else text:
        if token_id not in allowed(state.mask):
            assert took(state, [token_id]) is not None
            return False
        assert took(state, [token_id]) is None
    return EOS in allowed(state.mask)


def tag(**wish: object) -> StructuredOutputsParams:
    return StructuredOutputsParams(structural_tag=json.dumps(wish))
