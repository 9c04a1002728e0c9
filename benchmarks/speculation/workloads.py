"""Prompts for speculative decoding, by how much of an answer can be found in its prompt.

    code edit   a function of the standard library, to be written again with one variable renamed
    summary     the beginning of a page of Python's language reference, to be told about and quoted
    chat        short questions, whose answers are in no prompt
    random      random token ids, continued by sampling at temperature 1: nothing to be guessed

All is made from the standard library, the same wherever that is of one version. In the first two kinds the answer is
begun for the model, and a summary has an example before it: a very small model copies what it has seen begun, and
otherwise often tells something else.
"""

from __future__ import annotations

import base64
import calendar
import colorsys
import csv
import heapq
import inspect
import pydoc_data.topics
import random
import re
import shutil
import string
import textwrap
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from octavo.text.chat_rendering import rendered_chats
from octavo.text.tokenizer import Tokenizer

KINDS = ("code edit", "summary", "chat", "random")

_EDITS: list[tuple[Callable[..., Any], str, str]] = [  # function, variable, its new name
    (colorsys.rgb_to_hls, "maxc", "highest"),
    (colorsys.rgb_to_hsv, "minc", "lowest"),
    (heapq._siftup, "childpos", "child"),  # type: ignore[attr-defined]
    (heapq._siftdown, "parentpos", "above"),  # type: ignore[attr-defined]
    (colorsys.hsv_to_rgb, "f", "fraction"),
    (colorsys.yiq_to_rgb, "y", "luma"),
    (textwrap.indent, "prefix", "margin"),
    (calendar.HTMLCalendar.formatmonth, "v", "lines"),
    (base64._85encode, "chunks", "pieces"),  # type: ignore[attr-defined]
    (shutil.copyfileobj, "buf", "block"),
    (string.Formatter.get_field, "obj", "found"),
    (csv.DictReader.__next__, "row", "line"),
]
_PAGES = ("with", "for", "global", "exceptions", "raise", "in", "augassign", "dict", "class", "context-managers")
_PAGE_CHARACTERS, _QUOTED_CHARACTERS = 1600, 1100
_EXAMPLE = """The "pass" statement does nothing. It is used where a statement is
required by the syntax, but no code needs to be executed.

Examples of its use are a function that does nothing yet and a class
without any methods yet."""
_QUOTE = """Here is a page of a manual:

<page>
{}
</page>

Say in one sentence what the page is about, then quote it."""
_QUOTED = """The page is about Python's "{}". It says:

<page>
{}"""
_QUESTIONS = (
    "What is the capital of France, and what is it known for?",
    "How do I boil an egg?",
    "Why is the sky blue?",
    "Give me three names for a small grey cat.",
    "What is the difference between a list and a tuple in Python?",
    "Write a short poem about the sea.",
    "How can I sleep better?",
    "Explain photosynthesis to a child.",
    "What should I see in Rome in one day?",
    "Who wrote Don Quixote, and when?",
    "How does a bicycle stay upright?",
    "Suggest a dinner for two without meat.",
)
_RANDOM_PROMPTS, _RANDOM_TOKENS = 12, 200


@dataclass(frozen=True)
class Prompt:
    """messages: a conversation, whose last message is the assistant's if its answer is begun; empty where token_ids is
    the prompt. max_tokens: what the answer may take; copies of the prompt need about that. temperature: 0 is greedy."""

    kind: str
    max_tokens: int
    temperature: float = 0.0
    messages: list[dict[str, str]] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)

    def tokens(self, tokenizer: Tokenizer) -> list[int]:
        """As the model takes it, by its own chat template."""
        if self.token_ids:
            return self.token_ids
        begun = self.messages[-1]["role"] == "assistant"
        rendering: Any = {"add_generation_prompt": not begun, "continue_final_message": begun}
        return tokenizer.encode(rendered_chats(tokenizer, [self.messages], rendering)[0], add_special_tokens=False)


def prompts(kind: str, vocab_size: int = 32_000) -> list[Prompt]:
    """All of a kind. vocab_size: random ids lie below it. Raises KeyError for a kind that is not one of KINDS."""
    make: dict[str, Callable[[], list[Prompt]]] = {
        "code edit": lambda: [_edit(*edit) for edit in _EDITS],
        "summary": lambda: [_summary(page) for page in _PAGES],
        "chat": lambda: [Prompt("chat", 128, messages=[_user(question)]) for question in _QUESTIONS],
        "random": lambda: _random(vocab_size),
    }
    return make[kind]()


def _user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def _begun(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def _edit(function: Callable[..., Any], old: str, new: str) -> Prompt:
    code = textwrap.dedent(inspect.getsource(function))
    first_line = re.sub(rf"\b{old}\b", new, code.splitlines()[0])
    wish = f"Rename the variable `{old}` to `{new}` and change nothing else. Write the whole function again."
    return Prompt(
        "code edit",
        256,
        messages=[
            _user(f"Here is a Python function:\n\n```python\n{code}```\n\n{wish}"),
            _begun(f"Here is the function with `{old}` renamed to `{new}`:\n\n```python\n{first_line}"),
        ],
    )


def _summary(page: str) -> Prompt:
    """Of the paragraphs of prose that a page begins with. The answer is begun with the first words of the first one."""
    title, _, body = pydoc_data.topics.topics[page].partition("\n\n")
    paragraphs = [text for text in body[:_PAGE_CHARACTERS].split("\n\n")[:-1] if len(text) > 60 and text[0] != " "]
    text = ""
    for paragraph in paragraphs:
        if len(text) + len(paragraph) <= _QUOTED_CHARACTERS:
            text += "\n\n" * bool(text) + paragraph
    first_words = re.match(r"(\S+\s+){7}\S+", text)
    assert first_words is not None, title
    return Prompt(
        "summary",
        160,
        messages=[
            _user(_QUOTE.format(_EXAMPLE)),
            _begun(_QUOTED.format("pass", _EXAMPLE) + "\n</page>"),
            _user(_QUOTE.format(text)),
            _begun(_QUOTED.format(page, first_words[0])),
        ],
    )


def _random(vocab_size: int) -> list[Prompt]:
    rng = random.Random(1)
    return [
        Prompt("random", 64, 1.0, token_ids=[rng.randrange(100, vocab_size) for _ in range(_RANDOM_TOKENS)])
        for _ in range(_RANDOM_PROMPTS)
    ]
