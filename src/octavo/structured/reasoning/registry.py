"""The reasoning parsers by name. Each is told the prompt's text, whose end may have opened or closed the reasoning."""

from __future__ import annotations

from collections.abc import Callable

from octavo.structured.events import OutputParser
from octavo.structured.harmony import HarmonyParser
from octavo.structured.reasoning.tags import TaggedReasoning


def _deepseek_r1(prompt: str) -> OutputParser:
    return _think(not prompt.rstrip().endswith("</think>"))


def _qwen3(prompt: str) -> OutputParser:
    return _think(prompt.rstrip().endswith("<think>"))


def _think(is_open: bool) -> OutputParser:
    return TaggedReasoning(("<think>",), ("</think>",), is_open)


def _mistral(prompt: str) -> OutputParser:
    return TaggedReasoning(("[THINK]",), ("[/THINK]",), prompt.rstrip().endswith("[THINK]"))


def _granite(prompt: str) -> OutputParser:  # noqa: ARG001 (its prompts open nothing)
    openings = ("Here is my thought process:", "Here's my thought process:")
    return TaggedReasoning(openings, ("Here is my response:", "Here's my response:"), is_open=False)


def _openai_gptoss(prompt: str) -> OutputParser:  # noqa: ARG001 (messages name their channel)
    return HarmonyParser(None)


REASONING_PARSERS: dict[str, Callable[[str], OutputParser]] = {
    "deepseek_r1": _deepseek_r1,
    "granite": _granite,
    "mistral": _mistral,
    "openai_gptoss": _openai_gptoss,
    "qwen3": _qwen3,
}

# Those whose marks are special tokens, which the text must show then.
SPECIAL_MARKS = frozenset({"mistral", "openai_gptoss"})
