"""Engine failures, overload and shutdown: every client gets a full answer or a clean error, none hangs."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import socket
import threading
import time

import httpx
import pytest
from server_rig import FakeEngine, Rig, Script, free_port, make_context, running, until

from octavo.config import ServerOptions
from octavo.protocol.outputs import TokenOutput
from octavo.server import bind
from octavo.server.context import ServerState
from octavo.server.openai.errors import APIError
from octavo.text.generation import Delta, Generation

BODY = {"model": "fake", "prompt": "x"}
PATH = "/v1/completions"


def frames(text: str) -> list[dict]:
    """The JSON frames of a stream that must end in [DONE]."""
    *data, done, rest = text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    return [json.loads(frame.removeprefix("data: ")) for frame in data]


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize(("fault", "status"), [("die", 503), ("error", 500), ("abort", 503), ("mute", 500)])
async def test_an_engine_failure_is_a_clean_error(fault: str, status: int, n: int) -> None:
    def script(request: object) -> Script:
        return Script(b"abc", fault=fault if request.request_id.endswith(f"-{n - 1}") else None)

    async with running(FakeEngine(script)) as rig:
        answer = await rig.http.post(PATH, json={**BODY, "n": n})
        assert answer.status_code == status
        error = answer.json()["error"]
        assert error["type"] == "server_error"
        assert ("the row failed" in error["message"]) == (fault == "error")
        assert ("retry-after" in answer.headers) == (status == 503)
        rig.engine.dead = None
        answer = await rig.http.post(PATH, json={**BODY, "n": n, "stream": True})
        assert answer.status_code == 200
        *chunks, last = frames(answer.text)
        assert "".join(c["choices"][0]["text"] for c in chunks if c["choices"][0]["index"] == n - 1) == "abc"
        assert last["error"]["message"] == error["message"]
        assert rig.engine.running == set()
        metrics = await rig.metrics()
        ends = {k: v for k, v in metrics.items() if k.startswith("vllm:request_success_total")}
        assert sum(ends.values()) == metrics["octavo:requests_received_total"] == 2 * n


async def test_a_failure_before_the_first_token_is_a_plain_error_for_a_stream_too() -> None:
    async with running(FakeEngine(lambda _: Script(b"", fault="die"))) as rig:
        answer = await rig.http.post(PATH, json={**BODY, "stream": True})
        assert answer.status_code == 503
        assert answer.headers["retry-after"]


async def test_a_dead_engine_is_unhealthy_and_may_come_back() -> None:
    async with running() as rig:
        rig.engine.dead = "killed"
        for answer in (await rig.http.get("/health"), await rig.http.post(PATH, json=BODY)):
            assert answer.status_code == 503
            assert answer.json()["error"]["message"] == "the engine has stopped"
        assert (await rig.http.get("/version")).status_code == 200
        rig.engine.dead = None
        assert (await rig.http.get("/health")).status_code == 200
        await rig.healthy()


async def test_a_full_queue_answers_429() -> None:
    gate = asyncio.Event()
    async with running(FakeEngine(lambda _: Script(gate=gate))) as rig:
        held = [asyncio.create_task(rig.http.post(PATH, json={**BODY, "n": 5})) for _ in range(3)]
        await until(lambda: len(rig.engine.running) == 15)
        answer = await rig.http.post(PATH, json={**BODY, "n": 2})
        assert (answer.status_code, answer.headers["retry-after"]) == (429, "1")
        assert answer.json()["error"]["type"] == "rate_limit_error"
        last = asyncio.create_task(rig.http.post(PATH, json=BODY))
        await until(lambda: len(rig.engine.running) == 16)
        assert (await rig.http.get("/health")).status_code == 200
        gate.set()
        assert [answer.status_code for answer in await asyncio.gather(*held, last)] == [200] * 4
        await rig.healthy()


async def test_sequences_of_other_users_of_the_engine_count() -> None:
    async with running() as rig:
        rig.engine.running |= {str(i) for i in range(16)}
        assert (await rig.http.post(PATH, json=BODY)).status_code == 429
        rig.engine.running.clear()


async def _stream(rig: Rig) -> str:
    async with rig.http.stream("POST", PATH, json={**BODY, "stream": True}) as answer:
        return (await answer.aread()).decode()


async def test_drain_lets_streams_finish_and_refuses_new_work(caplog: pytest.LogCaptureFixture) -> None:
    async with running(FakeEngine(lambda _: Script(delay=0.1))) as rig:
        stream = asyncio.create_task(_stream(rig))
        whole = asyncio.create_task(rig.http.post(PATH, json=BODY))
        await until(lambda: len(rig.engine.running) == 2)
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.sleep(0.1)
        for answer in (await rig.http.get("/health"), await rig.http.post(PATH, json=BODY)):
            assert answer.status_code == 503
            assert answer.headers["retry-after"]
        assert "".join(c["choices"][0]["text"] for c in frames(await stream)) == "hello"
        assert (await whole).json()["choices"][0]["text"] == "hello"
        async with asyncio.timeout(2):
            await rig.task
        with pytest.raises(httpx.ConnectError):
            await rig.http.get("/health")
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


@pytest.mark.parametrize("second_signal", [None, signal.SIGTERM, signal.SIGINT])
async def test_the_end_of_the_drain_gives_clean_errors(second_signal: int | None) -> None:
    options = ServerOptions(drain_timeout=0.2 if second_signal is None else 60.0)
    gate = asyncio.Event()

    def script(request: object) -> Script:
        return Script(gate=gate) if request.prompt_token_ids == [ord("q")] else Script(b"x" * 99, delay=0.02)

    async with running(FakeEngine(script), options=options) as rig:
        stream = asyncio.create_task(_stream(rig))
        queued = [
            asyncio.create_task(rig.http.post(PATH, json={**BODY, "prompt": "q", "stream": s})) for s in (True, False)
        ]
        await until(lambda: len(rig.engine.running) == 3)
        await asyncio.sleep(0.1)
        start = time.monotonic()
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.sleep(0.05)
        if second_signal is not None:
            os.kill(os.getpid(), second_signal)
        *chunks, last = frames(await stream)
        assert chunks
        assert last["error"]["message"] == "the server is shutting down"
        for answer in await asyncio.gather(*queued):
            assert answer.status_code == 503
            assert answer.headers["retry-after"]
        await rig.task
        assert time.monotonic() - start < 2
        assert rig.engine.running == set()


async def test_a_slow_tokenizer_does_not_hold_the_loop() -> None:
    async with running() as rig:
        release = threading.Event()
        encode = rig.context.tokenizer.encode
        rig.context.tokenizer.encode = lambda *args: release.wait(5) and encode(*args)
        slow = asyncio.create_task(rig.http.post(PATH, json=BODY))
        await asyncio.sleep(0.05)
        start = time.monotonic()
        assert (await rig.http.get("/health")).status_code == 200
        assert time.monotonic() - start < 0.5
        release.set()
        assert (await slow).status_code == 200


async def test_text_work_that_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("octavo.server.context._TEXT_TIMEOUT_SECONDS", 0.05)
    state = ServerState(make_context(FakeEngine()))
    release = threading.Event()
    with pytest.raises(APIError, match="in time"):
        await state.in_thread(release.wait)
    release.set()
    state.close()


async def test_a_bug_is_a_500_in_shape_and_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    async with running() as rig:

        def broken(*_: object) -> None:
            raise RuntimeError("secret")

        rig.context.tokenizer.encode = broken
        answer = await rig.http.post(PATH, json=BODY)
        assert (answer.status_code, answer.json()["error"]["code"]) == (500, "internal_error")
        assert "secret" not in answer.text
        assert answer.headers["x-request-id"]
        metrics = await rig.metrics()
        assert metrics['http_requests_total{handler="/v1/completions",method="POST",status="5xx"}'] == 1
    assert caplog.text.count("RuntimeError: secret") == 1


async def test_a_bug_in_a_stream_ends_it_with_an_error_frame(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running() as rig:
        real = Generation.push

        def broken(self: Generation, output: TokenOutput) -> Delta:
            if output.finish_reason is not None:
                raise RuntimeError("secret")
            return real(self, output)

        monkeypatch.setattr(Generation, "push", broken)
        *chunks, last = frames(await _stream(rig))
        assert len(chunks) == 5
        assert last["error"]["message"] == "internal server error"
        assert rig.engine.running == set()
    assert caplog.text.count("RuntimeError: secret") == 1


def test_bind_names_the_holder() -> None:
    port = free_port()
    with bind("127.0.0.1", port) as first:
        first.listen()
        with pytest.raises(OSError, match=rf"127\.0\.0\.1:{port}.*in use.*process {os.getpid()}"):
            bind("127.0.0.1", port)
    with pytest.raises(OSError, match=r"no\.such\.host"):
        bind("no.such.host.invalid", 1)
    with bind("::1", 0) as six:
        assert six.family == socket.AF_INET6


async def test_a_bound_port_refuses_clients_until_the_server_is_ready() -> None:
    with bind("127.0.0.1", 0) as sock, pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection(*sock.getsockname())
