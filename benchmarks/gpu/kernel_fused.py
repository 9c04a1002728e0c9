"""The fused small kernels on a GPU: are they right, how fast are they, what does a launch cost the host?

    PYTHONPATH=src python benchmarks/gpu/kernel_fused.py [--out FILE]

Compares every kernel with its oracle (exit status 1 where one is wrong), then times it at the shapes of two models.
Cells are microseconds of one launch, the median of graphs of 20 that cycle through enough inputs not to live in L2;
"TB/s" is the traffic that a kernel cannot avoid over the time of the largest T. "host" is what one call costs the
calling thread. Rows with a variant launch the same kernel cut up in another way; "-" is what the engine calls.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from octavo.kernels.reference import activation as activation_reference
from octavo.kernels.reference import embedding as embedding_reference
from octavo.kernels.reference import fp8 as fp8_reference
from octavo.kernels.reference import norm as norm_reference
from octavo.kernels.reference import rope as rope_reference
from octavo.kernels.reference import step_inputs as step_inputs_reference
from octavo.kernels.triton import activation, embedding, fp8, norm, rope, step_inputs

DEVICE = torch.device("cuda")
BF16, FP8 = torch.bfloat16, torch.float8_e4m3fn
EPS = 1e-5
BLOCK_SIZE = 16
TABLE_ROWS = 128_000
TOKENS = (1, 8, 64, 256, 1024, 8192)
LAUNCHES = 20  # of one graph
REPLAYS = 7
ROTATED_BYTES = 256 << 20  # all inputs of a graph together; five times L2


@dataclass(frozen=True)
class Model:
    """The sizes that the kernels see."""

    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head_dim: int
    qk_norm: bool


MODELS = {
    "llama3-8b": Model(4096, 14336, 32, 8, 128, False),
    "qwen3-0.6b": Model(1024, 3072, 16, 8, 128, True),
    "smollm2-135m": Model(576, 1536, 9, 3, 64, False),
}
TIMED = ("llama3-8b", "qwen3-0.6b")


def randn(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.randn(*shape, device=DEVICE).to(dtype)


def rotation_of(tokens: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """Cosines and signed sines of random angles, [tokens, head_dim]."""
    angles = torch.randn(tokens, head_dim // 2, device=DEVICE).repeat(1, 2)
    sign = torch.where(torch.arange(head_dim, device=DEVICE) < head_dim // 2, -1, 1)
    return angles.cos().to(BF16), (angles.sin() * sign).to(BF16)


# --- are they right -------------------------------------------------------------------------------------------------


def poison(*sizes: tuple[int, torch.dtype]) -> None:
    """Leave NaN in the memory that the next allocations of these sizes get."""
    for size, dtype in sizes:
        torch.full((size,), float("nan"), device=DEVICE).to(dtype)


def distance(found: Tensor, expected: Tensor) -> float:
    """The largest difference, each measured against its value or, below 1 % of it, the largest value."""
    wide, other = ((t.float() if t.dtype == FP8 else t).double() for t in (found, expected))
    if not wide.isfinite().all():
        return float("inf")
    floor = other.abs().max() * 1e-2 + 1e-30
    return float(((wide - other).abs() / other.abs().maximum(floor)).max())


Checks = Iterator[tuple[str, float, float]]  # what, error, tolerance


def check_rows(model: Model, tokens: int) -> Checks:
    """Norm, activation and quantisation."""
    size, inner = model.hidden, model.inner
    for with_delta in (False, True):
        residual, weight = randn(tokens, size), randn(size)
        delta = randn(tokens, size) if with_delta else None
        total, normed = norm_reference.rms_norm(residual.clone(), delta, weight, EPS)
        _, quantised, scales = norm_reference.rms_norm_fp8(residual.clone(), delta, weight, EPS)
        other = residual.clone()
        poison((tokens * size, BF16), (tokens * size, FP8))
        yield "rms_norm", distance(norm.rms_norm(residual, delta, weight, EPS), normed), 2**-7
        yield "rms_norm residual", distance(residual, total), 0.0
        found, scale = norm.rms_norm_fp8(other, delta, weight, EPS)
        yield "rms_norm_fp8", distance(found, quantised), 2**-3
        yield "rms_norm_fp8 scale", distance(scale, scales), 2**-7
        yield "rms_norm_fp8 residual", distance(other, total), 0.0
    gate_up = randn(tokens, 2 * inner)
    poison((tokens * inner, BF16), (tokens * inner, FP8))
    expected = activation_reference.silu_and_mul(gate_up)
    yield "silu_and_mul", distance(activation.silu_and_mul(gate_up), expected), 2**-7
    quantised, scales = activation_reference.silu_and_mul_fp8(gate_up)
    found, scale = activation.silu_and_mul_fp8(gate_up)
    yield "silu_and_mul_fp8", distance(found, quantised), 2**-3
    yield "silu_and_mul_fp8 scale", distance(scale, scales), 2**-7
    x = randn(tokens, inner)
    quantised, scales = fp8_reference.quantize_fp8(x)
    found, scale = fp8.quantize_fp8(x)
    yield "quantize_fp8", distance(found, quantised), 2**-3
    yield "quantize_fp8 scale", distance(scale, scales), 1e-6
    # Ties may fall either way: a sixteenth of a row whose largest value makes for many.
    yield "quantize_fp8 share of others", float((found.float() != quantised.float()).float().mean()), 0.1


def embed_arguments(m: Model, tokens: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, float]:
    """Of a table that does not fit in L2."""
    input_ids = torch.randint(0, TABLE_ROWS, (tokens,), dtype=torch.int32, device=DEVICE)
    positions = torch.randint(0, 130_000, (tokens,), device=DEVICE)
    frequencies = (500_000.0 ** (-torch.arange(0, m.head_dim, 2, device=DEVICE) / m.head_dim)).repeat(2)
    sign = torch.where(torch.arange(m.head_dim, device=DEVICE) < m.head_dim // 2, -1.0, 1.0)
    return input_ids, positions, table_of(m.hidden), frequencies, sign, 1.0


@cache
def table_of(hidden: int) -> Tensor:
    return randn(TABLE_ROWS, hidden)


def check_heads(model: Model, tokens: int) -> Checks:
    """The rotation and the write to the cache, in both dtypes of the cache."""
    heads, kv_heads, dim = model.heads, model.kv_heads, model.head_dim
    cos, sin = rotation_of(tokens, dim)
    norm_of = (randn(heads + kv_heads, dim), EPS) if model.qk_norm else None
    weight = norm_of and norm_of[0]
    num_blocks = -(-tokens // BLOCK_SIZE) + 3
    slots = torch.randperm(num_blocks * BLOCK_SIZE, device=DEVICE)[:tokens]
    for dtype in (BF16, FP8):
        qkv = randn(tokens, (heads + 2 * kv_heads) * dim)
        # 7 everywhere: what must not be written would show.
        cache = torch.full((num_blocks, 2, kv_heads, BLOCK_SIZE, dim), 7.0, device=DEVICE).to(dtype)
        other = cache.clone()
        expected = rope_reference.qk_norm_rope_write_kv(qkv.clone(), (cos, sin), norm_of, slots, other, heads)
        query = rope.qk_norm_rope_write_kv(qkv, cos, sin, weight, EPS, slots, cache, heads, kv_heads)
        # A unit lost before the rotation weighs more where the two products nearly cancel; it is rare.
        yield f"rope query, {dtype}", distance(query, expected), 0.5
        yield f"rope cache, {dtype}", distance(cache, other), 0.5
        for what, one, two in (("query", query, expected), ("cache", cache, other)):
            differs = (one.float() - two.float()).abs() > two.float().abs() * 2**-7 + 1e-6
            yield f"rope {what}, {dtype}: share of others", float(differs.float().mean()), 1e-2
    arguments = embed_arguments(model, tokens)
    found, expected = embedding.embed_and_rotate(*arguments), embedding_reference.embed_and_rotate(*arguments)
    for what, one, two, allowed in zip(("rows", "cos", "sin"), found, expected, (0.0, 2**-6, 2**-6)):
        yield f"embed_and_rotate {what}", distance(one, two), allowed


def check_inputs(rows: int) -> Checks:
    """The kernels that make a step's inputs, exactly."""
    tables = torch.randint(0, 1 << 28, (rows, 257), dtype=torch.int32, device=DEVICE)
    zeros = [torch.zeros(rows, size, dtype=torch.int32, device=DEVICE) for size in (4097, 16)]
    state, expected_state = ([t.clone() for t in (zeros[0], tables, zeros[1])] for _ in range(2))
    segments = torch.tensor([[row, row % 5, 4000 - row % 7, 64 * rows + row] for row in range(rows)])
    blocks = torch.tensor([[row, row % 257, row * 3] for row in range(rows)])
    records = torch.cat((torch.arange(rows)[:, None], torch.randint(-(1 << 31), 1 << 31, (rows, 16))), 1)
    packed = torch.randint(0, 128_000, (65 * rows + 4096,)).int()
    spans = (0, rows), (8 * rows, rows), (16 * rows, rows)
    for (at, _), entries in zip(spans, (segments, blocks, records)):
        packed[at : at + entries.numel()] = entries.int().view(-1)
    packed = packed.to(DEVICE)
    step_inputs.apply_diff(packed, *spans[0], 4000, *spans[1], *spans[2], *state)
    step_inputs_reference.apply_diff(packed, *spans, *expected_state)
    for what, one, two in zip(("token ids", "block tables", "params"), state, expected_state):
        yield f"apply_diff {what}", distance(one, two), 0.0

    lengths = torch.randint(0, 9, (rows,))
    cu_q = torch.cat((torch.zeros(1, dtype=torch.int64), lengths.cumsum(0))).int().to(DEVICE)
    total = int(lengths.sum()) + 5
    slots = torch.randperm(rows)
    slots[torch.rand(rows) < 0.1] = -1
    starts = torch.randint(0, 4000, (rows,), dtype=torch.int32, device=DEVICE)
    settings = slots.int().to(DEVICE), starts, cu_q, state[0], state[1]
    input_ids = torch.full((total,), -7, dtype=torch.int32, device=DEVICE)
    positions, mapping = (torch.full((total,), -7, dtype=torch.int64, device=DEVICE) for _ in range(2))
    step_inputs.build_inputs(*settings, BLOCK_SIZE, input_ids, positions, mapping)
    made = step_inputs_reference.build_inputs(*(t.cpu() for t in settings), BLOCK_SIZE, total)
    found = torch.stack((input_ids.long(), positions, mapping), 1)
    yield "build_inputs", float((found.cpu() != torch.tensor(made)).sum()), 0.0
    hidden, out = randn(total, 1000), torch.full((rows, 1000), float("nan"), dtype=BF16, device=DEVICE)
    last = step_inputs.gather_last(hidden, cu_q, out)
    yield "gather_last", distance(last, step_inputs_reference.gather_last(hidden, cu_q)), 0.0


