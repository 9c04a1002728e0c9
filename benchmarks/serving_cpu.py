#!/usr/bin/env python3
"""What the API process costs an output token: the real HTTP server over an engine that only keeps time.

    python benchmarks/serving_cpu.py [--streams 1000] [--steps-per-second 10] [--tokens 64] [--api-servers 1]

The engine process speaks the real channel (EngineService over zmq) and gives every running request one random token
of smollm2's vocabulary at each tick. The client multiplexes raw sockets in a process of its own. All streams arrive
at once. Prints one JSON row: CPU microseconds per output token of the API processes and of the engine's service
(user and system time out of /proc/PID/stat), requests and tokens a second, TTFT and inter-token gaps in ms.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import selectors
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from octavo import serving
from octavo.config import EngineOptions, ServerOptions
from octavo.engine.channel import EngineChannel
from octavo.engine.service import EngineService
from octavo.entrypoints.engine import die_with_parent, read_line
from octavo.protocol.messages import Ready
from octavo.protocol.outputs import SchedulerStats, TokenOutput
from octavo.protocol.request import Request

_MAX_MODEL_LEN, _VOCAB_SIZE = 8192, 49152
_RATE = "OCTAVO_BENCHMARK_STEPS_PER_SECOND"  # how the engine process learns it
_TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")


class Metronome:
    """Has the Engine's methods: one token to every request at each tick, without a model or a scheduler."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._left: dict[str, int] = {}  # tokens still to come
        self._next_tick = 0.0
        self._random = random.Random(0)
        self._num_steps = self._num_tokens = 0
        self.num_step_tokens = 0

    @property
    def has_work(self) -> bool:
        return bool(self._left)

    def add(self, request: Request) -> None:
        self._left[request.request_id] = request.max_tokens

    def abort(self, request_ids: Iterable[str]) -> list[TokenOutput]:
        return [TokenOutput(i, [], finish_reason="abort") for i in request_ids if self._left.pop(i, None)]

    def step(self) -> list[TokenOutput]:
        now = time.monotonic()
        self._next_tick = max(now, self._next_tick)
        time.sleep(self._next_tick - now)
        self._next_tick += self._seconds
        outputs = []
        for name, left in self._left.items():
            reason = "length" if left == 1 else None
            outputs.append(TokenOutput(name, [self._random.randrange(1000, 30000)], finish_reason=reason))
            self._left[name] = left - 1
        self._left = {name: left for name, left in self._left.items() if left}
        self._num_steps += 1
        self._num_tokens += len(outputs)
        self.num_step_tokens = len(outputs)
        return outputs

    def stats(self) -> SchedulerStats:
        running = len(self._left)
        return SchedulerStats(running, generation_tokens_total=self._num_tokens, num_steps_total=self._num_steps)

    def audit(self) -> None:
        pass

    def reset_prefix_cache(self) -> bool:
        return False

    def shutdown(self) -> None:
        pass


def run_engine(address: str) -> int:
    """The engine process."""
    read_line(0)
    die_with_parent()
    channel = EngineChannel(address)
    ready = Ready(_MAX_MODEL_LEN, 4096, 1024, 16, _VOCAB_SIZE)
    EngineService(Metronome(1 / float(os.environ[_RATE])), channel, ready).run()  # type: ignore[arg-type]
    channel.close()
    return 0


def run_server(port: int, api_servers: int) -> int:
    """The (first) API process: `octavo serve`, but for the engine's command."""
    serving._ENGINE_COMMAND = (sys.executable, __file__, "engine")
    more: dict[str, Any] = {"api_server_count": api_servers} if api_servers > 1 else {}
    return serving.serve(
        EngineOptions(), ServerOptions(port=port, log_level="warning", max_waiting_requests=4096, **more)
    )


@dataclass
class Stream:
    """One request as its client saw it. Times are perf_counter seconds."""

    began: float
    request: bytes
    stamps: list[float] = field(default_factory=list)  # one a read that brought a token
    num_frames: int = 0
    tail: bytes = b""


