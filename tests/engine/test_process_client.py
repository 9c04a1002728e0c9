"""An engine in its own process, over its real socket: tokens, aborts, deaths of either side."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import zmq
from fake_worker import expected

from octavo.engine.client import EngineDeadError
from octavo.engine.process_client import ProcessEngineClient
from octavo.engine.socket_client import SocketEngineClient
from octavo.protocol.outputs import TokenOutput
from octavo.protocol.request import Request
from octavo.protocol.sampling import SamplingParams

FAKE = [sys.executable, str(Path(__file__).with_name("fake_engine.py"))]


@contextlib.asynccontextmanager
async def engine(**options: Any) -> AsyncIterator[ProcessEngineClient]:
    client = ProcessEngineClient(FAKE, json.dumps(options).encode())
    try:
        await asyncio.wait_for(client.wait_ready(), 20)
        yield client
    finally:
        await client.close()


def request(name: str, prompt: list[int], max_tokens: int) -> Request:
    sampling = SamplingParams(max_tokens=max_tokens, seed=0)
    return Request(request_id=name, prompt_token_ids=prompt, sampling=sampling, max_tokens=max_tokens)


async def outputs(client: SocketEngineClient, wanted: Request) -> AsyncIterator[TokenOutput]:
    """Submit, and yield what comes up to the end. Closing the iterator aborts."""
    queue: asyncio.Queue[TokenOutput | EngineDeadError] = asyncio.Queue()
    client.submit(wanted, queue.put_nowait)
    try:
        while True:
            output = await queue.get()
            if isinstance(output, EngineDeadError):
                raise output
            yield output
            if output.finish_reason is not None:
                return
    finally:
        client.abort(wanted.request_id)


async def collect(client: SocketEngineClient, name: str, prompt: list[int], count: int) -> list[int]:
    return [t async for output in outputs(client, request(name, prompt, count)) for t in output.new_token_ids]


async def until_free(client: ProcessEngineClient) -> None:
    async with asyncio.timeout(1.0):
        while True:
            stats = (await client.control("audit"))["stats"]
            if stats["num_free_blocks"] == stats["num_blocks"]:
                return
            await asyncio.sleep(0.01)


async def test_concurrent_requests_each_get_their_tokens() -> None:
    async with engine() as client:
        prompts = [[i + 1] * (i + 2) for i in range(20)]
        found = await asyncio.gather(*(collect(client, str(i), p, 30) for i, p in enumerate(prompts)))
        assert found == [expected(p, 30) for p in prompts]
        assert client.num_unfinished == 0
        await until_free(client)


async def test_leaving_early_aborts() -> None:
    async with engine(step_seconds=0.005) as client:
        arriving = outputs(client, request("a", [1, 2], 200))
        await anext(arriving)
        await arriving.aclose()
        await until_free(client)


async def test_a_request_that_can_never_fit_is_refused_alone() -> None:
    async with engine(max_model_len=64) as client:
        refused = [o async for o in outputs(client, request("big", [1] * 60, 10))]
        assert refused[-1].finish_reason == "error"
        assert "64" in (refused[-1].error or "")
        assert await collect(client, "small", [1, 2], 5) == expected([1, 2], 5)


async def test_death_is_heard_at_once_and_another_takes_over() -> None:
    async with engine(step_seconds=0.01) as client:
        tasks = [asyncio.create_task(collect(client, str(i), [1, 2], 200)) for i in range(5)]
        await asyncio.sleep(0.1)
        began = time.monotonic()
        os.kill(client.pid, signal.SIGKILL)
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert time.monotonic() - began < 1.0
        assert all(isinstance(r, EngineDeadError) and "SIGKILL" in str(r) for r in results)
        with pytest.raises(EngineDeadError):
            await collect(client, "now", [1], 1)
        async with asyncio.timeout(20):
            while client.dead is not None:
                await asyncio.sleep(0.02)
        assert await collect(client, "after", [1, 2], 5) == expected([1, 2], 5)


async def test_a_start_that_fails_says_why() -> None:
    client = ProcessEngineClient(FAKE, json.dumps({"refuse": "no such model: x"}).encode())
    with pytest.raises(EngineDeadError, match="no such model: x"):
        await asyncio.wait_for(client.wait_ready(), 20)
    assert client.given_up.is_set()
    await client.close()


async def test_garbage_on_the_socket_is_dropped() -> None:
    async with engine() as client:
        intruder = zmq.Context.instance().socket(zmq.DEALER)
        intruder.setsockopt(zmq.LINGER, 0)
        intruder.connect(client._process.address)
        for body in (b"", b"\xc1", b"\x80", os.urandom(64), b"\x81\xa4type\xa3add"):
            intruder.send(body)
        assert await collect(client, "a", [1, 2], 5) == expected([1, 2], 5)
        intruder.close()


async def test_unknown_control_is_refused() -> None:
    async with engine() as client:
        with pytest.raises(ValueError, match="'explode'"):
            await client.control("explode")


def test_the_engine_dies_with_its_parent(tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(
        "import asyncio, sys\n"
        "from octavo.engine.process_client import ProcessEngineClient\n"
        "async def main():\n"
        "    client = ProcessEngineClient(sys.argv[1:], b'{}')\n"
        "    await client.wait_ready()\n"
        "    print(client.pid, flush=True)\n"
        "    await asyncio.sleep(60)\n"
        "asyncio.run(main())\n"
    )
    with subprocess.Popen([sys.executable, str(script), *FAKE], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        parent.kill()
        parent.wait()
    deadline = time.monotonic() + 5.0
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{child}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except OSError:
            return
        if state == "Z":  # dead; whoever adopted it has yet to reap it
            return
        time.sleep(0.02)
    pytest.fail(f"the engine {child} outlived its parent")


async def test_idle_costs_no_cpu() -> None:
    async with engine() as client:
        await collect(client, "a", [1, 2], 5)
        await asyncio.sleep(0.2)

        def used() -> int:
            fields = Path(f"/proc/{client.pid}/stat").read_text().rsplit(")", 1)[1].split()
            return int(fields[11]) + int(fields[12])  # user and system time, in ticks of 10 ms

        before = used()
        await asyncio.sleep(1.0)
        assert used() - before <= 1


async def test_submitting_while_outputs_arrive_loses_no_wakeup() -> None:
    async with engine() as client:

        async def chain(name: str) -> None:
            for i in range(10):
                assert len(await collect(client, f"{name}-{i}", [3, i + 1], 3)) == 3

        async with asyncio.timeout(30):
            for round_number in range(20):
                await asyncio.gather(*(chain(f"{round_number}-{i}") for i in range(30)))
