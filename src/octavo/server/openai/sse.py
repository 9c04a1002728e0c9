"""Server-sent events, and the answer that carries them.

A token's way is a chain of plain calls within one turn of the loop: the engine client's sink, the run, the frame's
bytes, one write on the socket. The request's task sleeps from the first frame to the last.
"""

from __future__ import annotations

import asyncio
import logging
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from typing import ClassVar

import msgspec
from starlette.types import Receive, Scope, Send

from octavo.server.lifecycle import Lifecycle
from octavo.server.limits import ClientGone
from octavo.server.openai.errors import APIError, internal
from octavo.server.openai.runner import Choice, Run
from octavo.server.transport import StreamWriter, stream_writer
from octavo.text.generation import Delta

logger = logging.getLogger("octavo.server")

DONE = b"data: [DONE]\n\n"
_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


class EventEncoder:
    """One frame a chunk: everything but the choices is the same in all of them and encoded once."""

    def __init__(self, head: dict[str, object]) -> None:
        self._head = b"data: " + msgspec.json.encode(head)[:-1] + b',"choices":['
        self._encode = msgspec.json.Encoder().encode

    def chunk(
        self,
        choice: msgspec.Struct | None,
        usage: msgspec.Struct | None = None,
        prompt_token_ids: list[int] | None = None,
    ) -> bytes:
        """The frame for one choice, or for none, with a usage and the prompt's token ids where they are given."""
        body = b"" if choice is None else self._encode(choice)
        said = b"" if usage is None else b',"usage":' + self._encode(usage)
        if prompt_token_ids is not None:
            said += b',"prompt_token_ids":' + self._encode(prompt_token_ids)
        return b"%b%b]%b}\n\n" % (self._head, body, said)

    def text_chunk(self, before: bytes, text: str, after: bytes) -> bytes:
        """`chunk` for a choice whose JSON is known but for one string: what stands before it, and after it."""
        return b"%b%b%b%b]}\n\n" % (self._head, before, self._encode(text), after)


class Frames(ABC):
    """How one request's deltas look on the wire. A dialect other than that of chats has another `done` and `failed`."""

    done: ClassVar[bytes] = DONE  # the end of every stream

    @abstractmethod
    def frame(self, choice: Choice, delta: Delta) -> bytes:
        """The frames for one delta; empty where there is nothing to say yet: all its text is held back."""

    @abstractmethod
    def last(self) -> bytes:
        """What follows all deltas, before `done`."""

    def failed(self, error: APIError) -> bytes:
        """What stands in place of the rest, before `done`, once something was sent."""
        return b"data: " + error.body() + b"\n\n"


class _Pipe:
    """Frames from where they are made to the socket. Until `open`, they wait.

    Those of several choices that come in one turn of the loop are one write.
    """

    def __init__(self, frames: Frames, num_choices: int) -> None:
        self._loop = asyncio.get_running_loop()
        self._frame = frames.frame
        self._gathers = num_choices > 1
        self._waiting: list[bytes] = []
        self._writer: StreamWriter | None = None
        self.first: asyncio.Future[None] = self._loop.create_future()  # done when there is something to send

    def consume(self, choice: Choice, delta: Delta) -> None:
        """The Run's consumer."""
        frame = self._frame(choice, delta)
        if not frame:
            return
        if self._writer is not None and not self._gathers:
            self._writer.write(frame)
            return
        self._waiting.append(frame)
        if self._writer is None:
            self.wake()
        elif len(self._waiting) == 1:
            self._loop.call_soon(self.flush)

    def wake(self, _: object = None) -> None:
        if not self.first.done():
            self.first.set_result(None)

    def take(self) -> bytes:
        """All that waits."""
        waiting, self._waiting = self._waiting, []
        return b"".join(waiting)

    def open(self, writer: StreamWriter) -> None:
        """From here on, frames are written as they come."""
        self._writer = writer
        self.flush()

    def flush(self) -> None:
        if self._waiting and self._writer is not None:
            self._writer.write(self.take())


async def send_events(
    lifecycle: Lifecycle,
    prepare: Callable[[], Awaitable[tuple[Run, Frames]]],
    scope: Scope,
    receive: Receive,
    send: Send,
) -> None:
    """Stream what the run of `prepare` brings, then the end that its frames have.

    The status line waits for the first frame, so that what goes wrong before it is a plain error:
    raises APIError (then nothing was sent) and ClientGone. Later errors become an error frame.
    """
    started: Frames | None = None

    async def pump() -> bytes:
        nonlocal started
        run, frames = await prepare()
        pipe = _Pipe(frames, len(run.choices))
        run.end.add_done_callback(pipe.wake)
        try:
            run.start(pipe.consume)
            await pipe.first
            opening = pipe.take()
            if opening:
                started = frames
                await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
                await send({"type": "http.response.body", "body": opening, "more_body": True})
                writer = stream_writer(scope)
                pipe.open(writer)
                try:
                    await run.ended()
                finally:
                    pipe.flush()
                    await writer.drain()
            else:
                await run.ended()
            return frames.last() + frames.done
        finally:
            run.close()

    try:
        end = await lifecycle.run(receive, pump())
    except APIError as error:
        if started is None:
            raise
        end = started.failed(error) + started.done
    except ClientGone:
        raise
    except Exception:
        if started is None:
            raise
        logger.exception("a stream failed")
        end = started.failed(internal("internal server error")) + started.done
    await send({"type": "http.response.body", "body": end, "more_body": False})