def _request(rng: random.Random, num_tokens: int) -> bytes:
    prompt = [rng.randrange(1000, 30000) for _ in range(min(2048, max(4, int(rng.lognormvariate(5.3, 0.9)))))]
    fields = {"model": "smollm2", "prompt": prompt, "max_tokens": num_tokens, "temperature": 1.0, "ignore_eos": True}
    body = json.dumps({**fields, "stream": True, "stream_options": {"include_usage": True}}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    return head.encode() + b"\r\nConnection: close\r\n\r\n" + body


def drive(port: int, num_streams: int, num_tokens: int) -> dict[str, Any]:
    """Send all requests at once, read until the last stream ends, and say what came when."""
    rng = random.Random(1)
    requests = [_request(rng, num_tokens) for _ in range(num_streams)]
    ready = selectors.DefaultSelector()
    streams = []
    began = time.perf_counter()
    for request in requests:
        sock = socket.create_connection(("127.0.0.1", port))
        streams.append(Stream(time.perf_counter(), request))
        sock.sendall(request)
        sock.setblocking(False)
        ready.register(sock, selectors.EVENT_READ, streams[-1])
    open_streams = num_streams
    while open_streams:
        for key, _ in ready.select(60):
            stream: Stream = key.data
            assert isinstance(key.fileobj, socket.socket)
            data = key.fileobj.recv(65536)
            if not data:
                ready.unregister(key.fileobj)
                key.fileobj.close()
                open_streams -= 1
                continue
            num_frames = data.count(b'"finish_reason":')
            if num_frames:
                stream.num_frames += num_frames
                stream.stamps.append(time.perf_counter())
            stream.tail = (stream.tail + data)[-400:]
    seconds = time.perf_counter() - began
    wanted = f'"completion_tokens":{num_tokens},'.encode()
    good = [s for s in streams if wanted in s.tail and s.tail.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")]
    gaps = [b - a for s in good for a, b in zip(s.stamps, s.stamps[1:])]
    return {
        "failed": num_streams - len(good),
        "requests_s": round(len(good) / seconds, 1),
        "output_tok_s": round(len(good) * num_tokens / seconds, 1),
        "frames_per_token": round(sum(s.num_frames for s in good) / max(1, len(good) * num_tokens), 3),
        "ttft_ms_p50_p90_p99": _percentiles([s.stamps[0] - s.began for s in good]),
        "gap_ms_p50_p90_p99": _percentiles(gaps),
    }


def _percentiles(seconds: list[float]) -> list[float]:
    ranked = sorted(seconds)
    return [round(ranked[min(len(ranked) - 1, int(p / 100 * len(ranked)))] * 1e3, 1) for p in (50, 90, 99) if ranked]


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS_PER_SECOND


def _wait_ready(port: int, server: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and server.poll() is None:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2).close()
            return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.05)
    raise RuntimeError("the server is not ready")


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """The row described at the top of this file."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {**os.environ, _RATE: str(args.steps_per_second)}
    command = [sys.executable, __file__, "server", "--port", str(port), "--api-servers", str(args.api_servers)]
    server = subprocess.Popen(command, env=environment)
    try:
        _wait_ready(port, server)
        time.sleep(1.0 if args.api_servers > 1 else 0.0)
        drive(port, 50, 8)  # warm
        pids = [server.pid, *_children(server.pid)]
        engine = [pid for pid in pids if b"engine" in Path(f"/proc/{pid}/cmdline").read_bytes()]
        before = {pid: _cpu_seconds(pid) for pid in pids}
        row = drive(port, args.streams, args.tokens)
        used = {pid: _cpu_seconds(pid) - before[pid] for pid in pids}
        num_tokens = args.streams * args.tokens
        api = sum(seconds for pid, seconds in used.items() if pid not in engine)
        return {
            "streams": args.streams,
            "tokens_each": args.tokens,
            "steps_s": args.steps_per_second,
            "api_servers": args.api_servers,
            "api_cpu_us_per_token": round(api / num_tokens * 1e6, 1),
            "engine_cpu_us_per_token": round(sum(used[pid] for pid in engine) / num_tokens * 1e6, 1),
            **row,
        }
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(30)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("role", nargs="?", default="measure", choices=("measure", "server", "engine"))
    parser.add_argument("address", nargs="?", help="the engine's socket; given by the server")
    parser.add_argument("--streams", type=int, default=1000)
    parser.add_argument("--steps-per-second", type=float, default=10.0)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--api-servers", type=int, default=1)
    parser.add_argument("--port", type=int, default=0)
    args = parser.parse_args()
    if args.role == "engine":
        return run_engine(args.address)
    if args.role == "server":
        return run_server(args.port, args.api_servers)
    print(json.dumps(measure(args)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
