#!/usr/bin/env python3
"""A server under load: `octavo serve` in a process of its own, serve_load.py as the clients.

    python benchmarks/gpu/served.py --model FOLDER --out FILE.jsonl [--rates 10,30,inf] [--seconds 20] [-- FLAG …]

FOLDER has config.json and a tokenizer; weights are random. What follows "--" goes to `octavo serve`. Rows: "server"
(seconds from the start of the process until /health answers 200), and one a rate, with the CPU time that the API
process took for each output token. Exit status 1 if a request fails, or if the server does not end with 0 on SIGTERM.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BENCHMARKS = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(BENCHMARKS))

from server_process import ServerProcess  # noqa: E402

READY_LIMIT_S = 300
LOAD_LIMIT_S = 420
_TICK_S = 1 / os.sysconf("SC_CLK_TCK")


def cpu_seconds(pid: int) -> float:
    """User and system time of a process so far, its threads included; see proc(5)."""
    # The second field, the command's name in parentheses, may hold spaces: count from its end.
    values = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(values[11]) + int(values[12])) * _TICK_S


def tree(pid: int) -> Iterator[int]:
    """A process and all its descendants."""
    yield pid
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            yield from tree(int(child))


def api_cpu_seconds(pid: int) -> float:
    """CPU time of the server's processes, without that of engines."""
    api = [p for p in tree(pid) if b"octavo.entrypoints.engine" not in Path(f"/proc/{p}/cmdline").read_bytes()]
    return sum(map(cpu_seconds, api))


def flat(row: dict[str, Any]) -> dict[str, Any]:
    """A row of serve_load.py with each percentile under a name of its own."""
    found = {"workload": f"rate-{float(row['rate']):g}", **row}
    for name in ("ttft", "itl", "e2e"):
        for percentile, value in zip((50, 90, 99), found.pop(f"{name}_ms_p50_p90_p99", None) or ()):
            found[f"{name}_p{percentile}_ms"] = value
    return found


def load(server: ServerProcess, model: str, rates: str, seconds: float) -> Iterator[dict[str, Any]]:
    """One row a rate, as each ends. Raises RuntimeError if the load itself fails."""
    command = [sys.executable, str(BENCHMARKS / "serve_load.py"), "--base-url", server.base_url, "--model", model]
    command += ["--rates", rates, "--seconds", str(seconds)]
    before = api_cpu_seconds(server.process.pid)
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as client:
        assert client.stdout is not None
        for line in client.stdout:
            row = flat(json.loads(line))
            after = api_cpu_seconds(server.process.pid)
            tokens = row["output_tok_s"] * (row["requests"] - row["failed"]) / max(row["requests_s"], 1e-9)
            if tokens:
                row["api_cpu_us_per_token"] = round((after - before) / tokens * 1e6, 2)
            before = after
            yield row
        if client.wait(LOAD_LIMIT_S):
            raise RuntimeError(f"serve_load.py ended with {client.returncode}")


def measure(args: argparse.Namespace, log: Path) -> list[dict[str, Any]]:
    """All rows. Raises RuntimeError if the server does not start, or does not end as it should."""
    began = time.monotonic()
    server = ServerProcess([args.model, "--load-format", "dummy", *args.flags], log)
    try:
        server.wait_ready(READY_LIMIT_S)
        rows = [{"workload": "server", "ready_s": round(time.monotonic() - began, 2)}]
        print(json.dumps(rows[0]), flush=True)
        for row in load(server, args.model, args.rates, args.seconds):
            rows.append(row)
            print(json.dumps(row), flush=True)
    finally:
        stopping = time.monotonic()
        status = server.stop(90)
    rows[0] |= {"stop_s": round(time.monotonic() - stopping, 2), "exit_status": status}
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--rates", default="10,30,inf")
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("flags", nargs="*", help="further flags of octavo serve, after --")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "server.log"
        try:
            rows = measure(args, log)
        except BaseException:
            print(log.read_text()[-4000:] if log.exists() else "no log", file=sys.stderr)
            raise
        failed = [row for row in rows if row.get("failed")]
        wrong = [f"{row['workload']}: {row['failed']} failed: {row['first_failure']}" for row in failed]
        if rows[0]["exit_status"]:
            wrong.append(f"the server ended with {rows[0]['exit_status']}")
        if wrong:
            print("\n".join(wrong), log.read_text()[-4000:], sep="\n", file=sys.stderr)
    # Rows with failed requests measured something else: they are not written.
    if wrong:
        return 1
    with args.out.open("a") as file:
        file.writelines(json.dumps({"model": Path(args.model).name, **row}) + "\n" for row in rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
