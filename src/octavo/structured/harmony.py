"""Harmony, the format of gpt-oss: messages with a channel, and maybe a recipient, each.

<|channel|>analysis<|message|>…<|end|><|start|>assistant<|channel|>commentary to=functions.f <|constrain|>json
<|message|>{…}<|call|>, and in the end <|start|>assistant<|channel|>final<|message|>…<|return|>
"""

from __future__ import annotations

import re

from octavo.structured.events import ReasoningText
from octavo.structured.incremental import Markers, Script
from octavo.structured.tools.base import Functions, ToolParser

_START = "<|start|>"
_CHANNEL = "<|channel|>"
_MESSAGE = "<|message|>"
_ENDS = ("<|end|>", "<|call|>", "<|return|>")
_OUTSIDE = Markers(_START, _CHANNEL)
_HEADER_END = Markers(_MESSAGE, *_ENDS)
_BODY_END = Markers(*_ENDS, _START)
_OUTSIDE_OR_END = Markers(*_ENDS, _START, _CHANNEL)
_CHANNEL_NAME = re.compile(r"<\|channel\|>\s*(\w+)")
_RECIPIENT = re.compile(r"\bto=([\w.-]+)")
_RECIPIENT_AT_START = " to="  # where the prompt ends with the role


class HarmonyParser(ToolParser):
    """Both a reasoning and a tool parser: channel analysis is reasoning, a line break between its messages; a message
    to functions.NAME is a call, and what follows the JSON of its arguments is content, as the rest is. A call that is
    malformed is content, markup and all; without functions every call is."""

    def __init__(self, functions: Functions | None) -> None:
        super().__init__(functions or {})
        self._takes_calls = functions is not None
        self._has_reasoned = False
        self._break = ""  # stands before more reasoning

    def _parse(self) -> Script[None]:
        space = yield from self._spaces()
        opened = (yield from self._accept(_RECIPIENT_AT_START.strip())) if space else False
        if not opened:
            self._content(space)
            self._source.clear()
        while True:
            if not opened and not (yield from self._content_until(_OUTSIDE)):
                break
            opened = yield from self._message()
        self._all_is_read()

    def _message(self) -> Script[bool]:
        """One message, the beginning of its header read; whether the next one has begun with its end."""
        end = yield from self._until(_HEADER_END, _ignore)
        header = "".join(self._source)
        if end != _MESSAGE:
            self._degrade()
            return False
        recipient = _RECIPIENT.search(header)
        channel = _CHANNEL_NAME.search(header)
        if recipient is not None and recipient[1].startswith("functions.") and self._takes_calls:
            return (yield from self._call(recipient[1].removeprefix("functions.")))
        if recipient is not None:
            sink = _ignore  # kept in the source
        elif channel is not None and channel[1] == "analysis":
            self._break = "\n" if self._has_reasoned else ""
            sink = self._reasoning
        else:
            sink = self._content_and_forget
        end = yield from self._until(_BODY_END, sink)
        if sink is _ignore:
            self._degrade_before(end)
        self._source = [end] if end == _START else []
        return end == _START

    def _call(self, name: str) -> Script[bool]:
        """A call's message, its header read; whether the next one has begun with its end."""
        complete = yield from self._json_arguments(name)
        self._settle(complete)
        if not complete:
            return False
        yield from self._spaces()
        self._source.clear()
        end = yield from self._until(_OUTSIDE_OR_END, self._content_and_forget)
        self._source = [end] if end in (_START, _CHANNEL) else []
        return bool(self._source)

    def _degrade_before(self, end: str) -> None:
        """The message is content; its end is too, unless that begins the next."""
        if end == _START:
            self._source.pop()
        self._degrade()

    def _reasoning(self, text: str) -> None:
        self._source.clear()
        self._events.append(ReasoningText(self._break + text))
        self._has_reasoned = True
        self._break = ""


def _ignore(text: str) -> None:
    """The sink of what the source keeps."""
