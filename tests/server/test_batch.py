"""Batches of requests: what is written, what a second run does, and what happens when things go wrong."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from server_rig import FakeEngine, Script, make_context, until

from octavo.config import ServerOptions
from octavo.engine.client import EngineDeadError
from octavo.server.batch import Batch, BatchFiles
from octavo.server.batch_files import count_lines, read_finished
from octavo.server.context import ServerState

CHAT, PLAIN = "/v1/chat/completions", "/v1/completions"


class Bar:
    """A progress bar that only counts."""

    def __init__(self) -> None:
        self.count = 0

    def update(self, n: float = 1) -> None:
        self.count += int(n)


def line(custom_id: str, url: str = PLAIN, **body: Any) -> str:
    given = {"messages": [{"role": "user", "content": "hi"}]} if url == CHAT else {"prompt": custom_id}
    body = {"model": "fake", **given, **body}
    return json.dumps({"custom_id": custom_id, "method": "POST", "url": url, "body": body})


@contextlib.asynccontextmanager
async def batch(engine: FakeEngine, given_up: asyncio.Event | None = None, **changes: Any) -> AsyncIterator[Batch]:
    state = ServerState(make_context(engine, **changes))
    try:
        yield Batch(state, given_up or asyncio.Event())
    finally:
        state.close()


def files(folder: Path, lines: list[str] | None = None) -> BatchFiles:
    source, output = folder / "in.jsonl", folder / "out.jsonl"
    if lines is not None:
        source.write_text("\n".join(lines) + "\n")
    return BatchFiles(input=source, output=output, finished=read_finished(output))


def results(folder: Path) -> dict[str, dict[str, Any]]:
    """By the number of the input's line."""
    found = [json.loads(text) for text in (folder / "out.jsonl").read_text().splitlines()]
    by_number = {result["id"].removeprefix("batch_req_"): result for result in found}
    assert len(by_number) == len(found)
    return by_number


async def test_both_urls(tmp_path: Path) -> None:
    bar = Bar()
    async with batch(FakeEngine()) as run:
        assert await run.run(files(tmp_path, [line("a", CHAT), "", line("b", n=2)]), bar) == 0
    written = results(tmp_path)
    assert set(written) == {"1", "3"}
    assert written["1"]["custom_id"] == "a"
    assert written["1"]["error"] is None
    assert written["1"]["response"]["status_code"] == 200
    assert written["1"]["response"]["body"]["choices"][0]["message"]["content"] == "hello"
    assert [choice["text"] for choice in written["3"]["response"]["body"]["choices"]] == ["hello", "hello"]
    assert bar.count == count_lines(tmp_path / "in.jsonl") == 2


async def test_each_failure_is_a_line(tmp_path: Path) -> None:
    lines = [
        line("ok"),
        line("bad", temperature=9),
        line("streams", stream=True),
        line("other", model="gpt-4"),
        line("ok"),
        "{not json",
        '{"custom_id": "no-body", "method": "POST", "url": "/v1/completions"}',
        line("url", "/v1/audio"),
        "x" * 2000,
        line("broken"),
        line("last"),
    ]
    engine = FakeEngine(lambda r: Script(fault="error") if bytes(r.prompt_token_ids) == b"broken" else Script())
    async with batch(engine, options=ServerOptions(max_body_bytes=1000)) as run:
        assert await run.run(files(tmp_path, lines), Bar()) == 9
    written = results(tmp_path)
    statuses = {number: result["response"]["status_code"] for number, result in written.items() if result["response"]}
    assert statuses == {"1": 200, "2": 400, "3": 400, "4": 404, "10": 500, "11": 200}
    assert written["2"]["response"]["body"]["error"]["param"] == "temperature"
    assert written["3"]["response"]["body"]["error"]["param"] == "stream"
    codes = {number: (r["custom_id"], r["error"]["code"]) for number, r in written.items() if r["error"]}
    assert codes == {
        "5": ("ok", "duplicate_custom_id"),
        "6": (None, "invalid_line"),
        "7": ("no-body", "invalid_line"),
        "8": ("url", "invalid_url"),
        "9": (None, "line_too_long"),
    }
    # Failures are results: a second run has nothing to do.
    engine.requests.clear()
    async with batch(engine, options=ServerOptions(max_body_bytes=1000)) as run:
        bar = Bar()
        assert await run.run(files(tmp_path), bar) == 9
        assert bar.count == 0
    assert engine.requests == []
    assert results(tmp_path) == written


