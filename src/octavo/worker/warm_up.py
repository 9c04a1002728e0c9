"""Compiles the kernels that an engine will launch, side by side, while the weights are loaded."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

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


class _Shapes:
    """The engine's shapes, and one call of each kernel as it will be compiled for them, on as little as that takes."""

    def __init__(self, config: EngineConfig, facts: ModelFacts, dtype: torch.dtype) -> None:
        self.facts, self.dtype, self.block_size = facts, dtype, config.block_size
        self.kernels = triton.get()
        self.kv_dtype = torch.float8_e4m3fn if config.options.kv_cache_dtype == "fp8" else dtype
        self.fp8 = config.options.quantization == "fp8"
        self.num_all = facts.num_heads + 2 * facts.num_kv_heads

    def zeros(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype or self.dtype, device="cuda")

    def ints(self, *values: int) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device="cuda")

    def cache(self) -> torch.Tensor:
        return self.zeros(2, 2, self.facts.num_kv_heads, self.block_size, self.facts.head_dim, dtype=self.kv_dtype)

    def norm(self, tokens: int, delta: bool, fp8: bool = False) -> None:
        x = self.zeros(tokens, self.facts.hidden_size)
        compute = self.kernels.rms_norm_fp8 if fp8 else self.kernels.rms_norm
        compute(x, x.clone() if delta else None, x[0].clone(), 1e-5)

    def activation(self, tokens: int, fp8: bool = False) -> None:
        compute = self.kernels.silu_and_mul_fp8 if fp8 else self.kernels.silu_and_mul
        compute(self.zeros(tokens, 2 * self.facts.intermediate_size))

    def quantize(self, size: int) -> None:
        self.kernels.quantize_fp8(self.zeros(1, size))

    def rope(self, tokens: int) -> None:
        heads, dim = (self.facts.num_heads, self.facts.num_kv_heads), self.facts.head_dim
        angles, where = self.zeros(tokens, 1, dim), self.zeros(tokens, dtype=torch.int64)
        qkv = self.zeros(tokens, self.num_all * dim)
        self.kernels.qk_norm_rope_write_kv(qkv, angles, angles, None, 0.0, where, self.cache(), *heads)

    def rotation(self) -> None:
        dim = self.facts.head_dim
        angles = self.zeros(dim, dtype=torch.float32)
        self.kernels.rotation(self.zeros(1, dtype=torch.int64), angles, angles.clone(), 1.0, self.dtype)

    def decode(self) -> None:
        heads, kv_heads, dim = self.facts.num_heads, self.facts.num_kv_heads, self.facts.head_dim
        qkv = self.zeros(1, self.num_all * dim)
        query, out = qkv.view(1, self.num_all, dim)[:, :heads], self.zeros(1, heads, dim)
        scratch = self.kernels.decode_scratch(1, 1, heads, kv_heads, dim, query.device)
        where = self.zeros(1, 1, dtype=torch.int32), self.ints(0), self.ints(0, 1)
        items = self.ints(0, 0, 1, 0, 1, 0)[None]
        self.kernels.paged_decode(query, self.cache(), *where, items, out, scratch, dim**-0.5, None)

    def prefill(self) -> None:
        heads, dim = self.facts.num_heads, self.facts.head_dim
        qkv = self.zeros(2, self.num_all * dim)
        query, out = qkv.view(2, self.num_all, dim)[:, :heads], self.zeros(2, heads, dim)
        where = self.zeros(1, 1, dtype=torch.int32), self.ints(0), self.ints(0), self.ints(0, 2), self.ints(0, 0)[None]
        self.kernels.paged_prefill(query, self.cache(), *where, out, dim**-0.5, None)

    def inputs(self) -> None:
        slots, starts, cu_q, table = self.ints(0), self.ints(0), self.ints(0, 1), self.zeros(1, 1, dtype=torch.int32)
        made = self.zeros(1, dtype=torch.int32), self.zeros(1, dtype=torch.int64), self.zeros(1, dtype=torch.int64)
        self.kernels.build_inputs(slots, starts, cu_q, table, table, self.block_size, *made)
        hidden = self.zeros(1, self.facts.hidden_size)
        self.kernels.gather_last(hidden, cu_q, hidden.clone())

    def draw(self, rows: int) -> None:
        """Compiled anew for each power of two that the vocabulary is split into, which goes by the rows."""
        logits = self.zeros(1, self.facts.vocab_size).expand(rows, -1)
        padding, table = torch.full((rows,), -1, dtype=torch.int32, device="cuda"), self.zeros(1, 16, dtype=torch.int32)
        out = self.zeros(rows, 2, dtype=torch.int32)
        self.kernels.draw_tokens(logits, padding, padding, table, padding, table, out)

    def skinny(self, m: int, n: int, k: int, fp8: bool) -> None:
        """The plan of the whole product, on two tiles of it: what is compiled depends on the plan."""
        plan = self.kernels.GemmPlan.of(m, n, k, 1 if fp8 else 2)
        size = 2 * plan.block_k * plan.split_k
        x, weight = self.zeros(m, size), self.zeros(2 * plan.block_n, size)
        if fp8:
            scale = self.zeros(2 * plan.block_n, dtype=torch.float32)
            self.kernels.skinny_linear_fp8(x, weight.to(torch.float8_e4m3fn), scale, plan=plan)
        else:
            self.kernels.skinny_linear(x, weight, plan=plan)


def _jobs(config: EngineConfig, facts: ModelFacts, dtype: torch.dtype) -> list[Callable[[], object]]:
    """The slowest to compile first."""
    make = _Shapes(config, facts, dtype)
    jobs: list[Callable[[], object]] = []
    if config.options.attention_backend != "torch":
        jobs += [make.prefill, make.decode]
    heads, hidden, inner = facts.num_heads * facts.head_dim, facts.hidden_size, facts.intermediate_size
    if dtype.itemsize == 2:
        products = [(make.num_all * facts.head_dim, hidden), (hidden, heads), (2 * inner, hidden), (hidden, inner)]
        for m in (1, 16):
            jobs += [partial(make.skinny, m, n, k, make.fp8) for n, k in products]
            jobs.append(partial(make.skinny, m, facts.vocab_size, hidden, False))
    jobs += [partial(make.draw, rows) for rows in (1, 32, 64, 128, 256, 512, 1024)]
    for tokens in (1, 128):
        jobs += [partial(make.rope, tokens), partial(make.norm, tokens, True), partial(make.norm, tokens, False)]
        jobs.append(partial(make.activation, tokens))
    if make.fp8:
        jobs += [partial(make.norm, 1, True, True), partial(make.norm, 1, False, True)]
        jobs += [partial(make.activation, 1, True), partial(make.quantize, heads)]
    return [*jobs, make.rotation, make.inputs]
