"""Products by packed weights (W4A16, W8A16) against cuBLAS on bfloat16 weights, on one Hopper GPU.

    PYTHONPATH=src python benchmarks/gpu/kernel_grouped.py [--out FILE] [--seconds 120] [--tokens 1 16 ...]
        [--cases "nf4 g64" ...]

Every plan is checked against the dequantized weight in float32 and then timed, over copies of the weight that outgrow
L2. Exits 1 if a result was wrong.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from kernel_gemm import DEVICE, LLAMA, ROTATED_BYTES, attempt, problems, replay_us, splits
from torch import Tensor

from octavo.kernels.triton import skinny_gemm
from octavo.kernels.triton.grouped_gemm import GroupedPlan, dequantize_grouped, grouped_linear
from octavo.quantization.four_bit import TABLES
from octavo.quantization.grouped import Codes, GroupedWeight, chunk_size, weight_of

TOKENS = (1, 4, 8, 16, 32, 64, 128, 256, 512)
# Bits, columns of a group, what there is besides scales.
CASES = {"awq g128": (4, 128, "zeros"), "int8 g128": (8, 128, ""), "q4 g32": (4, 32, ""), "nf4 g64": (4, 64, "table")}


def plans(m: int, n: int, num_chunks: int) -> Iterator[GroupedPlan]:
    """What is tried for so many tokens."""
    if m <= 16:
        block_m = 8 if m <= 8 else 16
        shapes = [(32, 1, 8, 1), (64, 1, 6, 1), (64, 2, 6, 1), (64, 2, 4, 2), (128, 2, 4, 1), (128, 2, 6, 1)]
        shapes += [(64, 1, 4, 2), (32, 2, 8, 1), (128, 2, 3, 2), (32, 1, 5, 2)]
        for block_n, warps, stages, unroll in shapes:
            for split in splits(-(-n // block_n), num_chunks, 2, 4, 8):
                yield GroupedPlan(block_m, block_n, split, warps, stages, True, unroll=unroll)
        return
    shapes = [(64, 128, 4, 4), (64, 128, 8, 4), (128, 128, 8, 4), (128, 128, 4, 4), (256, 128, 8, 3), (256, 64, 4, 3)]
    shapes += [(32, 64, 2, 5), (32, 128, 4, 4), (32, 64, 4, 5), (32, 128, 2, 4)] if m <= 64 else []
    for block_m, block_n, warps, stages in shapes:
        if block_m > max(2 * m, 32):
            continue
        tiles = -(-n // block_n) * -(-m // block_m)
        for split in splits(tiles, num_chunks, 1, 2):
            for first in (True, False) if block_m <= 64 else (True,):
                yield GroupedPlan(block_m, block_n, split, warps, stages, True, first)


def weight(n: int, k: int, bits: int, group_size: int, kind: str) -> GroupedWeight:
    chunk = chunk_size(bits, group_size, k)
    assert chunk is not None
    code = torch.randint(0, 1 << bits, (n, k), dtype=torch.uint8, device=DEVICE)
    groups = n, k // group_size
    if kind == "table":
        scale = (torch.rand(groups, device=DEVICE) + 0.5) * k**-0.5
        table = torch.tensor(TABLES["nf4"], device=DEVICE)
        return weight_of(Codes(code, scale, table=table), bits, group_size, chunk)
    spread = k**-0.5 / (1 << bits) * 3.4
    scale = ((torch.rand(groups, device=DEVICE) + 0.5) * spread).half()
    zero = torch.randint(5, 12, groups, dtype=torch.uint8, device=DEVICE) if kind == "zeros" else None
    return weight_of(Codes(code, scale, zero), bits, group_size, chunk)


def short(plan: GroupedPlan) -> str:
    kind = ("w" if plan.swap else "x") + ("s" if plan.scale_first else "")
    size = f"{plan.block_m}x{plan.block_n}/{plan.split_k}"
    return f"{kind}{size} {plan.num_warps}w{plan.num_stages}st{plan.unroll}u"


def wrong(name: str, got: Tensor, expected: Tensor) -> bool:
    relative = ((got.float() - expected).norm() / expected.norm()).item()
    if not relative < 4e-3:
        problems.append(f"WRONG: {name}: relative error {relative:.3g}")
    return not relative < 4e-3


def best(name: str, m: int, copies: list[GroupedWeight], x: Tensor, expected: Tensor) -> dict[str, Any]:
    """Time every plan of a product."""
    n, num_chunks = copies[0].packed.shape[1], copies[0].packed.shape[0]
    times: dict[str, float] = {}
    plan_of: dict[str, GroupedPlan] = {}
    for plan in plans(m, n, num_chunks):
        label = f"{name} M={m} {short(plan)}"
        got = attempt(label, lambda p=plan: grouped_linear(x, *copies[0][:5], plan=p))
        if got is None or wrong(label, got, expected):
            continue
        us = attempt(label, lambda p=plan: replay_us([partial(grouped_linear, x, *c[:5], plan=p) for c in copies]))
        if us is not None:
            times[short(plan)], plan_of[short(plan)] = us, plan
    found = min(times, key=lambda label: times[label], default=None)
    return {"us": times.get(found), "best": found, "plan": plan_of.get(found), "all": times}


def table(case: str, bits: int, group_size: int, kind: str, tokens: list[int], deadline: float) -> dict[str, Any]:
    print(f"{case}: M cuBLAS us > best us (TB/s of packed bytes; TFLOP/s) plan; default's us", flush=True)
    result: dict[str, Any] = {}
    for name, (n, k) in LLAMA.items():
        first = weight(n, k, bits, group_size, kind)
        size = first.packed.nbytes
        count = max(2, -(-ROTATED_BYTES // size))
        copies = [first, *(first._replace(packed=first.packed.clone()) for _ in range(count - 1))]
        wide = dequantize_grouped(*first[:5], torch.float32)
        narrow = [wide.bfloat16() for _ in range(max(2, ROTATED_BYTES // (2 * n * k)))]
        unpack = replay_us([partial(dequantize_grouped, *c[:5], torch.bfloat16) for c in copies])
        print(f"{name:8} dequantize {unpack:.1f} us ({(size + 2 * n * k) / unpack / 1e6:.2f} TB/s)")
        for m in tokens:
            if time.monotonic() > deadline:
                problems.append(f"skipped: {case} {name} M={m}")
                continue
            x = torch.randn(m, k, device=DEVICE, dtype=torch.bfloat16)
            entry = best(f"{case} {name}", m, copies, x, F.linear(x.float(), wide))
            entry["cublas_us"] = replay_us([partial(F.linear, x, w) for w in narrow])
            entry["default_us"] = replay_us([partial(grouped_linear, x, *c[:5]) for c in copies])
            result[f"{name} M={m}"] = entry
            us = entry["us"] or float("nan")
            rates = f"{size / us / 1e6:.2f}; {2 * m * n * k / us / 1e6:.0f}"
            print(
                f"{name:8} {m:4}: {entry['cublas_us']:.1f} > {us:.1f} ({rates}) {entry['best']}; "
                f"{entry['default_us']:.1f}",
                flush=True,
            )
        del copies, narrow, wide
    return result


def compile_all(tokens: list[int], cases: dict[str, tuple[int, int, str]]) -> None:
    """Launch every plan once, on threads, so that compilers run side by side."""
    jobs: dict[tuple[Any, ...], Any] = {}
    for case, (bits, group_size, kind) in cases.items():
        for n, k in LLAMA.values():
            made = weight(n, k, bits, group_size, kind)
            for m in tokens:
                x = torch.zeros(m, k, device=DEVICE, dtype=torch.bfloat16)
                for plan in plans(m, n, len(made.packed)):
                    jobs.setdefault((case, plan), partial(grouped_linear, x, *made[:5], plan=plan))
    skinny_gemm._workspace(torch.device("cuda", torch.cuda.current_device()))
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda item: attempt(f"{item[0][0]} {short(item[0][1])}", item[1]), jobs.items()))
    torch.cuda.synchronize()
    print(f"{len(jobs)} kernels compiled")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", help="write the table as JSON")
    parser.add_argument("--seconds", type=float, default=120, help="measure no further shape after this time")
    parser.add_argument("--tokens", type=int, nargs="+", default=list(TOKENS))
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=CASES)
    arguments = parser.parse_args()
    began = time.monotonic()
    torch.manual_seed(0)
    print(torch.cuda.get_device_name(), torch.__version__)
    cases = {case: CASES[case] for case in arguments.cases}
    compile_all(arguments.tokens, cases)
    print(f"{time.monotonic() - began:.0f} s for compiling", flush=True)
    tables: dict[str, Any] = {}
    for number, (case, numbers) in enumerate(cases.items()):
        tokens = arguments.tokens if number == 0 else [m for m in arguments.tokens if m in (1, 16, 256)]
        tables[case] = table(case, *numbers, tokens, began + arguments.seconds)
    for line in problems[:20]:
        print(line)
    if arguments.out:
        with open(arguments.out, "w") as file:
            json.dump({"device": torch.cuda.get_device_name(), **tables, "said": problems}, file, indent=1, default=str)
    print(f"{time.monotonic() - began:.0f} s, {len(problems)} problems")
    return int(any(line.startswith("WRONG") for line in problems))


if __name__ == "__main__":
    sys.exit(main())
