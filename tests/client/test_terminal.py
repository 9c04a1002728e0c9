"""Terminal chats and completions against a real server: what is sent, shown and remembered."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest
from server_rig import FakeEngine, Rig, Script, running, until

from octavo.cli import main
from octavo.client.api import ApiClient, ServerError, _event_data
from octavo.client.terminal import Session, chat, complete
from octavo.config import ServerOptions


class Typist:
    """A console whose user enters `lines`; an exception among them is raised."""

    def __init__(self, *lines: str | BaseException) -> None:
        self._lines = list(lines)
        self.shown = ""
        self.notes: list[str] = []
        self.on_write: Callable[[str], None] = lambda _: None

    def read(self) -> str:
        if not self._lines:
            raise EOFError
        line = self._lines.pop(0)
        if isinstance(line, BaseException):
            raise line
        return line

    def write(self, text: str) -> None:
        self.shown += text
        self.on_write(text)

    def note(self, text: str) -> None:
        self.notes.append(text)


def session(rig: Rig, console: Typist, **changes: Any) -> Session:
    return Session(ApiClient(f"http://127.0.0.1:{rig.port}"), "fake", console, **changes)


def prompts(rig: Rig) -> list[str]:
    return [bytes(request.prompt_token_ids).decode() for request in rig.engine.requests]


async def test_a_conversation_is_remembered_until_it_is_cleared() -> None:
    async with running() as rig:
        console = Typist("one", "", "two", "/clear", "//three", "/help", "/what now", "/exit", "never")
        assert await asyncio.to_thread(chat, session(rig, console), "be kind") == 0
        system = "<system>be kind\n"
        assert prompts(rig) == [
            f"{system}<user>one\n<assistant>",
            f"{system}<user>one\n<assistant>hello\n<user>two\n<assistant>",
            f"{system}<user>/three\n<assistant>",
        ]
        assert console.shown == "hello\n" * 3
        assert any("/clear" in note and "Ctrl-C" in note for note in console.notes)
        assert "unknown command /what; there are /help, /clear and /exit" in console.notes


async def test_ctrl_c_stops_the_answer_and_not_the_program() -> None:
    async with running(FakeEngine(lambda _: Script(b"abc", delay=0.02))) as rig:
        console = Typist("one", KeyboardInterrupt(), "two")

        def interrupt(text: str) -> None:
            if text == "b":
                console.on_write = lambda _: None
                raise KeyboardInterrupt

        console.on_write = interrupt
        assert await asyncio.to_thread(chat, session(rig, console)) == 0
        await until(lambda: len(rig.engine.aborted) == 1)
        assert rig.engine.aborted == [rig.engine.requests[0].request_id]
        # What was shown is what the model said, as far as the conversation goes.
        assert prompts(rig)[1] == "<user>one\n<assistant>ab\n<user>two\n<assistant>"
        assert console.shown == "ab\nabc\n"
        assert "[stopped]" in console.notes


async def test_an_error_costs_its_message_only() -> None:
    engine = FakeEngine(lambda r: Script(fault="error") if b"bad" in bytes(r.prompt_token_ids) else Script())
    async with running(engine) as rig:
        console = Typist("bad", "x" * 600, "good")
        assert await asyncio.to_thread(chat, session(rig, console)) == 0
        errors = [note for note in console.notes if note.startswith("octavo: error: ")]
        assert errors[0] == "octavo: error: the row failed"
        assert "answered 400" in errors[1]
        assert prompts(rig)[-1] == "<user>good\n<assistant>"
        with pytest.raises(ServerError, match="the row failed"):
            await asyncio.to_thread(chat, session(rig, Typist()), None, "bad")


async def test_completions_and_numbers() -> None:
    async with running() as rig:
        console = Typist(" once ")
        assert await asyncio.to_thread(complete, session(rig, console, stats=True), 3) == 0
        assert console.shown == " once hel\n"
        assert prompts(rig) == [" once "]
        assert console.notes[-1].startswith("[3 tokens, first after ")


async def test_escape_sequences_do_not_reach_the_terminal() -> None:
    async with running(FakeEngine(lambda _: Script(b"a\x1b[2J\tb\n"))) as rig:
        console = Typist()
        assert await asyncio.to_thread(chat, session(rig, console), None, "x") == 0
        assert console.shown == "a[2J\tb\n"


async def test_the_commands(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    async with running(options=ServerOptions(api_key=("k",))) as rig:
        url = f"http://127.0.0.1:{rig.port}/v1"

        async def run(*words: str) -> tuple[int, str, str]:
            status = await asyncio.to_thread(main, words)
            return (status, *capsys.readouterr())

        assert await run("chat", "--url", url, "--api-key", "k", "-q", "hi") == (0, "hello\n", "")
        assert await run("complete", "--base-url", url[:-3], "--api-key", "k", "-q", "hi", "--max-tokens", "2") == (
            *(0, "hihe\n", ""),
        )
        status, _, error = await run("chat", "--url", url, "--quick", "hi")
        assert (status, "answered 401: a valid API key is needed" in error) == (1, True)
        monkeypatch.setenv("OCTAVO_API_KEY", "k,other")
        assert (await run("chat", "--url", url, "--model", "org/alias", "-q", "hi"))[0] == 0
        status, _, error = await run("chat", "--url", url, "--model", "gpt", "-q", "hi")
        assert (status, error) == (2, f"octavo: error: --model=gpt is not served at {url}; allowed: fake, org/alias\n")
        assert (await run("complete", "--max-tokens", "0"))[0] == 2
        assert (await run("chat", "--url", "ftp://x"))[2].startswith("octavo: error: --url=ftp://x is not the address")
        assert "unknown flag --sytem-prompt; did you mean --system-prompt?" in (await run("chat", "--sytem-prompt"))[2]


def test_no_server_and_no_openai_server() -> None:
    with pytest.raises(ServerError, match=r"no answer from http://127.0.0.1:9/v1"):
        ApiClient("http://127.0.0.1:9").models()

    class Other(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = b"<html>" if self.path == "/v1/models" else b"[]"
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_POST(self) -> None:
            """A stream that breaks off."""
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b'data: {"choices": []}\n\n')

        def log_message(self, *_: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Other) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        client = ApiClient(f"http://127.0.0.1:{server.server_port}")
        with pytest.raises(ServerError, match="not an OpenAI-compatible server"):
            client.models()
        with pytest.raises(ServerError, match="ended before"):
            list(client.stream("/completions", {}))
        server.shutdown()


def test_events() -> None:
    lines = b': hi\n\ndata: a\ndata:b\r\n\nevent: x\nid: 1\n\ndata: {"c": "\xc3\xa9"}\n\ndata: cut'.splitlines(True)
    assert [text if text.startswith("a") else json.loads(text) for text in _event_data(iter(lines))] == [
        "a\nb",
        {"c": "é"},
    ]


@pytest.mark.parametrize("url", ["localhost:8000", "http://", "http://a/?x=1", "http://a:port"])
def test_a_bad_url_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="url="):
        ApiClient(url)
