"""Server-sent events, and the answer that carries them."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncGenerator

import msgspec
from starlette.types import Receive, Send

from octavo.server.lifecycle import Lifecycle
from octavo.server.limits import ClientGone
from octavo.server.openai.errors import APIError, internal

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

    def chunk(self, choice: msgspec.Struct | None, usage: msgspec.Struct | None = None) -> bytes:
        """The frame for one choice, or for none, with a usage where one is given."""
        body = b"" if choice is None else self._encode(choice)
        tail = b"]}\n\n" if usage is None else b'],"usage":' + self._encode(usage) + b"}\n\n"
        return self._head + body + tail


async def send_events(lifecycle: Lifecycle, events: AsyncGenerator[bytes], receive: Receive, send: Send) -> None:
    """Stream `events`, one write each, then [DONE].

    The status line waits for the first event, so that what goes wrong before it is a plain error:
    raises APIError (then nothing was sent) and ClientGone. Later errors become an error frame.
    """
    started = False

    async def pump() -> None:
        nonlocal started
        async with contextlib.aclosing(events):
            async for event in events:
                if not started:
                    started = True
                    await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
                await send({"type": "http.response.body", "body": event, "more_body": True})

    end = DONE
    try:
        await lifecycle.run(receive, pump())
    except APIError as error:
        if not started:
            raise
        end = _frame(error)
    except ClientGone:
        raise
    except Exception:
        if not started:
            raise
        logger.exception("a stream failed")
        end = _frame(internal("internal server error"))
    await send({"type": "http.response.body", "body": end, "more_body": False})


def _frame(error: APIError) -> bytes:
    return b"data: " + error.body() + b"\n\n" + DONE
