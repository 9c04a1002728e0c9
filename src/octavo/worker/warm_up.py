"""Compiles the kernels that an engine will launch, side by side, while the weights are loaded."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

import torch

from octavo.attention.work_items import queries_of_item
from octavo.config import EngineConfig, ModelFacts
from octavo.kernels import triton
from octavo.kernels.reference.draft_passes import DraftRows
from octavo.quantization.fp8 import Fp8Scheme
from octavo.quantization.scheme import LinearScheme, LinearShape, QuantizationMethod, layers_of
from octavo.worker.adapters import storage_rank
from octavo.worker.step_buffers import NUM_PARAMS

_NUM_THREADS = 16


def compile_kernels(shapes: KernelShapes) -> Future[None]:
    """Launch every kernel once on a few tokens, each from a thread of its own. The future is done when all have run;
    its result raises what the first failure raised.

    Triton compiles a kernel for its types and constants, and for which of its integers are 1 or multiples of 16: so
    all of these are here what they will be. What a request's own wishes need (top_p, penalties, logprobs) is left to
    the first request that has them.
    """
    pool = ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="compile")
    jobs = [pool.submit(_run, job, shapes.device) for job in kernel_jobs(shapes)]
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


def _run(job: Callable[[], object], device: torch.device) -> None:
    with torch.cuda.stream(torch.cuda.Stream(device)):
        job()


class KernelShapes:
    """The engine's shapes, and one call of each kernel as it will be compiled for them, on as little as that takes."""

    def __init__(
        self,
        config: EngineConfig,
        facts: ModelFacts,
        method: QuantizationMethod,
        dtype: torch.dtype,
        device: torch.device,
        num_drafts: int = 0,
    ) -> None:
        """method: of the model's linear layers. num_drafts: guesses of a row, at most, 0 without speculation."""
        self.config, self.method = config, method
        self.num_drafts = num_drafts
        self.facts, self.dtype, self.device, self.block_size = facts, dtype, device, config.block_size
        self.max_model_len = config.max_model_len
        self.kernels = triton.get()
        self.kv_dtype = torch.float8_e4m3fn if config.options.kv_cache_dtype == "fp8" else dtype
        self.num_all = facts.num_heads + 2 * facts.num_kv_heads

    def zeros(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype or self.dtype, device=self.device)

    def ints(self, *values: int) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=self.device)

    def token_table(self) -> torch.Tensor:
        return self.zeros(1, self.max_model_len + 1, dtype=torch.int32)

    def block_table(self) -> torch.Tensor:
        return self.zeros(1, -(-self.max_model_len // self.block_size), dtype=torch.int32)

    def cache(self) -> torch.Tensor:
        return self.zeros(2, 2, self.facts.num_kv_heads, self.block_size, self.facts.head_dim, dtype=self.kv_dtype)

    def norm(self, delta: bool, fp8: bool = False) -> None:
        x = self.zeros(1, self.facts.hidden_size)
        compute = self.kernels.rms_norm_fp8 if fp8 else self.kernels.rms_norm
        compute(x, x.clone() if delta else None, x[0].clone(), 1e-5)

    def activation(self, fp8: bool = False) -> None:
        compute = self.kernels.silu_and_mul_fp8 if fp8 else self.kernels.silu_and_mul
        compute(self.zeros(1, 2 * self.facts.intermediate_size))

    def rope(self, tokens: int) -> None:
        heads, dim = (self.facts.num_heads, self.facts.num_kv_heads), self.facts.head_dim
        angles, where = self.zeros(tokens, 1, dim), self.zeros(tokens, dtype=torch.int64)
        qkv = self.zeros(tokens, self.num_all * dim)
        norm = self.zeros(sum(heads), dim) if self.facts.qk_norm else None
        self.kernels.qk_norm_rope_write_kv(qkv, angles, angles, norm, 0.0, where, self.cache(), *heads)

    def embedding(self) -> None:
        angles = self.zeros(self.facts.head_dim, dtype=torch.float32)
        table, positions = self.zeros(1, self.facts.hidden_size), self.zeros(1, dtype=torch.int64)
        self.kernels.embed_and_rotate(self.ints(0), positions, table, angles, angles.clone(), 1.0)

    def decode(self) -> None:
        heads, kv_heads, dim = self.facts.num_heads, self.facts.num_kv_heads, self.facts.head_dim
        qkv = self.zeros(1, self.num_all * dim)
        query, out = qkv.view(1, self.num_all, dim)[:, :heads], self.zeros(1, heads, dim)
        queries = queries_of_item(heads // kv_heads) if self.num_drafts else 1
        scratch = self.kernels.decode_scratch(1, 1, heads, kv_heads, dim, query.device, queries)
        where = self.block_table(), self.ints(0), self.ints(0, 1)
        items = self.ints(0, 0, 1, 1, 1, 0)[None]
        self.kernels.paged_decode(query, self.cache(), *where, items, out, scratch, dim**-0.5, None, queries=queries)

    def speculate(self) -> None:
        most, row, one = self.num_drafts, self.ints(0), self.ints(1)
        self.kernels.follow_rows(row, row, one, one.clone(), one.clone(), self.ints(0, 0, 1, 1, 1, 0)[None])
        ends, drawn = self.ints(0, 1), self.ints(0, 0)[None]
        self.kernels.verify_rows(row, row, row, one, ends, row, drawn, row, one.clone(), one.clone(), most, None)
        drafts = self.zeros(1, most, dtype=torch.int32)
        written = row.clone(), self.token_table(), self.zeros(1, 2 + most, dtype=torch.int32)
        self.kernels.place_drafts(row, drafts, row.clone(), row, one, one, *written)
        self.kernels.read_drafts(row, row, one, self.token_table(), drafts, row.clone())
        items, places = self.ints(0, 0, 1, 1, 1, 0)[None], [self.zeros(1, dtype=torch.int64) for _ in range(2)]
        made = DraftRows(*(row.clone() for _ in range(4)), *places, items.clone(), row.clone())
        tables = one, self.token_table(), self.block_table(), self.block_size
        for backs in (one, None):
            self.kernels.draft_rows(row, backs, row, items, 0, *tables, made)

    def prefill(self) -> None:
        heads, dim = self.facts.num_heads, self.facts.head_dim
        qkv = self.zeros(2, self.num_all * dim)
        query, out = qkv.view(2, self.num_all, dim)[:, :heads], self.zeros(2, heads, dim)
        where = self.block_table(), self.ints(0), self.ints(0), self.ints(0, 2), self.ints(0, 0)[None]
        self.kernels.paged_prefill(query, self.cache(), *where, out, dim**-0.5, None)

    def inputs(self) -> None:
        slots, starts, cu_q = self.ints(0), self.ints(0), self.ints(0, 1)
        tables = self.token_table(), self.block_table()
        made = self.zeros(1, dtype=torch.int32), self.zeros(1, dtype=torch.int64), self.zeros(1, dtype=torch.int64)
        self.kernels.build_inputs(slots, starts, cu_q, *tables, self.block_size, *made)
        # From the host, and from the device: no copy to the host, whose memory would be another's by then.
        for source in (torch.zeros(1, dtype=torch.int32, pin_memory=self.device.type == "cuda"), slots):
            self.kernels.copy_words(source, self.ints(0))
        params = self.zeros(1, NUM_PARAMS, dtype=torch.int32)
        diff = self.zeros(1 + NUM_PARAMS, dtype=torch.int32)  # of slot 0
        self.kernels.apply_diff(diff, 0, 0, 0, 0, 0, 0, 1, *tables, params)
        for size in {self.facts.hidden_size, self.facts.num_heads * self.facts.head_dim}:
            tokens = self.zeros(1, size)
            self.kernels.gather_last(tokens, cu_q, tokens.clone())

    def draw(self) -> None:
        """One kernel, and one for each power of two that the vocabulary is split into, which goes by the rows."""
        logits, padding = self.zeros(1, self.facts.vocab_size), self.ints(-1)
        tables = self.zeros(1, NUM_PARAMS, dtype=torch.int32), padding, self.token_table()
        for rows in (1, 32, 64, 128, 256, 512, 1024):
            out, programs = self.zeros(1, 2, dtype=torch.int32), self.kernels.PROGRAMS // rows
            self.kernels.draw_tokens(logits, padding, padding, *tables, out, programs)

    def gather(self) -> None:
        capacity = 16 + self.max_model_len % 16
        buffer = self.zeros(2, self.facts.num_kv_heads, capacity, self.facts.head_dim)
        self.kernels.gather_kv(self.cache(), self.block_table()[0], 1, buffer)

    def merge(self, count: int) -> None:
        """Parts as cuDNN leaves them: tokens first."""
        heads, dim, tokens = self.facts.num_heads, self.facts.head_dim, 16
        part, sums = self.zeros(tokens, heads, dim).transpose(0, 1), self.zeros(heads, tokens, dtype=torch.float32)
        self.kernels.merge_attention([part] * count, [sums] * count, self.zeros(tokens, heads, dim))

    def product_jobs(self) -> list[Callable[[], object]]:
        """Those of every layer's projections, which may differ in format, and of the output head."""
        found: dict[Hashable, Callable[[], object]] = {}
        for scheme, shape in self.products():
            found |= scheme.launches(shape)
        return list(found.values())

    def adapter_jobs(self, max_rank: int) -> list[Callable[[], object]]:
        """Those of what adapters add to each projection, to the output head, and to the embedding."""
        facts, rank = self.facts, storage_rank(max_rank)
        hidden, inner, dim = facts.hidden_size, facts.intermediate_size, facts.head_dim
        rows = tuple(heads * dim for heads in (facts.num_heads, facts.num_kv_heads, facts.num_kv_heads))
        layers = [(hidden, rows), (rows[0], (hidden,)), (hidden, (inner, inner)), (inner, (hidden,))]
        layers.append((hidden, (facts.vocab_size,)))
        plan, found = self.kernels.LoraPlan, {}
        for columns, parts in layers:
            found |= plan.launches(columns, parts, rank, self.dtype, self.device)
        found |= plan.embedding_launches(hidden, rank, self.dtype, torch.int32, self.device)
        return list(found.values())

    def products(self) -> Iterable[tuple[LinearScheme, LinearShape]]:
        """Each kind of linear layer once."""
        facts = self.facts
        heads, kv_heads = facts.num_heads * facts.head_dim, facts.num_kv_heads * facts.head_dim
        hidden, inner = facts.hidden_size, facts.intermediate_size
        of_layer = (
            (hidden, {"self_attn.q_proj": heads, "self_attn.k_proj": kv_heads, "self_attn.v_proj": kv_heads}),
            (heads, {"self_attn.o_proj": hidden}),
            (hidden, {"mlp.gate_proj": inner, "mlp.up_proj": inner}),
            (inner, {"mlp.down_proj": hidden}),
        )
        matrices = [
            (in_features, {f"model.layers.{index}.{part}": rows for part, rows in parts.items()})
            for index in range(facts.num_layers)
            for in_features, parts in of_layer
        ]
        matrices.append((hidden, {"lm_head": facts.vocab_size}))
        return dict.fromkeys(
            (scheme, LinearShape(sum(sizes.values()), in_features, self.dtype, self.device, _is_gated(sizes)))
            for in_features, parts in matrices
            for scheme, sizes in layers_of(parts, self.method)
        )

    def scheme_of(self, name: str) -> LinearScheme:
        return self.method.scheme_of(f"model.layers.0.{name}")

    def takes_fp8(self, name: str) -> bool:
        """Whether what comes before a projection quantises its tokens."""
        scheme = self.scheme_of(name)
        return isinstance(scheme, Fp8Scheme) and scheme.quantizes_tokens


def _is_gated(parts: Collection[str]) -> bool:
    """Whether one layer holds the gates and what they are for."""
    return {part.rpartition(".")[2] for part in parts} == {"gate_proj", "up_proj"}


def kernel_jobs(make: KernelShapes) -> list[Callable[[], object]]:
    """Each launches a kernel as steps will, in one of the ways it is compiled for. The slowest to compile first."""
    config = make.config
    jobs: list[Callable[[], object]] = []
    if config.options.attention_backend != "torch":
        jobs += [make.prefill, make.decode]
    if config.options.attention_backend == "auto":
        most = min(make.kernels.MAX_PARTS, 1 + (config.max_model_len // 256).bit_length())
        jobs += [make.gather, *(partial(make.merge, count) for count in range(2, most + 1))]
    jobs += make.product_jobs()
    if config.lora is not None:
        jobs += make.adapter_jobs(config.lora.max_lora_rank)
    jobs += [make.draw, partial(make.rope, 1), partial(make.rope, 64), make.activation]
    jobs += [partial(make.norm, delta) for delta in (False, True)]
    if make.takes_fp8("self_attn.q_proj"):
        jobs += [partial(make.norm, delta, fp8=True) for delta in (False, True)]
    if make.takes_fp8("mlp.down_proj"):
        jobs.append(partial(make.activation, fp8=True))
    if make.num_drafts:
        jobs.append(make.speculate)
    return [*jobs, make.embedding, make.inputs]
