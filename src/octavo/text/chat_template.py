"""Chat templates: a conversation to the one text that a model was trained to continue (Jinja, as in Hugging Face)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

from octavo.text.described_tools import with_described_tools
from octavo.text.tokenizer import Tokenizer

MAX_RENDERED_CHARACTERS = 2**24

_PROBE = "\ue0f2"  # shows whether a message comes through the template
# Stands at the end of the last message to find where it ends in the rendered text. Its trailing space shows
# whether the template trims messages.
_END_MARK = "\ue0f1OCTAVO_END_OF_FINAL_MESSAGE\ue0f1 "

Message = Mapping[str, Any]
ContentFormat = Literal["auto", "string", "openai"]

# Variables of templates that callers may not set by name: arguments of `render` do, or the renderer itself has them.
RESERVED_VARIABLES = frozenset(
    {
        *("self", "conversation", "messages", "tools", "documents", "tokenize", "chat_template"),
        *("add_generation_prompt", "continue_final_message", "bos_token", "eos_token"),
    }
)


def load_chat_template(path: Path | str) -> str:
    """The source of a template file. Raises FileNotFoundError or ValueError naming the file."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no chat template at {path}")
    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"the chat template {path} is not UTF-8 text: {error}") from error


class ChatTemplate:
    """A compiled template. Rendering is safe from several threads at once.

    source: its text. shows_tools: whether it does anything with the tools of a request; where it does not, they are
    described in words (`described_tools`).
    """

    def __init__(
        self,
        source: str,
        bos_token: str | None = None,
        eos_token: str | None = None,
        content_format: ContentFormat = "auto",
    ) -> None:
        """content_format: how the template takes contents: "string", "openai" for lists of parts, or "auto" for what
        its source shows. Raises ValueError for another one, and with the line of a syntax error."""
        if content_format not in get_args(ContentFormat):
            allowed = ", ".join(get_args(ContentFormat))
            raise ValueError(f"chat_template_content_format={content_format!r} is unknown; allowed: {allowed}")
        tokens = {"bos_token": bos_token, "eos_token": eos_token}
        self._tokens = {name: token for name, token in tokens.items() if token is not None}
        environment = _environment()
        try:
            tree = environment.parse(source)
            self._template = environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise ValueError(f"the chat template has an error in line {error.lineno}: {error.message}") from error
        detected = _loops_over_content(tree)
        self._takes_parts = detected if content_format == "auto" else content_format == "openai"
        self._takes_none = any(t.name == "none" and _is_content(t.node, {"content"}) for t in tree.find_all(nodes.Test))
        self._takes_argument_text = _adds_to_arguments(tree)
        self.source = source
        self.shows_tools = any(name.name == "tools" for name in tree.find_all(nodes.Name))
        tests_for_strings = any(t.name == "string" for t in tree.find_all(nodes.Test))
        self._takes_strings = not self._takes_parts or (content_format == "auto" and tests_for_strings)
        self._shows_calls = _names_tool_calls(tree)

    @classmethod
    def of(
        cls, tokenizer: Tokenizer, source: str | None = None, content_format: ContentFormat = "auto"
    ) -> ChatTemplate:
        """The tokenizer's own template, or `source` in its place. Raises ValueError when there is neither."""
        source = source if source is not None else tokenizer.chat_template
        if source is None:
            raise ValueError("the model has no chat template; give one with --chat-template FILE")
        return cls(source, tokenizer.bos_token, tokenizer.eos_token, content_format)

    def render(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **kwargs: Any,
    ) -> str:
        """The prompt's text; encode it without special tokens, it carries its own.

        messages: as in the OpenAI API, text parts only; contents are joined by newlines for a template that takes
        strings. continue_final_message: end with the last message's text, open for more.
        kwargs: further variables of the template. Raises ValueError in the template's words where it refuses,
        and for messages of the wrong form or a text longer than MAX_RENDERED_CHARACTERS.
        """
        if not self.shows_tools and (tools or not self._shows_calls):
            messages = [_object(message) for message in messages]
            messages = with_described_tools(messages, tools, takes_system=bool(tools) and self._takes_system)
        conversation = [self._message(message) for message in messages]
        if not conversation:
            raise ValueError("messages is empty")
        if continue_final_message:
            if add_generation_prompt:
                raise ValueError("continue_final_message and add_generation_prompt exclude each other")
            _mark_end(conversation[-1])
        variables = {"documents": None, **self._tokens, **kwargs, "messages": conversation, "tools": tools}
        text = self._run({**variables, "add_generation_prompt": add_generation_prompt})
        return _cut_at_mark(text) if continue_final_message else text

    @cached_property
    def _takes_system(self) -> bool:
        """Whether the template takes a system message, and leaves nothing of it out."""
        roles = ("system", "user")
        try:
            text = self.render([{"role": role, "content": _PROBE + role} for role in roles])
        except ValueError:
            return False
        return all(_PROBE + role in text for role in roles)

    def _run(self, variables: dict[str, Any]) -> str:
        pieces, size = [], 0
        try:
            for piece in self._template.generate(variables):
                size += len(piece)
                if size > MAX_RENDERED_CHARACTERS:
                    raise ValueError(f"the text is longer than {MAX_RENDERED_CHARACTERS} characters")
                pieces.append(piece)
        except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError, RecursionError) as error:
            raise ValueError(f"chat template: {error}") from error
        return "".join(pieces)

    def _message(self, message: Message) -> dict[str, Any]:
        result = dict(_object(message))
        if "content" in message and not (message["content"] is None and self._takes_none):
            result["content"] = self._content(message["content"])
        if message.get("tool_calls") and not self._takes_argument_text:
            result["tool_calls"] = [_with_parsed_arguments(call) for call in message["tool_calls"]]
        return result

    def _content(self, content: object) -> str | list[dict[str, Any]]:
        if isinstance(content, str):
            return content if self._takes_strings else [{"type": "text", "text": content}]
        if content is not None and not isinstance(content, list):
            raise ValueError("a message's content is neither a string nor a list of parts")
        parts = [{"type": "text", "text": _part_text(part)} for part in content or ()]
        return parts if self._takes_parts else "\n".join(part["text"] for part in parts)


