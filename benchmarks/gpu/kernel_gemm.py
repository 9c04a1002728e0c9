"""Products of few tokens: cuBLAS against the plans of octavo.kernels.triton.skinny_gemm, on one Hopper GPU.

    PYTHONPATH=src python benchmarks/gpu/kernel_gemm.py [--out FILE] [--seconds 60]

First every plan is checked against float32. Then: bfloat16 and FP8 weights at several numbers of tokens (graph replay
over copies of the weight that outgrow L2), and a chain of decoder layers. Exits 1 if a result was wrong.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from octavo.kernels.triton import skinny_gemm
from octavo.kernels.triton.fp8 import quantize_fp8
from octavo.kernels.triton.skinny_gemm import GemmPlan, skinny_linear, skinny_linear_fp8
from octavo.quantization.fp8 import quantize_channels

LLAMA = {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)}
LARGE = {
    "70b qkv": (10240, 8192),
    "70b o": (8192, 8192),
    "70b gate_up": (57344, 8192),
    "70b down": (8192, 28672),
}
SHAPES = {f"llama3-8b {name}": shape for name, shape in LLAMA.items()} | {
    "llama3-8b lm_head": (128256, 4096),
    "qwen3-0.6b qkv": (4096, 1024),
    "qwen3-0.6b o": (1024, 2048),
    "qwen3-0.6b gate_up": (6144, 1024),
    "qwen3-0.6b down": (1024, 3072),
    "qwen3-0.6b lm_head": (151936, 1024),
}
FP8 = LLAMA | LARGE
ODD = [(1, 100, 576), (3, 1536, 576), (2, 960, 1536), (16, 4104, 4096), (33, 576, 1536), (64, 576, 576)]
TOKENS = (1, 4, 8, 16, 32, 64)
NUM_SMS = 132
ROTATED_BYTES = 256 << 20  # of weight copies, several times the L2
DEVICE = torch.device("cuda")
problems: list[str] = []


def splits(tiles: int, steps: int, *programs_per_sm: float) -> list[int]:
    """K splits that give about so many programs on a multiprocessor, each with at least three steps."""
    wanted = (max(1, min(round(NUM_SMS * each / tiles), max(1, steps // 3), 16)) for each in programs_per_sm)
    return sorted(set(wanted))


def plans(m: int, n: int, k: int, element_size: int) -> Iterator[GemmPlan]:
    """What is tried. FP8 tiles are twice as wide for the same bytes."""
    wide = 2 // element_size
    kinds: list[tuple[Any, ...]]
    if element_size == 2:
        kinds = [("dot", 64, 128, 4, 4, True), ("dot", 64, 64, 4, 6, True), ("dot", 128, 64, 4, 5, True)]
        kinds += [("dot", 64, 128, 4, 4, False), ("dot", 32, 128, 4, 5, False)]
    else:
        kinds = [("dot", 64, 128, 4, 4, False), ("dot", 32, 128, 4, 4, False), ("dot", 64, 64, 4, 6, True)]
        kinds += [("dot", 64, 128, 4, 4, True)]
    if m <= 2:
        kinds += [("fma", 16, 256, 4, 5, True), ("fma", 8, 512, 4, 4, True), ("fma", 4, 1024, 4, 4, True)]
    for kind, block_n, block_k, warps, stages, swap in kinds:
        block_k *= wide
        tiles, steps = -(-n // block_n), -(-k // block_k)
        if block_k <= k:
            for split in splits(tiles, steps, 1, 2, 3.9):
                yield GemmPlan(kind, block_n, block_k, split, warps, stages, swap)


def short(plan: GemmPlan) -> str:
    side = "" if plan.kind == "fma" else "w" if plan.swap else "x"
    return f"{plan.kind[0]}{side}{plan.block_n}x{plan.block_k}/{plan.split_k} {plan.num_stages}st"


def attempt(name: str, call: Callable[[], Any]) -> Any:
    """What it returns; None, and a line said, if it fails."""
    try:
        return call()
    except Exception as error:
        message = " ".join(str(error).split())[:140]
        if not any(message in said for said in problems):
            problems.append(f"failed: {name}: {type(error).__name__}: {message}")
        return None


def replay_us(calls: list[Callable[[], Any]], repeats: int = 5) -> float:
    """Median time of one of the calls, captured one after another in a graph.

    A replay ahead of the timed one keeps the GPU busy while that is launched.
    """
    calls = calls * -(-12 // len(calls)) if len(calls) > 1 else calls
    calls[0]()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [call() for call in calls]
    times = []
    for _ in range(repeats):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        graph.replay()
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1000 / len(calls))
    del kept
    return statistics.median(times)


def weights(n: int, k: int) -> list[Tensor]:
    copies = max(2, -(-ROTATED_BYTES // (n * k * 2)))
    first = torch.randn(n, k, device=DEVICE, dtype=torch.bfloat16).mul_(k**-0.5)
    return [first, *(first.clone() for _ in range(copies - 1))]


def check(name: str, got: Tensor, expected: Tensor) -> bool:
    """expected: float32, of unit variance."""
    error = (got.float() - expected).abs()
    good = bool((error <= expected.abs() * 2**-7 + 4e-3).all())
    if not good:
        problems.append(f"WRONG: {name}: max error {error.max().item():.3g}")
    return good


def right(name: str, call: Callable[[Tensor], Tensor], expected: Tensor) -> bool:
    """Whether a product is right twice over, into memory full of NaN (the second finds the counters as left)."""
    for _ in range(2):
        out = torch.full(expected.shape, float("nan"), device=DEVICE, dtype=torch.bfloat16)
        if attempt(name, lambda out=out: call(out)) is None or not check(name, out, expected):
            return False
    return True


def odd_shapes() -> None:
    for m, n, k in ODD:
        x, (weight, *_) = torch.randn(m, k, device=DEVICE, dtype=torch.bfloat16), weights(n, k)
        bias = torch.randn(n, device=DEVICE, dtype=torch.bfloat16)
        expected = F.linear(x.float(), weight.float(), bias.float())
        right(f"default {m, n, k}", partial(skinny_linear, x, weight, bias), expected)
        packed, scale = quantize_channels(weight)
        expected = F.linear(x.float(), packed.float() * scale[:, None], bias.float())
        right(f"fp8 default {m, n, k}", partial(skinny_linear_fp8, x, packed, scale, bias), expected)


def compile_all() -> None:
    """Launch every plan of every shape once, on threads, so that compilers run side by side."""
    jobs: dict[tuple[Any, ...], Callable[[], Any]] = {}
    for n, k in (SHAPES | LARGE).values():
        weight = torch.zeros(n, k, device=DEVICE, dtype=torch.bfloat16)
        packed, scale = weight.to(torch.float8_e4m3fn), torch.ones(n, device=DEVICE)
        for m in TOKENS:
            x = torch.zeros(m, k, device=DEVICE, dtype=torch.bfloat16)
            for plan in plans(m, n, k, 2) if (n, k) in SHAPES.values() else ():
                key = (plan, max(m, 16) if plan.kind == "dot" else m, k % plan.block_k == 0, 2)
                jobs.setdefault(key, lambda x=x, w=weight, p=plan: skinny_linear(x, w, plan=p))
            for plan in plans(m, n, k, 1) if (n, k) in FP8.values() and m in (1, 16, 64) else ():
                key = (plan, max(m, 16) if plan.kind == "dot" else m, k % plan.block_k == 0, 1)
                jobs.setdefault(key, lambda x=x, w=packed, s=scale, p=plan: skinny_linear_fp8(x, w, s, plan=p))
    skinny_gemm._workspace(torch.device("cuda", torch.cuda.current_device()))
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda item: attempt(short(item[0][0]), item[1]), jobs.items()))
    torch.cuda.synchronize()
    print(f"{len(jobs)} kernels compiled")


def best_of(name: str, m: int, copies: list[tuple[Any, ...]], expected: Tensor) -> dict[str, Any]:
    """Time every plan of a product. copies: arguments (weight) or (weight, scale)."""
    weight = copies[0][0]
    n, k = weight.shape
    x = expected_x[m, k]
    product = skinny_linear if len(copies[0]) == 1 else skinny_linear_fp8
    times: dict[str, float] = {}
    found: tuple[float, GemmPlan | None] = (float("inf"), None)
    for plan in plans(m, n, k, weight.element_size()):
        label = f"{name} M={m} {short(plan)}"
        if not right(label, lambda out, p=plan: product(x, *copies[0], out=out, plan=p), expected):
            continue
        calls = [lambda a=a, p=plan: product(x, *a, plan=p) for a in copies]
        us = attempt(label, lambda calls=calls: replay_us(calls))
        if us is not None:
            times[short(plan)] = us
            found = min(found, (us, plan), key=lambda pair: pair[0])
    us, plan = found
    return {"us": us, "plan": plan, "all": times}


expected_x: dict[tuple[int, int], Tensor] = {}  # (M, K) -> the tokens of all products of that size


def bf16_table(deadline: float) -> dict[str, Any]:
    print("bf16: M cuBLAS us > best us (TB/s of the weight), plan [d: dot, w/x: left operand, f: fma]")
    table: dict[str, Any] = {}
    for name, (n, k) in SHAPES.items():
        copies, cells = weights(n, k), []
        for m in TOKENS:
            if time.monotonic() > deadline:
                problems.append(f"skipped: {name} M={m}")
                continue
            x = expected_x.setdefault((m, k), torch.randn(m, k, device=DEVICE, dtype=torch.bfloat16))
            expected = F.linear(x.float(), copies[0].float())
            cublas = replay_us([partial(F.linear, x, w) for w in copies])
            entry = best_of(name, m, [(w,) for w in copies], expected) | {"cublas_us": cublas}
            table[f"{name} M={m}"] = entry
            plan, us = entry["plan"], entry["us"]
            rate = n * k * 2 / us / 1e6
            said = "none" if plan is None else f"{us:.1f} ({rate:.2f}) {short(plan)}"
            cells.append(f"{m}: {cublas:.1f} > {said}")
        for half in (cells[:3], cells[3:]):
            print(f"{name:18} " + " | ".join(half), flush=True)
        del copies
    return table


def fp8_table(deadline: float) -> dict[str, Any]:
    print(
        "fp8: M bf16 F.linear us / quantize_fp8 + _scaled_mm us / _scaled_mm us / a scale a tensor us > best us (TB/s)"
    )
    table: dict[str, Any] = {}
    for name, (n, k) in FP8.items():
        wide, cells = weights(n, k), []
        packed, scale = quantize_channels(wide[0])
        copies = [(packed, scale), *((packed.clone(), scale) for _ in range(2 * len(wide) - 1))]
        for m in (1, 16, 64, 256, 2048):
            if time.monotonic() > deadline:
                problems.append(f"skipped: fp8 {name} M={m}")
                continue
            x = expected_x.setdefault((m, k), torch.randn(m, k, device=DEVICE, dtype=torch.bfloat16))
            entry: dict[str, Any] = {"linear_us": replay_us([partial(F.linear, x, w) for w in wide[:8]])}
            quantized, x_scale = quantize_fp8(x)

            def scaled(weight: Tensor, q: Tensor, s: Tensor, scale: Tensor = scale) -> Tensor:
                return torch._scaled_mm(
                    q, weight.t(), scale_a=s, scale_b=scale[None], out_dtype=torch.bfloat16, use_fast_accum=True
                )

            expected = F.linear(x.float(), packed.float() * scale[:, None])
            got = attempt(f"_scaled_mm {name} M={m}", lambda q=quantized, s=x_scale, p=packed: scaled(p, q, s))
            if got is not None:
                relative = ((got.float() - expected).norm() / expected.norm()).item()
                if not relative < 0.06:
                    problems.append(f"WRONG: _scaled_mm {name} M={m}: {relative:.3f}")
                used = copies[:16]
                entry["scaled_us"] = replay_us([lambda a=a, q=quantized, s=x_scale: scaled(a[0], q, s) for a in used])
                entry["both_us"] = replay_us([lambda a=a, x=x: scaled(a[0], *quantize_fp8(x)) for a in used])
            if m >= 256:
                one = torch.ones((), device=DEVICE)
                entry["tensor_us"] = replay_us(
                    [
                        lambda a=a, q=quantized, one=one: torch._scaled_mm(
                            q, a[0].t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True
                        )
                        for a in used
                    ]
                )
            said = ""
            if m <= 64:
                entry |= best_of(f"fp8 {name}", m, copies, expected)
                if entry["plan"] is not None:
                    said = f" > {entry['us']:.1f} ({n * k / entry['us'] / 1e6:.2f}) {short(entry['plan'])}"
            table[f"{name} M={m}"] = entry
            numbers = "/".join(
                f"{entry.get(key, float('nan')):.1f}" for key in ("linear_us", "both_us", "scaled_us", "tensor_us")
            )
            cells.append(f"{m}: {numbers}{said}")
        for part in (cells[:2], cells[2:]):
            print(f"{name:8} " + " | ".join(part), flush=True)
    return table


def chain(m: int, chosen: dict[str, Any], num_layers: int = 8) -> dict[str, Any]:
    """Decoder layers without what lies between their products: us a layer."""
    layers = [
        {name: torch.randn(n, k, device=DEVICE, dtype=torch.bfloat16).mul_(k**-0.5) for name, (n, k) in LLAMA.items()}
        for _ in range(num_layers)
    ]
    x = torch.randn(m, 4096, device=DEVICE, dtype=torch.bfloat16)
    picked = {name: chosen.get(f"llama3-8b {name} M={m}", {}).get("plan") for name in LLAMA}

    def run(multiply: Callable[[str, Tensor, Tensor], Tensor]) -> Tensor:
        hidden = x
        for layer in layers:
            attended = multiply("qkv", hidden, layer["qkv"])[:, :4096]
            inner = multiply("gate_up", multiply("o", attended, layer["o"]), layer["gate_up"])
            hidden = multiply("down", inner[:, :14336], layer["down"])
        return hidden

    def skinny() -> Tensor:
        return run(lambda name, x, w: skinny_linear(x, w, plan=picked[name]))

    ways = {"cublas": lambda: run(lambda _, x, w: F.linear(x, w)), "skinny": skinny}
    result: dict[str, Any] = {}
    expected = skinny()
    for name, call in ways.items():
        us = attempt(f"chain {name}", lambda call=call: replay_us([call], 9))
        result[name] = us and us / num_layers
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = skinny()
    for _ in range(50):  # bits: the sums are taken in the same order
        got.fill_(float("nan"))
        graph.replay()
        if not torch.equal(got, expected):
            problems.append(f"WRONG: chain M={m}: a replay differs")
            break
    num_bytes = sum(n * k * 2 for n, k in LLAMA.values())
    said = (f"{name} {us:.1f} us ({num_bytes / us / 1e6:.2f} TB/s)" for name, us in result.items() if us)
    print(f"chain of {num_layers} layers, M={m}, a layer: " + ", ".join(said), flush=True)
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", help="write the table as JSON")
    parser.add_argument("--seconds", type=float, default=60, help="measure no further shape after this time")
    parser.add_argument("--only-fp8", action="store_true", help="leave out the products of bfloat16 weights")
    arguments = parser.parse_args()
    began = time.monotonic()
    deadline = began + arguments.seconds
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = False
    print(torch.cuda.get_device_name(), torch.__version__)
    compile_all()
    odd_shapes()
    print(f"{time.monotonic() - began:.0f} s for compiling and odd shapes", flush=True)
    bf16: dict[str, Any] = {}
    chains: dict[int, Any] = {}
    if not arguments.only_fp8:
        bf16 = bf16_table(deadline - 15)
        chains = {m: attempt(f"chain M={m}", lambda m=m: chain(m, bf16)) for m in (1, 16)}
    fp8 = fp8_table(deadline)
    for line in problems[:12]:
        print(line)
    if arguments.out:
        table = {"device": torch.cuda.get_device_name(), "bf16": bf16, "fp8": fp8, "chain": chains, "said": problems}
        with open(arguments.out, "w") as file:
            json.dump(table, file, indent=1, default=str)
    print(f"{time.monotonic() - began:.0f} s, {len(problems)} problems")
    return int(any(line.startswith("WRONG") for line in problems))


if __name__ == "__main__":
    sys.exit(main())
