"""`octavo chat` and `octavo complete` between a server and a terminal."""

from __future__ import annotations

import contextlib
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from octavo.client.api import ApiClient, ServerError

with contextlib.suppress(ImportError):
    import readline  # noqa: F401  (gives input() line editing and a history)

HELP = """\
/help    this
/clear   forget the conversation
/exit    end; so does Ctrl-D
Ctrl-C stops an answer. A message that starts with a slash is written with two."""
# Escape sequences in an answer could do things to the terminal; tabs and line ends may stay.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class Console:
    """Where the user is. `read` raises EOFError at the end; both raise KeyboardInterrupt at Ctrl-C."""

    def read(self) -> str:
        return input("> " if sys.stdin.isatty() else "")

    def write(self, text: str) -> None:
        """A piece of an answer."""
        print(text, end="", flush=True)

    def note(self, text: str) -> None:
        """A line that is no part of an answer."""
        print(text, file=sys.stderr, flush=True)


@dataclass
class Answer:
    """One streamed answer as it is shown. Seconds from when it was asked for."""

    pieces: list[str] = field(default_factory=list)
    first: float | None = None
    seconds: float = 0.0
    num_tokens: int = 0
    stopped: bool = False  # by Ctrl-C

    @property
    def text(self) -> str:
        return "".join(self.pieces)

    def __str__(self) -> str:
        if not self.num_tokens or self.first is None:
            return f"[{self.seconds:.2f} s]"
        rate = self.num_tokens / self.seconds if self.seconds else 0.0
        return f"[{self.num_tokens} tokens, first after {self.first:.2f} s, {rate:.1f} tokens/s]"


@dataclass
class Session:
    """A user, a server and one of its models."""

    client: ApiClient
    model: str
    console: Console
    stats: bool = False  # a line of numbers after each answer

    def show(self, path: str, body: dict[str, Any], text_of: Callable[[dict[str, Any]], str | None]) -> Answer:
        """Ask, and write the answer as it comes. Ctrl-C stops the answer. Raises ServerError."""
        answer, began = Answer(), time.monotonic()
        if self.stats:
            body = {**body, "stream_options": {"include_usage": True}}
        try:
            with contextlib.closing(self.client.stream(path, {"model": self.model, **body})) as events:
                self._follow(events, answer, began, text_of)
        except KeyboardInterrupt:
            answer.stopped = True
        finally:
            answer.seconds = time.monotonic() - began
            if not answer.text.endswith("\n"):
                self.console.write("\n")
        if answer.stopped:
            self.console.note("[stopped]")
        if self.stats:
            self.console.note(str(answer))
        return answer

    def _follow(
        self,
        events: Iterator[dict[str, Any]],
        answer: Answer,
        began: float,
        text_of: Callable[[dict[str, Any]], str | None],
    ) -> None:
        for event in events:
            if event.get("usage"):
                answer.num_tokens = event["usage"]["completion_tokens"]
            for choice in event.get("choices", ()):
                text = text_of(choice)
                if text:
                    if answer.first is None:
                        answer.first = time.monotonic() - began
                    answer.pieces.append(text)
                    self.console.write(_CONTROL.sub("", text))


def chat(session: Session, system_prompt: str | None = None, quick: str | None = None) -> int:
    """Talk until the user ends it; with `quick`, ask that and end. Returns the exit status. Raises ServerError
    for `quick` only: in a conversation an error is shown, and the message that met it is forgotten."""
    opening = [] if system_prompt is None else [{"role": "system", "content": system_prompt}]
    if quick is not None:
        return _exit_status(_say(session, opening, quick))
    session.console.note(f"{session.model} at {session.client.address}; /help lists the commands")
    messages = list(opening)
    for line in _lines(session.console):
        if line in ("/exit", "/quit"):
            break
        if line == "/clear":
            messages = list(opening)
            session.console.note("[forgotten]")
        elif line == "/help":
            session.console.note(HELP)
        elif line.startswith("/") and not line.startswith("//"):
            session.console.note(f"unknown command {line.split()[0]}; there are /help, /clear and /exit")
        else:
            _try(session, partial(_say, session, messages, line.removeprefix("/")))
    return 0


def complete(session: Session, max_tokens: int, quick: str | None = None) -> int:
    """Continue each line of the user's; with `quick`, that one. Returns and raises like `chat`."""

    def ask(prompt: str) -> Answer:
        session.console.write(prompt)
        body = {"prompt": prompt, "max_tokens": max_tokens}
        return session.show("/completions", body, lambda choice: choice.get("text"))

    if quick is not None:
        return _exit_status(ask(quick))
    session.console.note(f"{session.model} at {session.client.address}; Ctrl-D ends")
    for line in _lines(session.console, strip=False):
        _try(session, partial(ask, line))
    return 0


def _say(session: Session, messages: list[dict[str, str]], text: str) -> Answer:
    """Ask with all that was said before, and remember question and answer, a stopped one as far as it came."""
    question = {"role": "user", "content": text}
    body = {"messages": [*messages, question]}
    answer = session.show("/chat/completions", body, lambda choice: choice["delta"].get("content"))
    messages += [question, {"role": "assistant", "content": answer.text}]
    return answer


def _try(session: Session, ask: Callable[[], Answer]) -> None:
    try:
        ask()
    except ServerError as error:
        session.console.note(f"octavo: error: {error}")


def _lines(console: Console, strip: bool = True) -> Iterator[str]:
    """What the user enters, until the end. Ctrl-C drops the line."""
    while True:
        try:
            line = console.read()
        except EOFError:
            return
        except KeyboardInterrupt:
            console.note("\n[Ctrl-D ends]")
            continue
        if line.strip():
            yield line.strip() if strip else line


def _exit_status(answer: Answer) -> int:
    return 130 if answer.stopped else 0
