"""Products of FP8 tokens by FP8 weights (W8A8): plans of octavo.kernels.triton.fp8_gemm against torch._scaled_mm.

    PYTHONPATH=src python benchmarks/gpu/kernel_fp8.py [--out FILE] [--seconds 120] [--tokens 24 64 ...]

Graph replay over copies of the weight that outgrow L2, microseconds of one product. Every plan's product is compared
with the library's first. Exits 1 if a result was wrong.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import chain

import torch
from kernel_gemm import DEVICE, LARGE, LLAMA, ROTATED_BYTES, attempt, problems, replay_us
from torch import Tensor

from octavo.kernels.triton import fp8_gemm
from octavo.kernels.triton.fp8 import quantize_fp8
from octavo.kernels.triton.fp8_gemm import Fp8Plan, linear_fp8

SMALL = {"0.6b qkv": (4096, 1024), "0.6b o": (1024, 2048), "0.6b gate_up": (6144, 1024), "0.6b down": (1024, 3072)}
TOKENS = (24, 32, 48, 64, 96, 128, 160, 192, 224, 256, 320, 384)
NUM_SMS = 132
SIDES = ((32, 0), (64, 0), (64, 32), (128, 0), (128, 64), (256, 0))


def plans(m: int, n: int, k: int) -> Iterator[Fp8Plan]:
    """What is tried: tiles that no product of so many tokens leaves mostly empty, with as many stages as fit once or
    twice into a multiprocessor's shared memory."""
    for tokens, more in SIDES:
        side = tokens + more
        if (side >= 2 * m and side > 64) or -(-m // side) > 4:
            continue
        for rows, warps in ((64, 4), (128, 4), (128, 8), (256, 8)):
            if rows * side // (warps * 32) > 128 or ((rows, warps) == (128, 8) and side < 128):
                continue
            for block_k in (128, 256):
                programs = -(-n // rows) * -(-m // side)
                fits = {min(8, room * 1024 // ((rows + side) * block_k)) for room in (226, 113)}
                splits = [s for s in (1, 2, 4) if s == 1 or (programs * s <= NUM_SMS and k >= 8 * block_k * s)]
                for stages in sorted(s for s in fits if s >= 3):
                    yield from (Fp8Plan(rows, tokens, more, block_k, s, warps, stages) for s in splits)


def compile_plan(plan: Fp8Plan) -> None:
    k = plan.block_k * plan.split_k
    x, weight = (torch.zeros(size, k, device=DEVICE).to(torch.float8_e4m3fn) for size in (32, 512))
    scales = torch.ones(32, 1, device=DEVICE), torch.ones(512, device=DEVICE)
    attempt(f"compiling {plan}", lambda: linear_fp8(x, scales[0], weight, scales[1], plan=plan))


def short(plan: Fp8Plan) -> str:
    rows, tokens, more, block_k, split_k, num_warps, num_stages = plan
    return f"{rows}x{tokens}{f'+{more}' if more else ''} k{block_k}/{split_k} {num_warps}w{num_stages}st"


def product(x: Tensor, x_scale: Tensor, scale: Tensor, plan: Fp8Plan, weight: Tensor) -> Tensor:
    return linear_fp8(x, x_scale, weight, scale, plan=plan)


def measure(name: str, m: int, weights: list[Tensor], scale: Tensor, deadline: float) -> dict[str, object]:
    """The library's time, that of the plan in use, and of all plans, the fastest first."""
    n, k = weights[0].shape
    x, x_scale = quantize_fp8(torch.randn(m, k, device=DEVICE, dtype=torch.bfloat16))

    def library(weight: Tensor) -> Tensor:
        scales = {"scale_a": x_scale, "scale_b": scale[None, :]}
        return torch._scaled_mm(x, weight.t(), **scales, out_dtype=torch.bfloat16, use_fast_accum=True)

    expected, found = library(weights[0]).double(), {}
    used = Fp8Plan.of(m, n, k, DEVICE)
    for plan in dict.fromkeys(chain([used] if used else [], plans(m, n, k))):
        if time.monotonic() > deadline:
            break
        call = partial(product, x, x_scale, scale, plan)
        got = attempt(f"{name} {m} {plan}", partial(call, weights[0]))
        if got is None:
            continue
        error = ((got.double() - expected).norm() / expected.norm()).item()
        if not error < 8e-3:
            problems.append(f"WRONG: {name}, {m} tokens, {plan}: relative error {error:.3g}")
            continue
        found[plan] = replay_us([partial(call, weight) for weight in weights], 3)
    ranked = sorted(found.items(), key=lambda entry: entry[1])
    base = replay_us([partial(library, weight) for weight in weights], 3)
    own = f"{found[used]:.1f}" if used in found else "-"
    best = "  ".join(f"{us:.1f} {short(plan)}" for plan, us in ranked[:4])
    print(f"{name:12} {m:4} tokens  library {base:6.1f}  in use {own:>6}  | {best}", flush=True)
    return {"name": name, "tokens": m, "library": base, "used": used, "plans": ranked}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out")
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    args = parser.parse_args()
    deadline = time.monotonic() + args.seconds
    shapes = LLAMA | LARGE | SMALL
    fp8_gemm._workspace(torch.device("cuda", torch.cuda.current_device()))
    tried = {plan for n, k in shapes.values() for m in args.tokens for plan in plans(m, n, k)}
    with ThreadPoolExecutor(14) as pool:
        list(pool.map(compile_plan, sorted(tried)))
    rows = []
    for name, (n, k) in shapes.items():
        first = (torch.randn(n, k, device=DEVICE) * 30).to(torch.float8_e4m3fn)
        weights = [first, *(first.clone() for _ in range(max(1, -(-ROTATED_BYTES // (n * k)) - 1)))]
        scale = torch.rand(n, device=DEVICE) * k**-0.5 / 30
        rows += [measure(name, m, weights, scale, deadline) for m in args.tokens if time.monotonic() < deadline]
        del first, weights
    if args.out:
        with open(args.out, "w") as file:
            json.dump(rows, file)
    print("\n".join(problems))
    return any(problem.startswith("WRONG") for problem in problems)


if __name__ == "__main__":
    sys.exit(main())
