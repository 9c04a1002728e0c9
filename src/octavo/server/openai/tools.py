"""Tools and reasoning of chats: what a request may ask for, and how its outputs are parsed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec

from octavo.config import ServerOptions
from octavo.protocol.reasoning import ReasoningMarks
from octavo.protocol.sampling import SamplingParams
from octavo.protocol.structured import StructuredOutputsParams
from octavo.server.openai.errors import invalid
from octavo.server.openai.schema import ChatBody, NamedToolChoice
from octavo.server.openai.structured import Wish, wish_of
from octavo.structured.chat_output import after_reasoning, output_parser
from octavo.structured.events import OutputParser
from octavo.structured.reasoning.registry import SPECIAL_MARKS, check_budget, reasoning_marks
from octavo.structured.tools.base import Functions
from octavo.structured.tools.constrained import NamedCallParser, RequiredCallsParser
from octavo.structured.tools.registry import detect_tool_parser
from octavo.structured.tools.schema import named_call_schema, required_calls_schema
from octavo.structured.tools.strict import strict_calls_tag
from octavo.text.chat_template import ChatTemplate
from octavo.text.described_tools import PARSER as DESCRIBED_PARSER


@dataclass(frozen=True)
class OutputFormat:
    """How the outputs of one request are to be parsed. functions: those that may be called.

    constrained: after its reasoning, the output is held to a schema, so that it is calls and nothing else; of `named`
    alone, where that is given. strict: it may be anything, but calls in it are held to their schemas. begun: the text
    of the message that the output continues, if any.
    """

    tool_parser: str | None
    reasoning_parser: str | None
    functions: Functions
    constrained: bool = False
    named: str | None = None
    strict: bool = False
    begun: str | None = None

    @property
    def needs_special_tokens(self) -> bool:
        """Whether the marks to look for may be special tokens, so that the text must show these."""
        return self.reasoning_parser in SPECIAL_MARKS or (self.tool_parser is not None and not self.constrained)

    def parser(self, prompt: str) -> OutputParser | None:
        """A new one, for one output that follows `prompt`; None where the text is the content."""
        if self.named is not None:
            return after_reasoning(
                self.reasoning_parser, NamedCallParser(self.functions, self.named), prompt, self.begun
            )
        if self.constrained:
            return after_reasoning(self.reasoning_parser, RequiredCallsParser(self.functions), prompt, self.begun)
        return output_parser(self.tool_parser, self.reasoning_parser, self.functions, prompt, self.strict, self.begun)


class ToolCalling:
    """What the server's options and the model's chat template allow."""

    def __init__(self, options: ServerOptions, template: ChatTemplate | None) -> None:
        """Raises ValueError where tool calls are asked for and cannot be read."""
        self._options = options
        self.describes_tools = template is not None and not template.shows_tools
        self._parser: str | None = options.tool_call_parser
        if self.describes_tools:
            if self._parser not in (None, DESCRIBED_PARSER):
                raise ValueError(
                    f"tool_call_parser={self._parser!r} needs a chat_template that shows tools to the model; with this "
                    f"one allowed: {DESCRIBED_PARSER}"
                )
            self._parser = DESCRIBED_PARSER
        elif self._parser is None and template is not None:
            self._parser = detect_tool_parser(template.source)
        if options.enable_auto_tool_choice and template is None:
            raise ValueError("enable_auto_tool_choice=True needs a chat_template, and there is none")
        if options.enable_auto_tool_choice and self._parser is None:
            raise ValueError(
                "enable_auto_tool_choice=True needs a tool_call_parser: the chat template writes calls in no known "
                "format"
            )

    def check(self, body: ChatBody) -> None:
        """Refuse what cannot be done. Raises APIError 400."""
        tools = body.tools or []
        names = [tool.function.name for tool in tools]
        for index, name in enumerate(names):
            if name in names[:index]:
                at = f"tools[{index}].function.name"
                raise invalid(f"{at}={name!r} is there twice; each name may be once", at)
        self._check_choice(body, names)
        if body.include_reasoning is False and self._options.reasoning_parser is None:
            raise invalid(
                "include_reasoning=false needs a server that tells reasoning from content: start it with "
                "--reasoning-parser NAME",
                "include_reasoning",
            )
        if body.thinking_token_budget not in (None, -1):
            try:
                check_budget(self._options.reasoning_parser)
            except ValueError as error:
                raise invalid(f"{error} (--reasoning-parser NAME)", "thinking_token_budget") from None

    def marks(self, body: ChatBody, prompt: str, params: SamplingParams) -> ReasoningMarks | None:
        """The marks that outputs after `prompt`, made of the body, are to be watched for; None where these decide
        nothing."""
        parser = self._options.reasoning_parser
        if parser is None or (params.structured_outputs is None and params.thinking_token_budget is None):
            return None
        return reasoning_marks(parser, prompt, _begun(body))

    def format(self, body: ChatBody) -> OutputFormat:
        """For a body that has been checked."""
        calls = bool(body.tools) and body.tool_choice != "none"
        return OutputFormat(
            self._parser if calls else None,
            self._options.reasoning_parser,
            _functions(body),
            constrained=calls and _is_constrained(body),
            named=body.tool_choice.function.name if isinstance(body.tool_choice, NamedToolChoice) else None,
            strict=_first_strict(body) is not None,
            begun=_begun(body),
        )

    def wish(self, body: ChatBody) -> Wish | None:
        """The constraint on the output: that of its calls where they are required or strict, else the body's own.

        For a body that has been checked. Raises APIError 400 for both at once, and for a schema that cannot be.
        """
        own = wish_of(body)
        strict = _first_strict(body)
        if strict is None and not _is_constrained(body):
            return own
        path = "tool_choice" if strict is None else f"tools[{strict}].function.strict"
        if own is not None:
            raise invalid(f"{path} and {own.path} exclude each other: a request has one constraint", own.path)
        functions = _functions(body)
        try:
            if strict is not None:
                assert self._parser is not None
                names = {tool.function.name for tool in body.tools or () if tool.function.strict}
                tag = strict_calls_tag(self._parser, functions, names)
                return Wish(StructuredOutputsParams(structural_tag=tag), "tools")
            if isinstance(body.tool_choice, NamedToolChoice):
                schema = named_call_schema(functions, body.tool_choice.function.name)
            else:
                schema = required_calls_schema(functions, body.parallel_tool_calls is not False)
            return Wish(StructuredOutputsParams(json=schema), "tools")
        except ValueError as error:
            if strict is not None:
                raise invalid(f"{path}=true: {error}; allowed besides: false", path) from None
            raise invalid(str(error), "tools") from None

    def for_template(self, body: ChatBody) -> list[dict[str, Any]] | None:
        """The tools that the prompt is to show, as they came."""
        hidden = body.tool_choice == "none" and self._options.exclude_tools_when_tool_choice_none
        return None if hidden or not body.tools else msgspec.to_builtins(body.tools)

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


def _first_strict(body: ChatBody) -> int | None:
    """The first tool whose calls, where the model chooses to make them, are to follow its schema."""
    if _is_constrained(body) or body.tool_choice == "none":
        return None
    return next((index for index, tool in enumerate(body.tools or ()) if tool.function.strict), None)


def _functions(body: ChatBody) -> Functions:
    return {tool.function.name: tool.function.parameters for tool in body.tools or ()}


def _begun(body: ChatBody) -> str | None:
    """The text of the message that the output continues."""
    if not body.continue_final_message:
        return None
    content = body.messages[-1].content
    return content if content is None or isinstance(content, str) else "".join(part.text for part in content)
