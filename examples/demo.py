"""Start a server on a small model, send it 16 chats at once with the `openai` client, print the answers as they come.

python examples/demo.py [MODEL]
"""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field

from openai import AsyncOpenAI

READY_WITHIN = 120.0  # seconds from start to /health
STOP_WITHIN = 10.0  # seconds from SIGTERM to SIGKILL
MAX_TOKENS = 64
LINE_WIDTH = 100
QUESTIONS = (
    "Where is the Eiffel Tower?",
    "Name three primary colours.",
    "Why is the sky blue?",
    "Write a haiku about the sea.",
    "What does a compiler do?",
    "How many legs does a spider have?",
    "Give me one tip for learning to cook.",
    "What is photosynthesis?",
    "Who wrote Romeo and Juliet?",
    "What is 2 plus 2?",
    "Say hello in French.",
    "What is a prime number?",
    "What is the largest ocean on Earth?",
    "What is bread made of?",
    "Describe a cat in one sentence.",
    "What should I pack for a day at the beach?",
)


@dataclass
class Chat:
    """One streamed chat. Times in seconds; `pending` is text that does not fill a line yet."""

    number: int
    start: float = field(default_factory=time.perf_counter)
    ttft: float | None = None
    num_tokens: int = 0
    pending: str = ""

    def write(self, text: str, *, last: bool = False) -> None:
        """Print what fills a line, each with the chat's number before it, and keep the rest."""
        *ended, self.pending = (self.pending + text).split("\n")
        for line in ended:
            self._print(self._print_full(line))
        self.pending = self._print_full(self.pending)
        if last:
            self._print(self.pending)

    def _print_full(self, line: str) -> str:
        """Print as many full lines as there are in `line`; returns the rest of it."""
        while len(line) > LINE_WIDTH:
            space = line.rfind(" ", 1, LINE_WIDTH)
            cut = space if space > 0 else LINE_WIDTH
            self._print(line[:cut])
            line = line[cut:].lstrip()
        return line

    def _print(self, line: str) -> None:
        if line.strip():
            print(f"[{self.number:2}] {line}", flush=True)


async def ask(client: AsyncOpenAI, model: str, number: int, question: str) -> Chat:
    """Stream one answer to the terminal."""
    chat = Chat(number)
    stream = await client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": question}],
        max_tokens=MAX_TOKENS,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    async for chunk in stream:
        if chunk.choices and (text := chunk.choices[0].delta.content):
            chat.ttft = chat.ttft or time.perf_counter() - chat.start
            chat.write(text)
        if chunk.usage is not None:
            chat.num_tokens = chunk.usage.completion_tokens
    chat.write("", last=True)
    return chat


async def ask_all(base_url: str) -> None:
    """Send every question at once, then print what the server did in numbers."""
    async with AsyncOpenAI(base_url=f"{base_url}/v1", api_key="none", max_retries=0) as client:
        model = (await client.models.list()).data[0].id
        for number, question in enumerate(QUESTIONS, 1):
            print(f"[{number:2}] > {question}")
        start = time.perf_counter()
        watch = asyncio.create_task(peak_kv_use(base_url))
        chats = await asyncio.gather(*(ask(client, model, *pair) for pair in enumerate(QUESTIONS, 1)))
        seconds = time.perf_counter() - start
        watch.cancel()
        peak = await watch
    ttfts = sorted(chat.ttft for chat in chats if chat.ttft is not None)
    if len(ttfts) < len(chats):
        raise SystemExit(f"{len(chats) - len(ttfts)} of {len(chats)} chats brought no text")
    num_tokens = sum(chat.num_tokens for chat in chats)
    print(f"\n{len(chats)} chats at once, {num_tokens} tokens in {seconds:.1f} s: {num_tokens / seconds:.0f} tokens/s")
    print(f"time to first token: p50 {ttfts[len(ttfts) // 2]:.2f} s, p90 {ttfts[int(len(ttfts) * 0.9)]:.2f} s")
    print(f"KV cache in use at the peak: {peak:.1%}")


async def peak_kv_use(base_url: str) -> float:
    """Watch /metrics until cancelled; returns the largest share of the KV cache in use."""
    peak = 0.0
    try:
        while True:
            text = await asyncio.to_thread(get, f"{base_url}/metrics")
            match = re.search(r"^\w+:kv_cache_usage_perc(?:\{[^}]*\})? (\S+)$", text, re.MULTILINE)
            if match is None:
                raise RuntimeError("/metrics does not report kv_cache_usage_perc")
            peak = max(peak, float(match[1]))
            await asyncio.sleep(0.1)
    except asyncio.CancelledError:
        return peak


def get(url: str) -> str:
    with urllib.request.urlopen(url, timeout=10) as response:
        return str(response.read().decode())


def wait_ready(server: subprocess.Popen[bytes], base_url: str) -> float:
    """Poll /health until it answers 200; returns the seconds it took. Raises RuntimeError if it does not come up."""
    start = time.perf_counter()
    while (waited := time.perf_counter() - start) < READY_WITHIN:
        if server.poll() is not None:
            raise RuntimeError(f"the server ended with exit code {server.returncode}")
        try:
            get(f"{base_url}/health")
            return waited
        except (urllib.error.URLError, OSError):
            time.sleep(0.05)
    raise RuntimeError(f"the server was not ready within {READY_WITHIN:.0f} s")


def stop(server: subprocess.Popen[bytes]) -> None:
    """SIGTERM, then SIGKILL to the process group; the server's own children end with it."""
    if server.poll() is None:
        server.terminate()
    try:
        server.wait(STOP_WITHIN)
    except subprocess.TimeoutExpired:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def main() -> int:
    model = sys.argv[1] if len(sys.argv) > 1 else "smollm2"
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that `finally` runs
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    base_url = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryFile() as log:
        command = [sys.executable, "-m", "octavo.cli", "serve", model, "--port", str(port)]
        server = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        try:
            print(f"octavo serve {model}: ready after {wait_ready(server, base_url):.1f} s at {base_url}\n")
            asyncio.run(ask_all(base_url))
        except Exception as error:
            log.seek(0)
            print(log.read().decode(errors="replace")[-4000:], file=sys.stderr)
            print(f"demo: error: {error}", file=sys.stderr)
            return 1
        finally:
            stop(server)
    return 0


if __name__ == "__main__":
    sys.exit(main())