def check() -> bool:
    """Compare everything; print what is wrong, and the worst of what is right."""
    jobs: list[tuple[str, Callable[[], Checks]]] = [
        (f"{name} T={tokens}", partial(part, model, tokens))
        for name, model in MODELS.items()
        for tokens in (1, 37, 300)
        for part in (check_rows, check_heads)
    ]
    jobs += [(f"R={rows}", partial(check_inputs, rows)) for rows in (1, 6, 300)]
    wrong, count, worst = 0, 0, 0.0
    for where, job in jobs:
        try:
            for what, error, tolerance in job():
                count += 1
                if error <= tolerance:
                    worst = max(worst, error / tolerance if tolerance else 0.0)
                else:
                    wrong += 1
                    print(f"WRONG {where} {what}: error {error:.3g}, tolerance {tolerance:.3g}")
        except Exception as error:
            wrong += 1
            print(f"FAILED {where}: {one_line(error)}")
    print(f"{count} comparisons, {wrong} wrong; the worst of the others at {worst:.2f} of its tolerance")
    return not wrong


# --- how fast are they ----------------------------------------------------------------------------------------------


# One launch on inputs of its own, and the bytes that it must move.
Work = tuple[Callable[[], Any], int]
Build = Callable[[int], Work]  # of a number of tokens


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    kernel: str
    model: str
    variant: str
    build: Build


