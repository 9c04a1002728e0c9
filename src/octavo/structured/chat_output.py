"""One parser for all of an output: reasoning first, and what is left of it to the tool parser."""

from __future__ import annotations

from octavo.structured.events import ContentText, Event, OutputParser
from octavo.structured.harmony import HarmonyParser
from octavo.structured.reasoning.registry import REASONING_PARSERS
from octavo.structured.tools.base import Functions
from octavo.structured.tools.registry import STRICT_PARSERS, TOOL_PARSERS


class _Chain:
    """OutputParser: the second parses what the first calls content."""

    def __init__(self, first: OutputParser, second: OutputParser) -> None:
        self._first = first
        self._second = second

    def feed(self, text: str) -> list[Event]:
        """See OutputParser."""
        return self._through_second(self._first.feed(text))

    def finish(self) -> list[Event]:
        """See OutputParser."""
        return self._through_second(self._first.finish()) + self._second.finish()

    def _through_second(self, events: list[Event]) -> list[Event]:
        passed: list[Event] = []
        for event in events:
            passed += self._second.feed(event.text) if isinstance(event, ContentText) else [event]
        return passed


def output_parser(
    tool_parser: str | None,
    reasoning_parser: str | None,
    functions: Functions,
    prompt: str,
    strict: bool = False,
    begun: str | None = None,
) -> OutputParser | None:
    """The parser for one output that follows `prompt`; None where nothing is to be parsed.

    tool_parser, reasoning_parser: names in the registries; harmony is parsed once for both.
    functions: those that may be called. strict: the output was held to `tools.strict.strict_calls_tag`. begun:
    see reasoning_marks.
    """
    parsers = STRICT_PARSERS if strict else TOOL_PARSERS
    tools = None if tool_parser is None else parsers[tool_parser](functions)
    if reasoning_parser is None or isinstance(tools, HarmonyParser):
        return tools
    return after_reasoning(reasoning_parser, tools, prompt, begun)


def after_reasoning(
    reasoning_parser: str | None, parser: OutputParser | None, prompt: str, begun: str | None = None
) -> OutputParser | None:
    """`parser` for what follows the reasoning, where that is told apart."""
    if reasoning_parser is None:
        return parser
    reasoning = REASONING_PARSERS[reasoning_parser](prompt, begun)
    return reasoning if parser is None else _Chain(reasoning, parser)
