#!/usr/bin/env python3
"""What the places of a step cost while the GPU is at its power's limit: one recorded step, kept up for seconds.

    python benchmarks/gpu/kept_step.py --model FOLDER [--workload mixed] [--step 300] [--seconds 1.3] [--kwargs JSON]

Serves a workload of gpu_workloads.py, whose prompts are spread over decode steps, up to the first recorded mixed step
from --step on. Replays that step's graph for so many seconds, after half as many that bring the GPU to its limit, as it
is and changed in one place at a time: milliseconds a step, and watts by the energy that NVML counts. What a kernel
brings there may differ from what it brings alone, at a clock of its own.
"""

from __future__ import annotations

import argparse
import ctypes
import random
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import stepping
import torch

from octavo import LLM, SamplingParams
from octavo.kernels import triton
from octavo.kernels.triton import decode_attention, fp8_gemm, norm, prefill_attention, rope
from octavo.kernels.triton.decode_attention import DecodeConfig
from octavo.kernels.triton.prefill_attention import PrefillTuning
from octavo.protocol.request import Request
from octavo.worker.cuda_graphs import StepGraph
from octavo.worker.step_buffers import StepShape

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import gpu_workloads

DECODES = [(64, 4, 2), (64, 4, 4), (64, 8, 3), (64, 2, 3), (32, 4, 4), (32, 2, 4), (16, 2, 4)]
PREFILLS = [(64, 64, 4, 3), (128, 128, 8, 2), (128, 32, 8, 3)]
Change = AbstractContextManager[Any]


class Joules:
    """What the device has used since its driver was loaded."""

    def __init__(self) -> None:
        self._nvml = ctypes.CDLL("libnvidia-ml.so.1")
        self._device = ctypes.c_void_p()
        self._nvml.nvmlInit_v2()
        self._nvml.nvmlDeviceGetHandleByIndex_v2(0, ctypes.byref(self._device))

    def read(self) -> float:
        value = ctypes.c_ulonglong()
        status = self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._device, ctypes.byref(value))
        if status:
            raise RuntimeError(f"NVML says {status}, not what energy was used")
        return value.value / 1e3


def serve_until(llm: LLM, workload: str, step: int) -> StepShape:
    """Serve it up to the first recorded mixed step from that one on. Returns its shape; the buffers hold its rows."""
    engine, last = stepping.engine_of(llm), []
    prompts, outs = gpu_workloads.WORKLOADS[workload](random.Random(1000))
    for index in sorted(range(len(outs)), key=lambda index: -outs[index]):
        sampling = SamplingParams(
            temperature=1.0, max_tokens=outs[index], ignore_eos=True, detokenize=False, seed=index
        )
        engine.add(Request(str(index), prompts[index], sampling, outs[index], patient=True))
    replay = StepGraph.replay

    def watched(graph: StepGraph) -> Any:
        last.append(graph.shape)
        return replay(graph)

    with patch.object(StepGraph, "replay", watched):
        count = 0
        while engine.has_work:
            last.clear()
            engine.step()
            count += 1
            if count >= step and last and not last[-1].decodes:
                torch.cuda.synchronize()
                shape: StepShape = last[-1]
                print(f"step {count}: {shape}", flush=True)
                return shape
    raise ValueError(f"step={step} is out of range: the workload has {count}")


@contextmanager
def cublas_lt() -> Iterator[None]:
    torch.backends.cuda.preferred_blas_library("cublaslt")
    try:
        yield
    finally:
        torch.backends.cuda.preferred_blas_library("cublas")


def changes() -> Iterator[tuple[str, Change]]:
    kernels = triton.get()
    yield "without decode attention", patch.object(kernels, "paged_decode", lambda *_, **__: None)
    yield "without prefill attention", patch.object(kernels, "paged_prefill", lambda *_, **__: None)
    halved = patch.object(kernels, "silu_and_mul", lambda x: x.view(2 * len(x), -1)[: len(x)])
    yield "without SwiGLU (bfloat16)", halved
    yield "products by cuBLASLt", cublas_lt()
    yield "FP8 products by cuBLAS", patch.object(fp8_gemm, "_plan", lambda *_: None)
    for cut in DECODES:
        config = DecodeConfig(*cut)
        yield f"decode {cut}", patch.dict(decode_attention._CONFIGS, {(2, 2): {True: config, False: config}})
    for tuning in (PrefillTuning(*cut) for cut in PREFILLS):
        yield f"prefill {tuning}", patch.object(prefill_attention, "_tuning", lambda *_, own=tuning: own)
    for warps in (4, 16):
        yield f"norm by {warps} warps", patch.object(norm, "_row_warps", lambda _, own=warps: own)
    for heads in (8, 32):
        yield f"rotation of {heads} heads", patch.object(rope, "_heads_per_program", lambda _, own=heads: own)


@torch.inference_mode()
def measure(runner: Any, shape: StepShape, change: Change | None, seconds: float, joules: Joules) -> str:
    """The step's milliseconds and watts. It is launched once before it is recorded: that compiles it."""
    with ExitStack() as stack, torch.cuda.stream(runner._stream):
        if change is not None:
            stack.enter_context(change)
        runner._compute(shape, keeps_all=False)
        torch.cuda.synchronize()
        graph, _ = runner.graphs._capture(shape)
        for span in (seconds / 2, seconds):
            began, used, count = time.monotonic(), joules.read(), 0
            while time.monotonic() - began < span:
                for _ in range(10):
                    graph.replay()
                torch.cuda.synchronize()
                count += 10
        taken = time.monotonic() - began
        return f"{taken / count * 1e3:8.3f} ms {(joules.read() - used) / taken:6.0f} W"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--workload", choices=("mixed", "uniform"), default="mixed")
    parser.add_argument("--step", type=int, default=300)
    parser.add_argument("--seconds", type=float, default=1.3)
    parser.add_argument("--kwargs", default="{}", help="JSON of further LLM() arguments")
    args = parser.parse_args()
    options = {"load_format": "dummy", "skip_tokenizer_init": True, **stepping.parse_options(args.kwargs)}
    llm, joules = stepping.open_llm(args.model, **options), Joules()
    executor: Any = stepping.engine_of(llm)._executor
    shape = serve_until(llm, args.workload, args.step)
    asked: list[tuple[str, Change | None]] = [("as it is", None), *changes(), ("as it is", None)]
    for name, change in asked:
        print(f"{name:60} {measure(executor._runner, shape, change, args.seconds, joules)}", flush=True)


if __name__ == "__main__":
    main()
