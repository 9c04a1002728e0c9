"""An output as a row of blocks, reasoning, text and calls, for the dialects whose answers are such rows."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from octavo.server.openai.schema import ChatBody, FunctionCall, Message, ToolCall
from octavo.structured.events import (
    ArgumentsText,
    ContentText,
    Event,
    OutputParser,
    ReasoningText,
    ToolCallBegun,
    ToolCallBroken,
    settled,
)
from octavo.text.generation import Delta

Kind = Literal["text", "reasoning", "call"]


@dataclass(slots=True)
class Block:
    """index: its place in the row. call_id, name: of a call. broken: what began as a call and is none; its text is
    said again, as text, in what follows."""

    index: int
    kind: Kind
    call_id: str = ""
    name: str = ""
    broken: bool = False
    pieces: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        """The text, or a call's arguments as JSON text."""
        return "".join(self.pieces)


@dataclass(frozen=True, slots=True)
class Change:
    """What happened to a block: it was opened, grew by `text`, or was closed."""

    what: Literal["opened", "grew", "closed"]
    block: Block
    text: str = ""


class Blocks:
    """The blocks of one output; at most the last is open. `push` and `read` are the writers: one of them is used."""

    def __init__(self, parser: OutputParser | None, body: ChatBody) -> None:
        """parser: None where all the output is text."""
        self._parser = parser
        self._one_call = body.parallel_tool_calls is False
        self._shows_reasoning = body.include_reasoning is not False
        self._call_index: int | None = None  # the parser's index of the call that is open
        self._is_open = False
        self._changes: list[Change] = []
        self.row: list[Block] = []

    def push(self, delta: Delta) -> list[Change]:
        """What one more delta changes. The last one closes the row, which then has at least one block."""
        events = self._events(delta.text, delta.finish_reason is not None)
        return self._take(events, delta.finish_reason is not None)

    def read(self, text: str) -> None:
        """A whole output at once. Calls that broke off are text and nothing else."""
        self._take(settled(self._events(text, True)), True)

    @property
    def calls(self) -> list[Block]:
        """The whole calls."""
        return [block for block in self.row if block.kind == "call" and not block.broken]

    def joined(self, kind: Kind) -> str:
        """All text of one kind; a line break between blocks of reasoning."""
        return ("\n" if kind == "reasoning" else "").join(block.text for block in self.row if block.kind == kind)

    def as_message(self) -> Message:
        """The row as the message of a chat."""
        calls = [ToolCall(call.call_id, FunctionCall(call.name, call.text)) for call in self.calls]
        text = self.joined("text")
        return Message(
            "assistant",
            text if text or not calls else None,
            tool_calls=calls or None,
            reasoning=self.joined("reasoning") or None,
        )

    def _events(self, text: str, ends: bool) -> list[Event]:
        if self._parser is None:
            return [ContentText(text)] if text else []
        events = self._parser.feed(text)
        return events + self._parser.finish() if ends else events

    def _take(self, events: list[Event], ends: bool) -> list[Change]:
        self._changes = []
        for event in events:
            match event:
                case ContentText(text):
                    self._grow("text", text)
                case ReasoningText(text):
                    if self._shows_reasoning:
                        self._grow("reasoning", text)
                case ToolCallBegun(index, call_id, name):
                    if not (self._one_call and self.calls):
                        self._open(Block(len(self.row), "call", call_id, name))
                        self._call_index = index
                case ArgumentsText(index, text):
                    if index == self._call_index:
                        self._add(text)
                case ToolCallBroken(index, text):
                    if index == self._call_index:
                        self.row[-1].broken = True
                    self._grow("text", text)
        if ends:
            if not self.row:
                self._open(Block(0, "text"))
            self._close()
        return self._changes

    def _grow(self, kind: Kind, text: str) -> None:
        if not self._is_open or self.row[-1].kind != kind:
            if kind == "reasoning" and any(block.kind == kind for block in self.row):
                text = text.removeprefix("\n")  # what stands between it and the one before
            self._open(Block(len(self.row), kind))
        self._add(text)

    def _open(self, block: Block) -> None:
        self._close()
        self.row.append(block)
        self._is_open = True
        self._changes.append(Change("opened", block))

    def _add(self, text: str) -> None:
        self.row[-1].pieces.append(text)
        self._changes.append(Change("grew", self.row[-1], text))

    def _close(self) -> None:
        if self._is_open:
            self._is_open = False
            self._call_index = None
            self._changes.append(Change("closed", self.row[-1]))