def norm_case(m: Model, quantised: bool, warps: int | None = None) -> Build:
    def build(tokens: int) -> Work:
        residual, delta, weight = randn(tokens, m.hidden), randn(tokens, m.hidden), randn(m.hidden)
        moved = tokens * m.hidden * (7 if quantised else 8)
        if warps is None:
            call = norm.rms_norm_fp8 if quantised else norm.rms_norm
            return lambda: call(residual, delta, weight, EPS), moved
        out = torch.empty_like(residual)
        sizes = {"SIZE": m.hidden, "BLOCK": triton.next_power_of_2(m.hidden), "HAS_DELTA": True, "FP8": False}
        kernel = norm._rms_norm_kernel[(tokens,)]
        return lambda: kernel(residual, delta, weight, out, out, EPS, **sizes, num_warps=warps), moved

    return build


def silu_case(m: Model, quantised: bool, cut: tuple[int, int] | None = None) -> Build:
    """cut: (elements, warps) of a program."""

    def build(tokens: int) -> Work:
        gate_up, moved = randn(tokens, 2 * m.inner), tokens * m.inner * (5 if quantised else 6)
        if cut is None:
            call = activation.silu_and_mul_fp8 if quantised else activation.silu_and_mul
            return lambda: call(gate_up), moved
        block, warps = cut
        out = torch.empty(tokens, m.inner, dtype=BF16, device=DEVICE)
        kernel = activation._silu_and_mul_kernel[(tokens * triton.cdiv(m.inner, block),)]
        return lambda: kernel(gate_up, out, SIZE=m.inner, BLOCK=block, num_warps=warps), moved

    return build


