"""Several API processes on one port, over one engine process: for a client, one server."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from server_rig import FakeEngine, free_port, make_context

from octavo.config import ServerOptions
from octavo.protocol.messages import Outputs
from octavo.protocol.outputs import SchedulerStats
from octavo.server.bind import bind, bind_shared
from octavo.server.context import ServerState
from octavo.server.front_ends import FrontEndGroup
from octavo.server.metrics import MetricsRegistry
from octavo.server.metrics_exchange import MetricsExchange
from octavo.server.openai.errors import APIError

PATH = "/v1/completions"


@dataclass
class Server:
    """fake_server.py under way, with two API processes."""

    process: subprocess.Popen[bytes]
    port: int
    log: Path

    @property
    def children(self) -> dict[str, int]:
        """Process ids by what they are: "engine" and "front_end"."""
        pids = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        words = {int(pid): Path(f"/proc/{pid}/cmdline").read_text() for pid in pids}
        return {name: pid for name in ("engine", "front_end") for pid, line in words.items() if name in line}

    async def get(self, path: str) -> httpx.Response:
        """Over a fresh connection, which either process may get."""
        async with self._client() as client:
            return await client.get(path)

    async def post(self, body: dict[str, object]) -> httpx.Response:
        """A completion, over a fresh connection."""
        async with self._client() as client:
            return await client.post(PATH, json=body)

    async def stream(self, num_tokens: int) -> str:
        body = {"model": "fake", "prompt": [1, 2, 3], "max_tokens": num_tokens, "ignore_eos": True, "stream": True}
        async with self._client() as client:
            answer = await client.post(PATH, json=body)
            return answer.text if answer.status_code == 200 else f"status {answer.status_code}"

    async def healthy(self) -> None:
        """Until ten fresh connections in a row find it so."""
        good = 0
        async with asyncio.timeout(30):
            while good < 10:
                assert self.process.poll() is None, self.log.read_text()
                with contextlib.suppress(httpx.TransportError):
                    good = good + 1 if (await self.get("/health")).status_code == 200 else 0
                    continue
                await asyncio.sleep(0.05)

    async def metrics(self) -> dict[str, float]:
        """Sums over the labels but for buckets."""
        found: dict[str, float] = {}
        for family in text_string_to_metric_families((await self.get("/metrics")).text):
            for sample in family.samples:
                if "le" not in sample.labels:
                    found[sample.name] = found.get(sample.name, 0.0) + sample.value
        return found

    def _client(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(base_url=f"http://127.0.0.1:{self.port}", timeout=20, verify=False)


@contextlib.asynccontextmanager
async def serving(model: Path, log: Path, **behaviour: object) -> AsyncIterator[Server]:
    port = free_port()
    command = [sys.executable, str(Path(__file__).with_name("fake_server.py")), str(model), str(port), "2"]
    with log.open("wb") as sink:
        process = subprocess.Popen([*command, json.dumps(behaviour)], stderr=sink)
    server = Server(process, port, log)
    try:
        await server.healthy()
        while _num_listeners(port) < 2:  # whoever listens first answers for all
            await asyncio.sleep(0.01)
        yield server
        assert "Traceback" not in log.read_text(), log.read_text()
    finally:
        process.kill()
        process.wait()


def _num_listeners(port: int) -> int:
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return sum(row[3] == "0A" and int(row[1].rpartition(":")[2], 16) == port for row in rows)


def _num_sockets(pid: int) -> int:
    links = []
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            links.append(os.readlink(fd))
    return sum(link.startswith("socket:") for link in links)


def _done(text: str) -> bool:
    return text.endswith("data: [DONE]\n\n") and '"error"' not in text


async def _accepted(pids: Sequence[int], before: Sequence[int], count: int) -> list[int]:
    """Wait until the processes have accepted so many connections; how many each did."""
    async with asyncio.timeout(10):
        while sum(opened := [_num_sockets(pid) - num for pid, num in zip(pids, before)]) < count:
            await asyncio.sleep(0.01)
    return opened


async def test_two_processes_are_one_server(smollm2_path: Path, tmp_path: Path) -> None:
    async with serving(smollm2_path, tmp_path / "log", step_seconds=0.02) as server:
        pids = (server.process.pid, server.children["front_end"])
        before = [_num_sockets(pid) for pid in pids]
        streams = [asyncio.create_task(server.stream(40)) for _ in range(24)]
        opened = await _accepted(pids, before, 24)
        assert min(opened) > 0, opened  # both have some of the connections
        assert all(_done(text) for text in await asyncio.gather(*streams))
        seen = [await server.metrics() for _ in range(8)]  # whoever answers
        for metrics in seen:
            assert metrics["octavo:requests_received_total"] == 24
            assert metrics["vllm:request_success_total"] == 24
            assert metrics["vllm:generation_tokens_total"] == 24 * 40
            assert metrics["vllm:time_to_first_token_seconds_count"] == 24
            assert metrics["vllm:inter_token_latency_seconds_count"] == 24 * 39
            assert metrics["vllm:iteration_tokens_total_sum"] == 24 * (3 + 39)
            assert metrics["http_requests_total"] == 24
        assert len({metrics["process_start_time_seconds"] for metrics in seen}) == 1


async def test_the_engine_dies_for_all_and_comes_back_for_all(smollm2_path: Path, tmp_path: Path) -> None:
    async with serving(smollm2_path, tmp_path / "log", step_seconds=0.02) as server:
        streams = [asyncio.create_task(server.stream(200)) for _ in range(8)]
        await asyncio.sleep(0.5)
        os.kill(server.children["engine"], signal.SIGKILL)
        began = time.monotonic()
        for text in await asyncio.gather(*streams):
            assert "the engine stopped before the request was complete" in text
        assert time.monotonic() - began < 2
        await server.healthy()
        assert all(_done(text) for text in await asyncio.gather(*(server.stream(5) for _ in range(8))))


async def test_each_process_serves_the_same_adapters(smollm2_path: Path, tmp_path: Path) -> None:
    async with serving(smollm2_path, tmp_path / "log", lora_modules=["a=/x", "b=/y"]) as server:
        body = {"prompt": [1, 2, 3], "max_tokens": 3, "ignore_eos": True}
        for _ in range(8):  # whoever answers
            cards = (await server.get("/v1/models")).json()["data"]
            assert [card["id"] for card in cards] == ["fake", "a", "b"]
            for name in ("fake", "a", "b"):
                assert (await server.post({**body, "model": name})).json()["model"] == name
        # Four adapters fit in the host's memory, and the processes' numbers are the same: each was loaded once.
        assert (await server.metrics())["octavo:lora_adapter_loads_total"] == 2


def test_an_adapter_that_cannot_be_used_ends_the_start(smollm2_path: Path) -> None:
    behaviour = json.dumps({"lora_modules": ["a=/x", "b=/corrupt"]})
    command = [sys.executable, str(Path(__file__).with_name("fake_server.py")), str(smollm2_path)]
    starts = [
        subprocess.Popen([*command, str(free_port()), count, behaviour], stderr=subprocess.PIPE, text=True)
        for count in ("1", "2")
    ]
    for process in starts:
        _, said = process.communicate(timeout=60)
        assert process.returncode == 1, said
        assert "lora_modules: b=/corrupt: /corrupt is corrupt" in said
        assert "Traceback" not in said


async def test_all_drain(smollm2_path: Path, tmp_path: Path) -> None:
    async with serving(smollm2_path, tmp_path / "log", step_seconds=0.02) as server:
        children = server.children
        pids = (server.process.pid, children["front_end"])
        before = [_num_sockets(pid) for pid in pids]
        streams = [asyncio.create_task(server.stream(60)) for _ in range(8)]
        await _accepted(pids, before, 8)
        await asyncio.sleep(0.2)
        server.process.send_signal(signal.SIGTERM)
        assert all(_done(text) for text in await asyncio.gather(*streams))
        assert await asyncio.to_thread(server.process.wait, 30) == 0
        assert not any(Path(f"/proc/{pid}").exists() for pid in children.values())


async def test_an_api_process_that_dies_ends_the_server(smollm2_path: Path, tmp_path: Path) -> None:
    async with serving(smollm2_path, tmp_path / "log") as server:
        children = server.children
        os.kill(children["front_end"], signal.SIGKILL)
        assert await asyncio.to_thread(server.process.wait, 10) == 1
        assert not Path(f"/proc/{children['engine']}").exists()
        assert "API process" in server.log.read_text()


async def test_all_die_with_the_first(smollm2_path: Path, tmp_path: Path) -> None:
    async with serving(smollm2_path, tmp_path / "log") as server:
        children = server.children
        server.process.kill()
        async with asyncio.timeout(5):
            while any(_runs(pid) for pid in children.values()):
                await asyncio.sleep(0.02)


def _runs(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    return False


def test_one_port_for_several_but_not_for_two_servers() -> None:
    sockets, guard = bind_shared("127.0.0.1", 0, 3)
    port = sockets[0].getsockname()[1]
    assert {sock.getsockname()[1] for sock in sockets} == {port}
    with pytest.raises(OSError, match="another server is starting"):
        bind_shared("127.0.0.1", port, 2)
    guard.close()
    for sock in sockets:
        sock.listen()
    for taken in (bind, lambda host, port: bind_shared(host, port, 2)):
        with pytest.raises(OSError, match="in use"):
            taken("127.0.0.1", port)
    for sock in sockets:
        sock.close()


@pytest.fixture
def registries() -> list[MetricsRegistry]:
    return [MetricsRegistry("m", 100, {"block_size": "16"}) for _ in range(2)]


async def test_metrics_are_those_of_all(registries: list[MetricsRegistry], tmp_path: Path) -> None:
    group = [FrontEndGroup(index=i, count=2, directory=str(tmp_path)) for i in range(2)]
    exchanges = [MetricsExchange(metrics, place) for metrics, place in zip(registries, group)]
    await exchanges[0].open()
    registries[0].num_received += 2
    assert b"octavo:requests_received_total{" in await exchanges[0].render()  # the other does not listen yet
    await exchanges[1].open()
    registries[0].on_outputs(Outputs([], SchedulerStats(num_running=9, num_steps_total=100), 5))
    registries[1].on_outputs(Outputs([], SchedulerStats(num_running=4, num_steps_total=3), 7))  # a restarted engine
    registries[1].num_received += 3
    registries[1].finished["stop"] += 1
    for metrics, seconds in zip(registries, (0.05, 7.0)):
        metrics.http_request("/x", "GET", 200, seconds)
    for exchange in exchanges:
        lines = (await exchange.render()).decode().splitlines()
        labels = 'engine="0",model_name="m"'
        for line in (
            f"octavo:requests_received_total{{{labels}}} 5.0",
            'vllm:request_success_total{engine="0",finished_reason="stop",model_name="m"} 1.0',
            f"octavo:requests_in_flight{{{labels}}} 4.0",
            f"vllm:num_requests_running{{{labels}}} 4.0",
            f"vllm:iteration_tokens_total_sum{{{labels}}} 12.0",
            f"vllm:iteration_tokens_total_count{{{labels}}} 2.0",
            'http_requests_total{handler="/x",method="GET",status="2xx"} 2.0',
            'http_request_duration_seconds_bucket{handler="/x",le="0.1",method="GET"} 1.0',
            'http_request_duration_seconds_sum{handler="/x",method="GET"} 7.05',
        ):
            assert line in [_sorted_labels(found) for found in lines], line
        assert sum(line.startswith("process_cpu_seconds_total") for line in lines) <= 1
    for exchange in exchanges:
        exchange.close()


def _sorted_labels(line: str) -> str:
    name, brace, rest = line.partition("{")
    labels, _, value = rest.rpartition("} ")
    return f"{name}{{{','.join(sorted(labels.split(',')))}}} {value}" if brace else line


async def test_a_process_that_hangs_makes_metrics_unavailable_not_wrong(
    registries: list[MetricsRegistry], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("octavo.server.metrics_exchange._TIMEOUT_SECONDS", 0.1)
    exchange = MetricsExchange(registries[0], FrontEndGroup(index=0, count=2, directory=str(tmp_path)))
    release = asyncio.Event()

    async def hang(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await release.wait()
        writer.close()

    async with await asyncio.start_unix_server(hang, tmp_path / "metrics-1.sock"):
        with pytest.raises(APIError, match="in time"):
            await exchange.render()
        release.set()


def test_places_in_the_queue_are_divided() -> None:
    async def places(count: int) -> int:
        options = ServerOptions(max_waiting_requests=9)
        state = ServerState(make_context(FakeEngine(), options=options, group=FrontEndGroup(count=count)))
        state.close()
        return state.admission.max_sequences

    assert [asyncio.run(places(count)) for count in (1, 2, 4)] == [17, 9, 5]
