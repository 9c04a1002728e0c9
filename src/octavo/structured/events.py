"""What the parsers of a model's output say, and the contract that all of them keep."""

from __future__ import annotations

from typing import Protocol

import msgspec


class ContentText(msgspec.Struct, frozen=True):
    """More of the answer."""

    text: str


class ReasoningText(msgspec.Struct, frozen=True):
    """More of the thoughts before it."""

    text: str


class ToolCallBegun(msgspec.Struct, frozen=True):
    """index: 0, 1, … in the order of the output."""

    index: int
    id: str
    name: str


class ArgumentsText(msgspec.Struct, frozen=True):
    """More of a call's arguments; all of them together are the JSON text of an object."""

    index: int
    text: str


class ToolCallBroken(msgspec.Struct, frozen=True):
    """A call that had begun is none. text: all that was read for it, which belongs to the content instead."""

    index: int
    text: str


Event = ContentText | ReasoningText | ToolCallBegun | ArgumentsText | ToolCallBroken


class OutputParser(Protocol):
    """Text of one output in, in pieces; events out. How the text is cut changes nothing in what the events amount to.

    No text raises: what is no call becomes content. `finish` comes once, after the last `feed`.
    """

    def feed(self, text: str) -> list[Event]:
        """What `text` adds, as far as it is certain."""
        ...

    def finish(self) -> list[Event]:
        """What was held back until the end."""
        ...


class ParsedCall(msgspec.Struct):
    """A whole call. arguments: JSON text."""

    id: str
    name: str
    arguments: str


class ParsedOutput(msgspec.Struct):
    """A whole output: what its events amount to. Broken calls are content, and not among the calls."""

    content: str
    reasoning: str
    calls: list[ParsedCall]


def settled(events: list[Event]) -> list[Event]:
    """All events of an output as if it had been known from the start which calls break off: these are content."""
    broken = {event.index for event in events if isinstance(event, ToolCallBroken)}
    found: list[Event] = []
    for event in events:
        if isinstance(event, ToolCallBroken):
            found.append(ContentText(event.text))
        elif not (isinstance(event, (ToolCallBegun, ArgumentsText)) and event.index in broken):
            found.append(event)
    return found


def collect(events: list[Event]) -> ParsedOutput:
    """The whole that the events are parts of."""
    content: list[str] = []
    reasoning: list[str] = []
    begun: dict[int, ToolCallBegun] = {}
    arguments: dict[int, list[str]] = {}
    for event in settled(events):
        match event:
            case ContentText(text):
                content.append(text)
            case ReasoningText(text):
                reasoning.append(text)
            case ToolCallBegun(index):
                begun[index], arguments[index] = event, []
            case ArgumentsText(index, text):
                arguments[index].append(text)
    calls = [ParsedCall(call.id, call.name, "".join(arguments[index])) for index, call in begun.items()]
    return ParsedOutput("".join(content), "".join(reasoning), calls)
