"""Grammars: the constraints of requests, made from the grammars and marks that they name."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

import llguidance
import msgspec

from octavo.protocol.reasoning import ReasoningMarks
from octavo.protocol.request import Request
from octavo.protocol.sampling import SamplingParams
from octavo.structured.compilation import compiled_matcher, ll_tokenizer
from octavo.structured.matcher import GrammarMatcher, MaskMaker
from octavo.structured.reasoning.gate import ReasoningGate
from octavo.structured.reasoning.mark_tokens import MarkTokens
from octavo.structured.vocabulary import Vocabulary

_MAX_GRAMMARS = 256

Constraint = GrammarMatcher | ReasoningGate
Encode = Callable[[str], list[int]]


class Grammars:
    """Compiled grammars by their text, the least recently used dropped first. Any thread may call.

    load: gives the vocabulary and how to encode text; called at the first use, which may take a second.
    """

    def __init__(self, load: Callable[[], tuple[Vocabulary, Encode]]) -> None:
        self._load = load
        self._opened: _Opened | None = None

    def find(self, request: Request) -> Constraint | None:
        """A fresh constraint of what was compiled before, in microseconds; else None.

        Matchers of one grammar share its lexer, whose states are limited: one that is used up is compiled anew.
        """
        opened = self._opened
        if opened is None or (request.reasoning is not None and _key(request.reasoning) not in opened.marks):
            return None
        if request.grammar is None:
            return _gated(request, None, opened)
        compiled = opened.compiled.pop(request.grammar, None)
        if compiled is None:
            return None
        try:
            found = opened.matcher(compiled, request.sampling)
        except ValueError:
            return None
        opened.compiled[request.grammar] = compiled
        return _gated(request, found, opened)

    def compile(self, request: Request) -> Constraint:
        """A fresh constraint. Raises ValueError for a grammar that is wrong, or too complex, and for marks that the
        vocabulary cannot spell."""
        if self._opened is None:
            self._opened = _Opened(*self._load())
        opened = self._opened
        marks = request.reasoning
        if marks is not None and _key(marks) not in opened.marks:
            opened.marks[_key(marks)] = MarkTokens(marks, opened.vocabulary.tokens, opened.encode)
        if request.grammar is None:
            return _gated(request, None, opened)
        compiled = compiled_matcher(opened.tokenizer, request.grammar)
        made = opened.matcher(compiled, request.sampling)
        opened.compiled[request.grammar] = compiled
        while len(opened.compiled) > _MAX_GRAMMARS:
            opened.compiled.popitem(last=False)
        return _gated(request, made, opened)


@dataclass(eq=False)
class _Opened:
    """What is there once the vocabulary has been read. compiled, marks: filled by Grammars."""

    vocabulary: Vocabulary
    encode: Encode
    compiled: OrderedDict[str, llguidance.LLMatcher] = field(default_factory=OrderedDict)
    marks: dict[ReasoningMarks, MarkTokens] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.tokenizer = ll_tokenizer(self.vocabulary, self.encode)
        self._maker = MaskMaker(len(self.vocabulary.tokens))

    def matcher(self, compiled: llguidance.LLMatcher, sampling: SamplingParams) -> GrammarMatcher:
        """Raises ValueError for a grammar that is too complex."""
        return GrammarMatcher(compiled.deep_copy(), self.vocabulary.eos_ids, sampling, self._maker)


def _key(marks: ReasoningMarks) -> ReasoningMarks:
    """What the marks have in common for all outputs."""
    return msgspec.structs.replace(marks, is_open=False)


def _gated(request: Request, matcher: GrammarMatcher | None, opened: _Opened) -> Constraint:
    marks = request.reasoning
    if marks is None:
        assert matcher is not None
        return matcher
    budget = request.sampling.thinking_token_budget
    return ReasoningGate(opened.marks[_key(marks)], marks.is_open, budget, matcher, marks.may_end)
