"""How fast weights reach a GPU: a safetensors file through octavo.loading.device_stream, cold and from the page cache.

    PYTHONPATH=src python benchmarks/gpu/load_speed.py [--gigabytes 4] [--folder /tmp] [--out FILE]

The tensors are checked against what was written first. Exits 1 if one differs.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from octavo.loading.device_stream import StreamLimits, read_header, stream_tensors
from octavo.loading.weights import safetensors_weights

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LIMITS = {
    "4 threads, 8 MiB": StreamLimits(num_threads=4),
    "8 threads, 8 MiB": StreamLimits(),
    "8 threads, 32 MiB": StreamLimits(buffer_bytes=32 << 20),
    "14 threads, 8 MiB": StreamLimits(num_threads=14),
}


def write(path: Path, gigabytes: float) -> dict[str, torch.Tensor]:
    """Tensors of the sizes of a Llama 3 8B layer, and small ones between them."""
    state: dict[str, torch.Tensor] = {}
    left = int(gigabytes * 1e9)
    while left > 0:
        rows = min(14336, max(1, left // 8192))
        index = len(state)
        state[f"layers.{index}.weight"] = torch.randint(-(2**31), 2**31 - 1, (rows, 2048), dtype=torch.int32)
        state[f"layers.{index}.norm.weight"] = torch.full((4096,), float(index), dtype=torch.bfloat16)
        left -= rows * 8192
    save_file(state, path)
    return state


def drop_cache(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def load_seconds(path: Path, limits: StreamLimits) -> float:
    """Into place, as a model is filled: every tensor is copied once more on the device."""
    place = torch.empty(1 << 28, dtype=torch.uint8, device=DEVICE)
    began = time.perf_counter()
    for _, tensor in stream_tensors(read_header(path), DEVICE, limits):
        place[: tensor.nbytes].copy_(tensor.view(-1).view(torch.uint8))
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def mapped_seconds(path: Path) -> float:
    """The same by way of mapped tensors, pageable copies."""
    place = torch.empty(1 << 28, dtype=torch.uint8, device=DEVICE)
    began = time.perf_counter()
    for _, tensor in safetensors_weights((path,)):
        place[: tensor.nbytes].copy_(tensor.view(-1).view(torch.uint8))
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=4)
    parser.add_argument("--folder", default=tempfile.gettempdir())
    parser.add_argument("--out", help="write the table as JSON")
    arguments = parser.parse_args()
    path = Path(arguments.folder) / "octavo-load-speed.safetensors"
    try:
        state = write(path, arguments.gigabytes)
        size = path.stat().st_size
        wrong = [
            name
            for name, tensor in stream_tensors(read_header(path), DEVICE)
            if not torch.equal(tensor, state[name].to(DEVICE))
        ]
        if wrong:
            print(f"WRONG: {len(wrong)} tensors differ, first {wrong[0]}")
            return 1
        del state
        table: dict[str, float] = {}
        drop_cache(path)
        table["cold (best effort), 8 threads, 8 MiB"] = size / load_seconds(path, StreamLimits()) / 1e9
        for name, limits in LIMITS.items():
            table[f"warm, {name}"] = size / min(load_seconds(path, limits) for _ in range(2)) / 1e9
        table["warm, mapped"] = size / mapped_seconds(path) / 1e9
        print(f"{size / 1e9:.2f} GB to {DEVICE}")
        for name, rate in table.items():
            print(f"{name:40} {rate:6.2f} GB/s")
        if arguments.out:
            Path(arguments.out).write_text(json.dumps(table, indent=1))
    finally:
        path.unlink(missing_ok=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
