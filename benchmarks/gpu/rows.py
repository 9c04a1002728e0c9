#!/usr/bin/env python3
"""Measured rows: one JSON object a line, each with what it was measured on.

    python benchmarks/gpu/rows.py --section offline-8b --out results/gpu-rows.jsonl --command "…" FILE.jsonl

appends the rows of FILE.jsonl (as gpu_workloads.py writes them: an object with "workload" and metrics) to the output,
completed by section, stamp, GPU, versions, commit and command. `stamp` is the UTC time of the invocation, the same
for all its rows: report.py takes the rows of the latest stamp of each workload, and no others.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

Row = dict[str, Any]
ROOT = Path(__file__).resolve().parents[2]


def commit() -> str:
    """The commit that is measured: $GIT_COMMIT, else from git, else "unknown". "+" marks uncommitted changes."""
    if told := os.environ.get("GIT_COMMIT"):
        return told
    try:
        head = ["git", "-C", str(ROOT), "describe", "--always", "--exclude=*", "--dirty=+"]
        found = subprocess.run(head, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        found = ""
    return found or "unknown"


def machine() -> Row:
    """Where and with what: GPU name, versions, commit, date."""
    now = datetime.datetime.now(datetime.UTC)
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = "none"
    return {
        "stamp": now.isoformat(timespec="seconds"),
        "date": now.date().isoformat(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "torch": torch.__version__,
        "triton": triton,
        "python": platform.python_version(),
        "commit": commit(),
    }


def append(path: Path, section: str, command: str, rows: Iterable[Row]) -> list[Row]:
    """Complete the rows and append them to `path`. Returns them; raises ValueError if there are none."""
    facts = machine()
    full = [{"section": section, **facts, "command": command, **row} for row in rows]
    if not full:
        raise ValueError(f"section {section} brought no rows")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in full)
    return full


def read(path: Path) -> list[Row]:
    """The rows of a file. Raises OSError, and ValueError naming a line that is not JSON."""
    found = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{number} is not JSON: {error}") from error
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--section", required=True)
    parser.add_argument("--command", required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    added = append(args.out, args.section, args.command, (row for file in args.files for row in read(file)))
    print(f"{len(added)} rows of {args.section} added to {args.out}")


if __name__ == "__main__":
    main()
