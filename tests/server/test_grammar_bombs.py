"""Grammars that would take minutes or gigabytes are 400s in time; their compiler is killed, and the others go on."""

from __future__ import annotations

import asyncio
import contextlib
import resource
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from server_rig import Rig, running

from octavo.structured.compiler import GrammarCompiler

PLAIN = "/v1/completions"
REGEX = "(a{3000}){3000}"
BOMBS: list[tuple[dict[str, Any], str]] = [
    ({"structured_outputs": {"regex": REGEX}}, "structured_outputs.regex"),
    ({"guided_json": {"type": "string", "pattern": f"^{REGEX}$"}}, "guided_json"),
    ({"guided_grammar": 'start: x{10000}\nx: y{10000}\ny: "aaaaaaaaaaaaaaaaaaaaaaaaaaaaa"'}, "guided_grammar"),
]  # fmt: skip


@contextlib.asynccontextmanager
async def compiling(patch: pytest.MonkeyPatch, seconds: float) -> AsyncIterator[tuple[Rig, GrammarCompiler]]:
    """A server whose grammars may take so long, its checker started."""
    made: list[GrammarCompiler] = []

    def make(*args: Any) -> GrammarCompiler:
        made.append(GrammarCompiler(*args, seconds=seconds))
        return made[-1]

    patch.setattr("octavo.server.context.GrammarCompiler", make)
    async with running() as rig:
        answer = await rig.http.post(PLAIN, json={"model": "fake", "prompt": "x", "guided_regex": "a"}, timeout=60)
        assert answer.status_code == 200
        yield rig, made[0]


@pytest.mark.parametrize(("fields", "param"), BOMBS, ids=[param for _, param in BOMBS])
async def test_one_that_takes_too_long(monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any], param: str) -> None:
    async with compiling(monkeypatch, seconds=0.4) as (rig, compiler):
        checker = compiler._checker
        assert checker is not None
        began = time.monotonic()
        bomb = asyncio.create_task(rig.http.post(PLAIN, json={"model": "fake", "prompt": "x", **fields}))
        await rig.healthy()
        assert not bomb.done()
        answer = await bomb
        assert time.monotonic() - began < 5
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
        assert "takes more than 0.4 s to compile" in answer.json()["error"]["message"]
        assert checker.process.poll() is not None
        assert compiler._checker is None
        compiler._seconds = 30.0
        for goes_on in ({}, {"guided_regex": "b"}):
            answer = await rig.http.post(PLAIN, json={"model": "fake", "prompt": "x", **goes_on}, timeout=60)
            assert answer.status_code == 200


async def test_one_that_takes_too_much_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    async with compiling(monkeypatch, seconds=30.0) as (rig, compiler):
        checker = compiler._checker
        assert checker is not None
        pid = checker.process.pid
        soft, hard = resource.prlimit(pid, resource.RLIMIT_AS)
        assert soft == hard == 4 * 2**30
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[0])
        # What it may still take is a few MiB now, so that the test need not fill 4 GiB.
        now = pages * resource.getpagesize() + 8 * 2**20
        resource.prlimit(pid, resource.RLIMIT_AS, (now, now))
        answer = await rig.http.post(PLAIN, json={"model": "fake", "prompt": "x", "guided_regex": REGEX}, timeout=60)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "guided_regex")
        assert "takes too much memory" in answer.json()["error"]["message"]
        assert checker.process.poll() is not None
        answer = await rig.http.post(PLAIN, json={"model": "fake", "prompt": "x", "guided_regex": "b"}, timeout=60)
        assert answer.status_code == 200