def _object(message: Any) -> Message:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise ValueError(f"a message is not an object with a role: {str(message)[:100]!r}")
    return message


def _part_text(part: object) -> str:
    if isinstance(part, str):
        return part
    kind, text = (part.get("type"), part.get("text")) if isinstance(part, Mapping) else (None, None)
    if kind != "text" or not isinstance(text, str):
        raise ValueError(f"a content part of type {kind!r} is not supported; supported: 'text'")
    return text


def _with_parsed_arguments(call: Any) -> Any:
    """Templates take a function's arguments as an object; the OpenAI API has them as JSON text."""
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"] or "{}")
    except ValueError as error:
        raise ValueError(f"the arguments of a tool call are not JSON: {error}") from error
    return {**call, "function": {**function, "arguments": arguments}}


def _mark_end(message: dict[str, Any]) -> None:
    content = message.get("content")
    if isinstance(content, list) and content:
        content[-1]["text"] += _END_MARK
    elif isinstance(content, str):
        message["content"] = content + _END_MARK
    else:
        raise ValueError("continue_final_message: the last message has no text to continue")


def _cut_at_mark(text: str) -> str:
    at = text.rfind(_END_MARK.rstrip())
    if at < 0:
        raise ValueError("continue_final_message: the chat template leaves out the last message's text")
    return text[:at] if text.startswith(_END_MARK, at) else text[:at].rstrip()


class _Generation(Extension):
    """`{% generation %}` marks assistant text for training; for a prompt it means nothing."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it so)

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)


def _environment() -> ImmutableSandboxedEnvironment:
    """The dialect of chat templates (Hugging Face transformers, "Chat templates"): whitespace control, `break`,
    plain tojson, raise_exception, strftime_now. The sandbox keeps templates from attributes that start with an
    underscore, from changing their input, and from a range longer than 100,000."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _loops_over_content(tree: nodes.Template) -> bool:
    """Whether the template goes through a message's content part by part: it has a loop over `<x>.content`, or over
    a variable set from one or a macro's parameter of that name."""
    names = {"content"} & {name.name for macro in tree.find_all(nodes.Macro) for name in macro.args}
    for assign in tree.find_all(nodes.Assign):
        if isinstance(assign.target, nodes.Name) and _is_content(assign.node, names):
            names.add(assign.target.name)
    return any(_is_content(loop.iter, names) for loop in tree.find_all(nodes.For))


def _names_tool_calls(tree: nodes.Template) -> bool:
    """Whether the template looks at the calls of a message."""
    constants = (constant.value for constant in tree.find_all(nodes.Const))
    return any(a.attr == "tool_calls" for a in tree.find_all(nodes.Getattr)) or "tool_calls" in constants


def _adds_to_arguments(tree: nodes.Template) -> bool:
    """Whether the template joins a call's arguments to other text as they are, so that they must be text."""
    operands = [operand for add in tree.find_all(nodes.Add) for operand in (add.left, add.right)]
    operands += [operand for concat in tree.find_all(nodes.Concat) for operand in concat.nodes]
    for operand in operands:
        key = operand.attr if isinstance(operand, nodes.Getattr) else None
        if isinstance(operand, nodes.Getitem) and isinstance(operand.arg, nodes.Const):
            key = operand.arg.value
        if key == "arguments":
            return True
    return False


def _is_content(node: nodes.Node | None, names: set[str]) -> bool:
    """Whether an expression is a message's content, maybe through filters and slices."""
    if isinstance(node, nodes.Filter):
        return _is_content(node.node, names)
    if isinstance(node, nodes.Getattr):
        return node.attr == "content"
    if isinstance(node, nodes.Getitem):
        if isinstance(node.arg, nodes.Slice):
            return _is_content(node.node, names)
        return isinstance(node.arg, nodes.Const) and node.arg.value == "content"
    return isinstance(node, nodes.Name) and node.name in names
