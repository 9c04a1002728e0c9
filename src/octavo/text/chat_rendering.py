"""What `LLM.chat` takes besides conversations and sampling: how they become prompts."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

from octavo.text.chat_template import RESERVED_VARIABLES, ChatTemplate, ContentFormat, Message
from octavo.text.prompts import ReadPrompt
from octavo.text.tokenizer import Tokenizer


class ChatRendering(TypedDict, total=False):
    """mm_processor_kwargs: None only: there are no inputs other than text.
    chat_template: the Jinja source of a template to use in place of the model's own.
    chat_template_content_format: how it takes contents: "string", "openai" for lists of parts, or "auto", the default,
    for what its source shows.
    add_generation_prompt: open the assistant's turn (default True). continue_final_message: leave the last message
    open instead (default False). Only one of them may be true.
    tools: as in the OpenAI API, shown by the template; one that shows none gets them described in a system message, in
    the convention of Hermes 2 Pro.
    chat_template_kwargs: further variables of the template, apart from those that the other fields set.
    """

    mm_processor_kwargs: None
    chat_template: str | None
    chat_template_content_format: ContentFormat
    add_generation_prompt: bool
    continue_final_message: bool
    tools: Sequence[Mapping[str, Any]] | None
    chat_template_kwargs: Mapping[str, Any] | None


def rendered_chats(
    tokenizer: Tokenizer, conversations: Sequence[Sequence[Message]], rendering: ChatRendering
) -> list[ReadPrompt]:
    """The prompt of each conversation. Raises TypeError for a field that is not known, ValueError for one that cannot
    be, for a template that refuses a conversation, or where there is no template."""
    known = ChatRendering.__annotations__
    for name in rendering:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            raise TypeError(f"chat() has no argument {name!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
    if (given := rendering.get("mm_processor_kwargs")) is not None:
        raise ValueError(f"mm_processor_kwargs={given!r} is not supported; allowed: None")
    variables = rendering.get("chat_template_kwargs") or {}
    for name in variables:
        if name in RESERVED_VARIABLES:
            raise ValueError(f"chat_template_kwargs has {name!r}, which is set by other arguments of chat()")
    tools = rendering.get("tools")
    _check_tools(tools)
    content_format = rendering.get("chat_template_content_format", "auto")
    template = ChatTemplate.of(tokenizer, rendering.get("chat_template"), content_format)
    continues = rendering.get("continue_final_message", False)
    prompts = []
    for conversation in conversations:
        text = template.render(
            list(conversation),
            add_generation_prompt=rendering.get("add_generation_prompt", True),
            continue_final_message=continues,
            tools=tools or None,
            **variables,
        )
        begun = _text_of(conversation[-1]) if continues else None
        prompts.append(ReadPrompt(text, tokenizer.encode(text, add_special_tokens=False), begun=begun))
    return prompts


def _text_of(message: Message) -> str:
    content = message.get("content") or ""
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


def _check_tools(tools: object) -> None:
    """Raises ValueError for what is not None or a list of functions as in the OpenAI API, of different names."""
    if tools is None:
        return
    if not isinstance(tools, (list, tuple)):
        raise ValueError(f"tools={str(tools)[:100]} is not a list")
    names = set()
    for index, tool in enumerate(tools):
        function = tool.get("function") if isinstance(tool, Mapping) and tool.get("type") == "function" else None
        name = function.get("name") if isinstance(function, Mapping) else None
        if not isinstance(name, str):
            raise ValueError(f'tools[{index}] is not {{"type": "function", "function": {{"name": …}}}}')
        if name in names:
            raise ValueError(f"tools[{index}].function.name={name!r} is there twice; each name may be once")
        names.add(name)