def quantize_case(m: Model) -> Build:
    def build(tokens: int) -> Work:
        x = randn(tokens, m.inner)
        return lambda: fp8.quantize_fp8(x), tokens * m.inner * 3

    return build


def rope_case(m: Model, dtype: torch.dtype, cut: tuple[int, int] | None = None) -> Build:
    """cut: (heads, warps) of a program."""

    def build(tokens: int) -> Work:
        num_all, dim = m.heads + 2 * m.kv_heads, m.head_dim
        qkv, (cos, sin) = randn(tokens, num_all * dim), rotation_of(tokens, dim)
        weight = randn(m.heads + m.kv_heads, dim) if m.qk_norm else None
        num_blocks = -(-tokens // BLOCK_SIZE) + 1
        cache = torch.zeros(num_blocks, 2, m.kv_heads, BLOCK_SIZE, dim, dtype=dtype, device=DEVICE)
        slots = torch.randperm(num_blocks, device=DEVICE).repeat_interleave(BLOCK_SIZE) * BLOCK_SIZE
        slots = (slots + torch.arange(len(slots), device=DEVICE) % BLOCK_SIZE)[:tokens].contiguous()
        moved = tokens * dim * (2 * num_all + 2 * m.heads + 2 * m.kv_heads * dtype.itemsize + 2)
        if cut is None:
            fixed = weight, EPS, slots, cache, m.heads, m.kv_heads
            return lambda: rope.qk_norm_rope_write_kv(qkv, cos, sin, *fixed), moved
        heads, warps = cut
        tensors = qkv, cos, sin, qkv if weight is None else weight, slots, cache, EPS, 1.0, 1.0
        sizes = {"NUM_HEADS": m.heads, "NUM_KV_HEADS": m.kv_heads, "HEAD_DIM": dim, "BLOCK_SIZE": BLOCK_SIZE}
        sizes |= {"HAS_NORM": weight is not None, "HEADS": heads, "HALF": triton.next_power_of_2(dim // 2)}
        kernel = rope._qk_norm_rope_write_kv_kernel[(tokens * triton.cdiv(num_all, heads),)]
        return lambda: kernel(*tensors, **sizes, num_warps=warps), moved

    return build


def embed_case(m: Model) -> Build:
    def build(tokens: int) -> Work:
        arguments = embed_arguments(m, tokens)
        return lambda: embedding.embed_and_rotate(*arguments), tokens * (12 + 4 * m.hidden + 4 * m.head_dim)

    return build


def inputs_case(tokens: int) -> Work:
    """Rows of one token, up to 256 of them, then longer ones."""
    rows = min(tokens, 256)
    each = tokens // rows
    state = [torch.zeros(rows, size, dtype=torch.int32, device=DEVICE) for size in (8193, 512)]
    slots = torch.arange(rows, dtype=torch.int32, device=DEVICE)
    cu_q = torch.arange(rows + 1, dtype=torch.int32, device=DEVICE) * each
    outs = [torch.zeros(tokens, dtype=dtype, device=DEVICE) for dtype in (torch.int32, torch.int64, torch.int64)]
    moved = tokens * (4 + 4 + 20) + rows * 12
    return lambda: step_inputs.build_inputs(slots, slots, cu_q, *state, BLOCK_SIZE, *outs), moved


def gather_case(m: Model) -> Build:
    def build(tokens: int) -> Work:
        hidden, out = randn(tokens, m.hidden), torch.empty(tokens, m.hidden, dtype=BF16, device=DEVICE)
        cu_q = torch.arange(tokens + 1, dtype=torch.int32, device=DEVICE)
        return lambda: step_inputs.gather_last(hidden, cu_q, out), tokens * m.hidden * 4

    return build


def cases() -> list[Case]:
    found = []
    for name in TIMED:
        m = MODELS[name]
        found.append(Case("rms_norm", name, "-", norm_case(m, False)))
        tried = (4, 8, 16) if m.hidden > 1024 else (1, 2, 8)
        found += [Case("rms_norm", name, f"{warps} warps", norm_case(m, False, warps)) for warps in tried]
        found.append(Case("rms_norm_fp8", name, "-", norm_case(m, True)))
        found.append(Case("silu_and_mul", name, "-", silu_case(m, False)))
        cuts = (512, 2), (1024, 2), (2048, 4), (2048, 8)
        found += [Case("silu_and_mul", name, f"{cut[0]} by {cut[1]} warps", silu_case(m, False, cut)) for cut in cuts]
        found.append(Case("silu_and_mul_fp8", name, "-", silu_case(m, True)))
        found.append(Case("quantize_fp8", name, "-", quantize_case(m)))
        found.append(Case("embed_and_rotate", name, "-", embed_case(m)))
        found.append(Case("rope", name, "-", rope_case(m, BF16)))
        cuts = (4, 1), (8, 2), (16, 4), (16, 8)
        found += [Case("rope", name, f"{cut[0]} heads, {cut[1]} warps", rope_case(m, BF16, cut)) for cut in cuts]
        found.append(Case("rope, fp8 cache", name, "-", rope_case(m, FP8)))
    found.append(Case("build_inputs", "", "-", inputs_case))
    found.append(Case("gather_last", TIMED[0], "-", gather_case(MODELS[TIMED[0]])))
    return found


def one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".replace("\n", " ")[:160]


def device_us(case: Case, tokens: int) -> tuple[float, int]:
    """(microseconds of one launch, bytes that it must move)."""
    first, moved = case.build(tokens)
    calls = [first]
    while len(calls) < min(LAUNCHES, max(2, ROTATED_BYTES // moved)):
        calls.append(case.build(tokens)[0])
    first()
    torch.cuda.synchronize()
    graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.cuda.stream(side):  # not torch.cuda.graph: it collects garbage each time, which takes longer than this
        graph.capture_begin()
        for index in range(LAUNCHES):
            calls[index % len(calls)]()
        graph.capture_end()
    times = []
    for replay in range(REPLAYS + 2):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        if replay >= 2:
            times.append(begin.elapsed_time(end) * 1e3 / LAUNCHES)
    return statistics.median(times), moved


def host_us(call: Callable[[], Any]) -> float:
    """What a call costs the calling thread: the median of batches that the launch queue holds."""
    times = []
    for _ in range(5):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(100):
            call()
        times.append((time.perf_counter() - begin) * 1e4)
    return statistics.median(times)


def direct_launches() -> Iterator[tuple[str, float]]:
    """Host microseconds of a launch that skips the lookup of the compiled kernel, and of the usual one, both on
    tensors that are there already."""
    x = randn(8, 4096)
    arguments, sizes = (x, x, x[0], x, x, EPS), {"SIZE": 4096, "BLOCK": 4096, "HAS_DELTA": True, "FP8": False}
    kernel = norm._rms_norm_kernel
    compiled = kernel[(8,)](*arguments, **sizes, num_warps=8)
    everything = *arguments, *sizes.values()
    grid = compiled[(8, 1, 1)]
    yield "kernel[grid](...)", host_us(lambda: kernel[(8,)](*arguments, **sizes, num_warps=8))
    yield "compiled[grid](...)", host_us(lambda: grid(*everything))
    stream = torch.cuda.current_stream().cuda_stream
    fixed = 8, 1, 1, stream, compiled.function, compiled.packed_metadata, None, None, None
    yield "compiled.run(...)", host_us(lambda: compiled.run(*fixed, *everything))


def compile_all(table: list[Case]) -> dict[Case, str]:
    """Every case once, in parallel; the number of tokens matters where it decides how a kernel is cut up. Returns the
    errors of those that fail."""

    def attempt(case: Case) -> str | None:
        try:
            for tokens in (1, 64):
                case.build(tokens)[0]()
            torch.cuda.synchronize()
        except Exception as error:
            return one_line(error)
        return None

    with ThreadPoolExecutor(12) as pool:
        errors = dict(zip(table, pool.map(attempt, table)))
    return {case: error for case, error in errors.items() if error}


def measure() -> list[dict[str, Any]]:
    table = cases()
    failed = compile_all(table)
    print(f"{'kernel':18}{'model':12}{'variant':18}{'host':>6}" + "".join(f"{t:>8}" for t in TOKENS) + "   TB/s")
    rows = []
    for case in table:
        start = f"{case.kernel:18}{case.model:12}{case.variant:18}"
        try:
            if case in failed:
                raise RuntimeError(failed[case])
            host = host_us(case.build(8)[0])
            timed = [device_us(case, tokens) for tokens in TOKENS]
        except Exception as error:
            print(f"{start} {one_line(error)}")
            continue
        speed = timed[-1][1] / timed[-1][0] / 1e6
        print(f"{start}{host:6.1f}" + "".join(f"{us:8.2f}" for us, _ in timed) + f"{speed:7.2f}", flush=True)
        us = {tokens: round(each, 3) for tokens, (each, _) in zip(TOKENS, timed)}
        row = {"kernel": case.kernel, "model": case.model, "variant": case.variant, "host_us": round(host, 2)}
        rows.append(row | {"us": us, "tb_per_s": round(speed, 3)})
    try:
        launches = {what: round(us, 2) for what, us in direct_launches()}
        print("host us of rms_norm's launch: " + ", ".join(f"{what} {us}" for what, us in launches.items()))
        rows.append({"kernel": "launch", "host_us": launches})
    except Exception as error:
        print(f"direct launches: {one_line(error)}")
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="also write the table to this file, as JSON")
    options = parser.parse_args()
    begin = time.perf_counter()
    torch.manual_seed(int(time.time()))
    right = check()
    checked = time.perf_counter() - begin
    rows = measure()
    print(f"{torch.cuda.get_device_name()}; {checked:.0f} s of checks, {time.perf_counter() - begin:.0f} s in all")
    if options.out is not None:
        options.out.write_text(json.dumps({"device": torch.cuda.get_device_name(), "rows": rows}, indent=1) + "\n")
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