async def test_an_interrupted_run_is_continued(tmp_path: Path) -> None:
    gate = asyncio.Event()
    engine = FakeEngine(lambda r: Script(gate=None if bytes(r.prompt_token_ids) < b"2" else gate))
    async with batch(engine) as run:
        task = asyncio.create_task(run.run(files(tmp_path, [line(str(n)) for n in range(4)]), Bar()))
        output = tmp_path / "out.jsonl"
        await until(lambda: len(engine.running) == 2 and output.read_bytes().count(b"\n") == 2)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
    assert len(engine.aborted) == 2
    with output.open("a") as file:
        file.write('{"id": "batch_req_3", "custom_')  # as a crash leaves it
    gate.set()
    engine.requests.clear()
    async with batch(engine) as run:
        assert await run.run(files(tmp_path), Bar()) == 0
    assert sorted(bytes(r.prompt_token_ids) for r in engine.requests) == [b"2", b"3"]
    assert {result["custom_id"] for result in results(tmp_path).values()} == {"0", "1", "2", "3"}


async def test_a_dead_engine_ends_the_run_and_leaves_the_rest(tmp_path: Path) -> None:
    given_up = asyncio.Event()

    def script(request: Any) -> Script:
        if bytes(request.prompt_token_ids) == b"1":
            given_up.set()
            return Script(fault="die")
        return Script()

    async with batch(FakeEngine(script), given_up) as run:
        with pytest.raises(EngineDeadError, match="stays dead"):
            await run.run(files(tmp_path, [line("0"), line("1")]), Bar())
    assert "1" not in {result["custom_id"] for result in results(tmp_path).values()}


async def test_a_request_survives_an_engine_that_is_restarted_but_not_three(tmp_path: Path) -> None:
    deaths = {b"once": 1, b"always": 9}
    engine = FakeEngine()

    def script(request: Any) -> Script:
        name = bytes(request.prompt_token_ids)
        deaths[name] -= 1
        if deaths[name] < 0:
            return Script()
        asyncio.get_running_loop().call_later(0.02, setattr, engine, "dead", None)
        return Script(fault="die")

    engine.script = script
    async with batch(engine) as run:
        assert await run.run(files(tmp_path, [line("once")]), Bar()) == 0
        assert await run.run(files(tmp_path, [line("always")]), Bar()) == 1

    assert deaths == {b"once": -1, b"always": 6}


async def test_few_lines_are_held_and_a_full_queue_is_waited_for(tmp_path: Path) -> None:
    most = 0

    def script(_: Any) -> Script:
        nonlocal most
        most = max(most, len(asyncio.all_tasks()))
        return Script(b"x")

    async with batch(FakeEngine(script), options=ServerOptions(max_waiting_requests=0)) as run:
        assert await run.run(files(tmp_path, [line(str(n)) for n in range(100)]), Bar()) == 0
    assert len(results(tmp_path)) == 100
    assert most < 16 * 5  # 16 requests at a time, of a few tasks each


def test_a_file_of_something_else_is_left_alone(tmp_path: Path) -> None:
    other = tmp_path / "out.jsonl"
    other.write_text("my notes\nmore notes")
    with pytest.raises(ValueError, match=r"output_file=.*in line 1"):
        read_finished(other)
    assert other.read_text() == "my notes\nmore notes"
