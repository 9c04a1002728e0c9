"""Compiles the kernels that an engine will launch, side by side, while the weights are loaded."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from octavo.config import EngineConfig, ModelFacts
from octavo.kernels import triton

_NUM_THREADS = 16


def compile_kernels(config: EngineConfig, facts: ModelFacts, dtype: torch.dtype) -> Future[None]:
    """Launch every kernel once on a few tokens, each from a thread of its own. The future is done when all have run;
    its result raises what the first failure raised."""
    pool = ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="compile")
    jobs = [pool.submit(_run, job) for job in _jobs(config, facts, dtype)]
    pool.shutdown(wait=False)
    done: Future[None] = Future()

    def collect(_job: Future[None]) -> None:
        if all(job.done() for job in jobs) and not done.done():
            error = next((job.exception() for job in jobs if job.exception() is not None), None)
            if error is None:
                done.set_result(None)
            else:
                done.set_exception(error)

    for job in jobs:
        job.add_done_callback(collect)
    return done


def _run(job: Callable[[], object]) -> None:
    with torch.cuda.stream(torch.cuda.Stream()):
        job()


def _jobs(config: EngineConfig, facts: ModelFacts, dtype: torch.dtype) -> list[Callable[[], object]]:
    """One call of each kernel, in the variants that steps of few and of many tokens take."""
    kernels = triton.get()
    device = torch.device("cuda")
    jobs: list[Callable[[], object]] = []
    hidden, head_dim = facts.hidden_size, facts.head_dim
    num_all = facts.num_heads + 2 * facts.num_kv_heads
    cache_dtype = torch.float8_e4m3fn if config.options.kv_cache_dtype == "fp8" else dtype
    shape = 2, 2, facts.num_kv_heads, config.block_size, head_dim

    def norm(tokens: int, delta: bool) -> Callable[[], object]:
        def job() -> object:
            x = torch.zeros(tokens, hidden, dtype=dtype, device=device)
            return kernels.rms_norm(x, x.clone() if delta else None, x[0].clone(), 1e-5)

        return job

    def rope(tokens: int) -> Callable[[], object]:
        def job() -> object:
            qkv = torch.zeros(tokens, num_all * head_dim, dtype=dtype, device=device)
            angles = torch.zeros(tokens, 1, head_dim, dtype=dtype, device=device)
            where = torch.zeros(tokens, dtype=torch.int64, device=device)
            cache = torch.zeros(shape, dtype=torch.float32, device=device).to(cache_dtype)
            heads = facts.num_heads, facts.num_kv_heads
            return kernels.qk_norm_rope_write_kv(qkv, angles, angles, None, 0.0, where, cache, *heads)

        return job

    for tokens in (1, 128):
        jobs += [norm(tokens, True), norm(tokens, False), rope(tokens)]
    return jobs
