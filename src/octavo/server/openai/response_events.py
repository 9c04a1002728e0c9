"""The items of a response's output, and the events that stream them."""

from __future__ import annotations

import time
from typing import Any, Protocol

import msgspec

from octavo.server.openai.blocks import Block, Blocks, Change
from octavo.server.openai.errors import APIError
from octavo.server.openai.response_schema import (
    FunctionCallItem,
    OutputItem,
    OutputMessage,
    OutputText,
    ReasoningItem,
    ReasoningPart,
    Response,
    ResponseError,
    ResponseRequest,
    Status,
)
from octavo.server.openai.runner import Choice, Run
from octavo.server.openai.sse import Frames
from octavo.text.generation import Delta

_PREFIXES = {"text": "msg", "reasoning": "rs", "call": "fc"}
_DELTAS = {"text": "output_text", "reasoning": "reasoning_text", "call": "function_call_arguments"}
_LOGPROBS: dict[str, Any] = {"logprobs": []}


class Answers(Protocol):
    """What the events need of the endpoint."""

    def blocks(self, body: ResponseRequest, run: Run) -> Blocks: ...

    def response(self, body: ResponseRequest, run: Run, created: int, status: Status, **rest: Any) -> Response: ...

    def finished(self, body: ResponseRequest, run: Run, created: int, blocks: Blocks) -> Response: ...


def item_of(body: ResponseRequest, block: Block, status: Status) -> OutputItem:
    """The item that a block is; what is in progress has no content."""
    item_id = f"{_PREFIXES[block.kind]}{body.response_id.removeprefix('resp')}_{block.index}"
    shown = status != "in_progress"
    if block.kind == "call":
        return FunctionCallItem(item_id, block.call_id, block.name, block.text if shown else "", status)
    if block.kind == "reasoning":
        return ReasoningItem(item_id, [ReasoningPart(block.text)] if shown else [], status)
    return OutputMessage(item_id, status, [OutputText(block.text)] if shown else [])


def status_of(block: Block, blocks: Blocks, cut: bool) -> Status:
    """Of a block that is closed. cut: the output ended at its limit."""
    return "incomplete" if block.broken or (cut and block is blocks.row[-1]) else "completed"


class ResponseFrames(Frames):
    """The events of one streamed response, numbered from 0. Its stream ends with its last event."""

    done = b""

    def __init__(self, answers: Answers, body: ResponseRequest, run: Run) -> None:
        self._answers = answers
        self._body = body
        self._run = run
        self._created = int(time.time())
        self._blocks = answers.blocks(body, run)
        self._number = 0  # of the next event
        self._place: dict[str, Any] = {}  # of the open block's events
        self._delta_head = b""  # of the same, up to the sequence number

    def frame(self, choice: Choice, delta: Delta) -> bytes:  # noqa: ARG002 (there is one choice)
        """See Frames.frame."""
        events = b"" if self._number else self._opening()
        changes = self._blocks.push(delta)
        cut = delta.finish_reason == "length"
        return events + b"".join([self._changed(change, cut) for change in changes])

    def last(self) -> bytes:
        """See Frames.last."""
        response = self._answers.finished(self._body, self._run, self._created, self._blocks)
        return self._event(f"response.{response.status}", response=response)

    def failed(self, error: APIError) -> bytes:
        """See Frames.failed."""
        failure = ResponseError("server_error", error.message)
        response = self._answers.response(self._body, self._run, self._created, "failed", error=failure)
        return self._event("response.failed", response=response)

    def _opening(self) -> bytes:
        response = self._answers.response(self._body, self._run, self._created, "in_progress")
        return self._event("response.created", response=response) + self._event(
            "response.in_progress", response=response
        )

    def _changed(self, change: Change, cut: bool) -> bytes:
        if change.what == "grew":
            event = self._delta_head % (self._number, msgspec.json.encode(change.text))
            self._number += 1
            return event
        if change.what == "opened":
            return self._opened(change.block)
        return self._closed(change.block, status_of(change.block, self._blocks, cut))

    def _opened(self, block: Block) -> bytes:
        item = item_of(self._body, block, "in_progress")
        self._place = {"item_id": item.id, "output_index": block.index}
        added = self._event("response.output_item.added", output_index=block.index, item=item)
        if block.kind != "call":
            self._place["content_index"] = 0
            added += self._event("response.content_part.added", **self._place, part=_part(block, ""))
        kind = f"response.{_DELTAS[block.kind]}.delta"
        fields = _LOGPROBS if block.kind == "text" else {}
        head = msgspec.json.encode({"type": kind, **self._place, **fields})[:-1].replace(b"%", b"%%")
        self._delta_head = b"event: %b\ndata: %b" % (kind.encode(), head) + b',"sequence_number":%d,"delta":%b}\n\n'
        return added

    def _closed(self, block: Block, status: Status) -> bytes:
        kind = f"response.{_DELTAS[block.kind]}.done"
        if block.kind == "call":
            done = self._event(kind, **self._place, name=block.name, arguments=block.text)
        else:
            fields = _LOGPROBS if block.kind == "text" else {}
            done = self._event(kind, **self._place, text=block.text, **fields)
            done += self._event("response.content_part.done", **self._place, part=_part(block, block.text))
        item = item_of(self._body, block, status)
        return done + self._event("response.output_item.done", output_index=block.index, item=item)

    def _event(self, kind: str, **fields: Any) -> bytes:
        data = msgspec.json.encode({"type": kind, "sequence_number": self._number, **fields})
        self._number += 1
        return b"event: %b\ndata: %b\n\n" % (kind.encode(), data)


def _part(block: Block, text: str) -> OutputText | ReasoningPart:
    return ReasoningPart(text) if block.kind == "reasoning" else OutputText(text)
