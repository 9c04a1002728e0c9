"""Calls as a Python list: [f(a=1, b="x"), g()]. Llama 3.2 (small), Llama 4, ToolACE, LFM2."""

from __future__ import annotations

import ast
import re
import warnings

from octavo.structured.incremental import Markers, Script
from octavo.structured.json_text import json_of
from octavo.structured.tools.base import NAME_RUN, ToolParser

_WRAPPERS = ("<|python_start|>", "<|tool_call_start|>")
_WRAPPER_ENDS = ("<|python_end|>", "<|tool_call_end|>")
_OPENING = Markers(*_WRAPPERS)
_PLAIN_RUN = re.compile(r"[^()\[\]{}'\"]*")
_STRING_RUNS = {quote: re.compile(rf"[^\\{quote}]*") for quote in "'\""}
_CONSTANTS = {"true": True, "false": False, "null": None}
MAX_DEPTH = 64
MAX_LITERAL_CHARACTERS = 2**17  # of one call's arguments; they are parsed at once, while streams wait


class PythonicParser(ToolParser):
    """A list of calls counts where it opens the output, or stands in the wrapper that some models write around it,
    and each function must be known. Arguments are literals given by name; JSON's true, false and null are taken too.
    The arguments of one call come out at once."""

    def _parse(self) -> Script[None]:
        self._content((yield from self._spaces()))
        self._source.clear()
        if (yield from self._peek()) == "[":
            yield from self._list()
        while (yield from self._content_until(_OPENING)):
            yield from self._spaces()
            if (yield from self._peek()) == "[":
                yield from self._list()
            else:
                self._degrade()
        self._all_is_read()

    def _list(self) -> Script[None]:
        yield from self._accept("[")
        while True:
            yield from self._spaces()
            complete = yield from self._call()
            self._settle(complete)
            if not complete:
                return
            if not (yield from self._skip(",")):
                yield from self._skip("]")
                yield from self._skip(*_WRAPPER_ENDS)
                return

    def _call(self) -> Script[bool]:
        name = yield from self._run(NAME_RUN)
        if not self._is_known(name) or not (yield from self._accept("(")):
            return False
        source = yield from self._balanced()
        arguments = None if source is None else _as_json(source)
        if arguments is None or not self._begin(name):
            return False
        self._arguments(arguments)
        return True

    def _balanced(self) -> Script[str | None]:
        """The text up to the parenthesis that closes the call, without it; None where there is none."""
        pieces: list[str] = []
        closers = [")"]
        while True:
            pieces.append((yield from self._run(_PLAIN_RUN)))
            character = yield from self._peek()
            if not character:
                return None
            self._read(self._at + 1)
            if character in "'\"":
                pieces.append(character)
                yield from self._string(character, pieces)
                continue
            if character in "([{":
                closers.append({"(": ")", "[": "]", "{": "}"}[character])
            elif closers.pop() != character:
                return None
            if not closers:
                return "".join(pieces)
            if len(closers) > MAX_DEPTH:
                return None
            pieces.append(character)

    def _string(self, quote: str, pieces: list[str]) -> Script[None]:
        """The rest of a string, its quote included."""
        while True:
            pieces.append((yield from self._run(_STRING_RUNS[quote])))
            character = yield from self._peek()
            if not character:
                return
            pieces.append(self._read(self._at + 1))
            if character == quote:
                return
            if (yield from self._peek()):
                pieces.append(self._read(self._at + 1))


def _as_json(arguments: str) -> str | None:
    """The JSON object of the arguments of a call; None where they are not literals given by name."""
    call = _parsed(f"f({arguments}\n)")
    if not isinstance(call, ast.Call) or call.args or any(keyword.arg is None for keyword in call.keywords):
        return None
    return _literal(ast.Dict([ast.Constant(k.arg) for k in call.keywords], [k.value for k in call.keywords]))


def literal_as_json(text: str) -> str | None:
    """A Python literal as JSON text; None where it is none."""
    node = _parsed(text)
    return None if node is None else _literal(node)


def _parsed(expression: str) -> ast.expr | None:
    if len(expression) > MAX_LITERAL_CHARACTERS:
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an unknown escape stands for itself
            return ast.parse(expression, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _literal(node: ast.expr) -> str | None:
    try:
        return json_of(ast.literal_eval(_Constants().visit(node)))
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        return None


class _Constants(ast.NodeTransformer):
    """JSON's names for Python's constants."""

    def visit_Name(self, node: ast.Name) -> ast.expr:
        return ast.Constant(_CONSTANTS[node.id]) if node.id in _CONSTANTS else node
