"""The reasoning parsers by name, and the marks they look for. Each is told the prompt's text, whose end may have opened
or closed the reasoning, and the text with which the output's own message has begun, where that is continued."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Protocol

import msgspec

from octavo.protocol.reasoning import ReasoningMarks
from octavo.structured.events import OutputParser
from octavo.structured.harmony import HarmonyParser
from octavo.structured.reasoning.tags import TaggedReasoning

_THINK, _THINK_END = "<think>", "</think>"
_FINAL, _MESSAGE = "<|channel|>final", "<|message|>"


def _deepseek_r1(prompt: str) -> ReasoningMarks:
    return ReasoningMarks((_THINK,), (_THINK_END,), is_open=not _ends(prompt, _THINK_END))


def _qwen3(prompt: str) -> ReasoningMarks:
    return ReasoningMarks((_THINK,), (_THINK_END,), is_open=_ends(prompt, _THINK))


def _mistral(prompt: str) -> ReasoningMarks:
    return ReasoningMarks(("[THINK]",), ("[/THINK]",), is_open=_ends(prompt, "[THINK]"))


def _granite(prompt: str) -> ReasoningMarks:  # noqa: ARG001 (its prompts open nothing)
    openings = ("Here is my thought process:", "Here's my thought process:")
    return ReasoningMarks(openings, ("Here is my response:", "Here's my response:"), is_open=False)


def _openai_gptoss(prompt: str) -> ReasoningMarks:
    """All is reasoning up to the final message, whose header may name a format. Calls come ahead of it, and end the
    output."""
    is_open = not _ends(prompt, _FINAL + _MESSAGE)
    return ReasoningMarks((), (_FINAL,), is_open, header_end=_MESSAGE, may_end=True)


_MARKS: dict[str, Callable[[str], ReasoningMarks]] = {
    "deepseek_r1": _deepseek_r1,
    "granite": _granite,
    "mistral": _mistral,
    "openai_gptoss": _openai_gptoss,
    "qwen3": _qwen3,
}

# Those whose marks are special tokens, which the text must show then.
SPECIAL_MARKS = frozenset({"mistral", "openai_gptoss"})

# Those whose reasoning a closing mark ends wherever it stands, so that it may be forced.
FORCIBLE = tuple(sorted(set(_MARKS) - {"openai_gptoss"}))


def reasoning_marks(parser: str, prompt: str, begun: str | None = None) -> ReasoningMarks | None:
    """The marks of an output that follows `prompt`; None where that has closed the reasoning.

    begun: the last message's text, which the output continues; None for a message of its own. Raises ValueError for an
    unknown parser.
    """
    if parser not in _MARKS:
        raise ValueError(f"reasoning_parser={parser!r} is unknown; allowed: {', '.join(sorted(_MARKS))}")
    marks = _marks(parser, prompt, begun)
    closed = bool(begun) or any(_ends(prompt, closing + marks.header_end) for closing in marks.closings)
    return None if closed and not marks.is_open else marks


def check_budget(parser: str | None) -> None:
    """Raises ValueError, naming thinking_token_budget, where the end of the reasoning cannot be forced."""
    if parser is None:
        raise ValueError("thinking_token_budget needs a reasoning parser, which knows the marks of the reasoning")
    if parser not in FORCIBLE:
        raise ValueError(
            f"thinking_token_budget is not available with reasoning_parser={parser!r}; allowed with: "
            f"{', '.join(FORCIBLE)}"
        )


def _marks(name: str, prompt: str, begun: str | None) -> ReasoningMarks:
    """A message that has begun reasons on where its text has opened the reasoning and not closed it, and else no
    more."""
    marks = _MARKS[name](prompt)
    if not begun:
        return marks
    opened = max((begun.rfind(mark) for mark in marks.openings), default=-1)
    closed = max(begun.rfind(mark) for mark in marks.closings)
    return msgspec.structs.replace(marks, openings=(), is_open=opened > closed)


class _MakesParser(Protocol):
    def __call__(self, prompt: str, begun: str | None = None) -> OutputParser:
        """For one output; see reasoning_marks."""
        ...


def _parser(name: str, prompt: str, begun: str | None = None) -> OutputParser:
    if name == "openai_gptoss":
        return HarmonyParser(None)
    marks = _marks(name, prompt, begun)
    return TaggedReasoning(marks.openings, marks.closings, marks.is_open)


REASONING_PARSERS: dict[str, _MakesParser] = {name: partial(_parser, name) for name in _MARKS}


def _ends(prompt: str, mark: str) -> bool:
    return prompt.rstrip().endswith(mark)
