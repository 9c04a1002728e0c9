"""Tools and reasoning of chats: what a request may ask for, and how its outputs are parsed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec

from octavo.config import ServerOptions
from octavo.server.openai.errors import invalid
from octavo.server.openai.schema import ChatBody, NamedToolChoice, Tool
from octavo.structured.chat_output import output_parser
from octavo.structured.events import OutputParser
from octavo.structured.reasoning.registry import SPECIAL_MARKS
from octavo.structured.tools.base import Functions
from octavo.structured.tools.registry import detect_tool_parser
from octavo.text.chat_template import ChatTemplate


@dataclass(frozen=True)
class OutputFormat:
    """How the outputs of one request are to be parsed. functions: those that may be called."""

    tool_parser: str | None
    reasoning_parser: str | None
    functions: Functions

    @property
    def needs_special_tokens(self) -> bool:
        """Whether the marks to look for may be special tokens, so that the text must show these."""
        return self.tool_parser is not None or self.reasoning_parser in SPECIAL_MARKS

    def parser(self, prompt: str) -> OutputParser | None:
        """A new one, for one output that follows `prompt`; None where the text is the content."""
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
            self._check_tool(tool, f"tools[{index}].function", names[:index])
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
        functions = {tool.function.name: tool.function.parameters for tool in body.tools or ()}
        return OutputFormat(self._parser if calls else None, self._options.reasoning_parser, functions)

    def for_template(self, body: ChatBody) -> list[dict[str, Any]] | None:
        """The tools that the prompt is to show, as they came."""
        hidden = body.tool_choice == "none" and self._options.exclude_tools_when_tool_choice_none
        return None if hidden or not body.tools else msgspec.to_builtins(body.tools)

    def _check_tool(self, tool: Tool, at: str, names_before: list[str]) -> None:
        if tool.function.name in names_before:
            raise invalid(f"{at}.name={tool.function.name!r} is there twice; each name may be once", f"{at}.name")
        if tool.function.strict:
            raise invalid(
                f"{at}.strict=true is not supported by this server yet; allowed: false",
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
        if isinstance(choice, NamedToolChoice) or choice == "required":
            given = "required" if choice == "required" else "a named function"
            raise invalid(
                f"tool_choice={given} is not supported by this server yet; allowed: none, auto",
                "tool_choice",
                "unsupported_parameter",
            )
        if self._options.enable_auto_tool_choice is False:
            raise invalid("tool_choice=auto is turned off on this server; allowed: none", "tool_choice")
        if self._parser is None:
            raise invalid(
                "tools cannot be used: the chat template writes calls in no known format; start the server with "
                "--tool-call-parser NAME",
                "tools",
            )
