"""Tools and reasoning of chats: what a request may ask for, and how its outputs are parsed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec

from octavo.config import ServerOptions
from octavo.protocol.structured import StructuredOutputsParams
from octavo.server.openai.errors import invalid
from octavo.server.openai.schema import ChatBody, NamedToolChoice, Tool
from octavo.server.openai.structured import Wish, wish_of
from octavo.structured.chat_output import output_parser
from octavo.structured.events import OutputParser
from octavo.structured.reasoning.registry import SPECIAL_MARKS
from octavo.structured.tools.base import Functions
from octavo.structured.tools.constrained import NamedCallParser, RequiredCallsParser
from octavo.structured.tools.registry import detect_tool_parser
from octavo.structured.tools.schema import named_call_schema, required_calls_schema
from octavo.text.chat_template import ChatTemplate


@dataclass(frozen=True)
class OutputFormat:
    """How the outputs of one request are to be parsed. functions: those that may be called.

    constrained: the output is held to a schema, so that it is calls and nothing else; of `named` alone, where that is
    given.
    """

    tool_parser: str | None
    reasoning_parser: str | None
    functions: Functions
    constrained: bool = False
    named: str | None = None

    @property
    def needs_special_tokens(self) -> bool:
        """Whether the marks to look for may be special tokens, so that the text must show these."""
        return not self.constrained and (self.tool_parser is not None or self.reasoning_parser in SPECIAL_MARKS)

    def parser(self, prompt: str) -> OutputParser | None:
        """A new one, for one output that follows `prompt`; None where the text is the content."""
        if self.named is not None:
            return NamedCallParser(self.functions, self.named)
        if self.constrained:
            return RequiredCallsParser(self.functions)
        return output_parser(self.tool_parser, self.reasoning_parser, self.functions, prompt)


class ToolCalling:
    """What the server's options and the model's chat template allow."""

    def __init__(self, options: ServerOptions, template: ChatTemplate | None) -> None:
        """Raises ValueError where tool calls are asked for and cannot be read."""
        self._options = options
        self._template_shows_tools = template is not None and template.shows_tools
        self._parser: str | None = options.tool_call_parser
        if self._parser is None and template is not None:
            self._parser = detect_tool_parser(template.source)
        if options.enable_auto_tool_choice and self._parser is None:
            raise ValueError(
                "enable_auto_tool_choice=True needs a tool_call_parser: the chat template writes calls in no known "
                "format"
            )
        if options.enable_auto_tool_choice and not self._template_shows_tools:
            raise ValueError(
                "enable_auto_tool_choice=True needs a chat_template that shows tools to the model; this one does not"
            )

    def check(self, body: ChatBody) -> None:
        """Refuse what cannot be done. Raises APIError 400."""
        tools = body.tools or []
        names = [tool.function.name for tool in tools]
        for index, tool in enumerate(tools):
            self._check_tool(tool, f"tools[{index}].function", names[:index], _is_constrained(body))
        if tools and not self._template_shows_tools:
            raise invalid(
                "the model's chat template does not show tools to the model; start the server with --chat-template "
                "FILE for one that does",
                "tools",
            )
        self._check_choice(body, names)
        if body.include_reasoning is False and self._options.reasoning_parser is None:
            raise invalid(
                "include_reasoning=false needs a server that tells reasoning from content: start it with "
                "--reasoning-parser NAME",
                "include_reasoning",
            )

    def format(self, body: ChatBody) -> OutputFormat:
        """For a body that has been checked."""
        calls = bool(body.tools) and body.tool_choice != "none"
        return OutputFormat(
            self._parser if calls else None,
            self._options.reasoning_parser,
            _functions(body),
            constrained=calls and _is_constrained(body),
            named=body.tool_choice.function.name if isinstance(body.tool_choice, NamedToolChoice) else None,
        )

    def wish(self, body: ChatBody) -> Wish | None:
        """The constraint on the output: that of its calls where they are required, else the body's own.

        For a body that has been checked. Raises APIError 400 for both at once, and for a schema that cannot be.
        """
        own = wish_of(body)
        if not _is_constrained(body):
            return own
        if own is not None:
            raise invalid(f"tool_choice and {own.path} exclude each other: a request has one constraint", own.path)
        functions = _functions(body)
        try:
            if isinstance(body.tool_choice, NamedToolChoice):
                schema = named_call_schema(functions, body.tool_choice.function.name)
            else:
                schema = required_calls_schema(functions, body.parallel_tool_calls is not False)
            return Wish(StructuredOutputsParams(json=schema), "tools")
        except ValueError as error:
            raise invalid(str(error), "tools") from None

    def for_template(self, body: ChatBody) -> list[dict[str, Any]] | None:
        """The tools that the prompt is to show, as they came."""
        hidden = body.tool_choice == "none" and self._options.exclude_tools_when_tool_choice_none
        return None if hidden or not body.tools else msgspec.to_builtins(body.tools)

    def _check_tool(self, tool: Tool, at: str, names_before: list[str], constrained: bool) -> None:
        if tool.function.name in names_before:
            raise invalid(f"{at}.name={tool.function.name!r} is there twice; each name may be once", f"{at}.name")
        if tool.function.strict and not constrained:
            raise invalid(
                f"{at}.strict=true needs tool_choice required or a named function; allowed besides: false",
                f"{at}.strict",
                "unsupported_parameter",
            )

    def _check_choice(self, body: ChatBody, names: list[str]) -> None:
        choice = body.tool_choice
        if choice == "none" or (choice is None and not names):
            return
        if not names:
            raise invalid("tool_choice is only allowed with tools, besides 'none'", "tool_choice")
        if isinstance(choice, NamedToolChoice) and choice.function.name not in names:
            raise invalid(
                f"tool_choice.function.name={choice.function.name!r} is not among tools; allowed: {', '.join(names)}",
                "tool_choice.function.name",
            )
        if _is_constrained(body):
            return
        if self._options.enable_auto_tool_choice is False:
            raise invalid("tool_choice=auto is turned off on this server; allowed: none", "tool_choice")
        if self._parser is None:
            raise invalid(
                "tools cannot be used: the chat template writes calls in no known format; start the server with "
                "--tool-call-parser NAME",
                "tools",
            )


def _is_constrained(body: ChatBody) -> bool:
    """Whether calls are required, of any function or of a named one."""
    return body.tool_choice == "required" or isinstance(body.tool_choice, NamedToolChoice)


def _functions(body: ChatBody) -> Functions:
    return {tool.function.name: tool.function.parameters for tool in body.tools or ()}
