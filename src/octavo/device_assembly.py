"""Puts together what runs on a GPU: kernels, weights, memory, graphs. A composition root."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager

import torch

from octavo.attention.backend import FusedAttentionBackend
from octavo.attention.long_prefill import (
    CudnnPrefill,
    FlashInferPrefill,
    LongPrefill,
    LongPrefillShape,
    NoLongPrefill,
)
from octavo.attention.torch_operators import TorchAttention
from octavo.attention.triton import TritonAttention
from octavo.config import LONG_CHUNK, EngineConfig, ModelFacts
from octavo.distributed.executor import DeviceExecutor
from octavo.draft_assembly import Draft, load_drafter
from octavo.kernels import triton
from octavo.loading.source import ModelSource
from octavo.loading.weights import as_loaded, load_model
from octavo.models.base import CausalLM, DraftHead
from octavo.quantization.plain_copies import keep_plain_copies
from octavo.quantization.registry import method_of
from octavo.quantization.scheme import LinearLayer, QuantizationMethod
from octavo.worker.adapters import AdapterBank, adapter_bank
from octavo.worker.device_runner import DeviceLimits, DeviceRunner, DeviceSlots
from octavo.worker.device_speculation import DeviceDrafter, DeviceSpeculation
from octavo.worker.drafters.device_draft_head import DeviceHeadDrafter
from octavo.worker.drafters.device_draft_model import DeviceModelDrafter
from octavo.worker.drafters.device_passes import reach_of
from octavo.worker.drafters.lookup import DeviceLookupDrafter
from octavo.worker.drafters.recent_features import RecentFeatures
from octavo.worker.memory import DeviceMemory, MemoryLedger, plan_device_memory
from octavo.worker.sampler.device_sampler import DeviceSampler
from octavo.worker.warm_up import KernelShapes, compile_kernels

_log = logging.getLogger(__name__)

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
# Seconds that recording CUDA graphs may take before the engine is ready; a server goes on until all are recorded.
_GRAPH_SECONDS = 1.0
_COPY_SHARE = 0.1  # of the device's memory, for dequantized copies that nobody asked for


def build_cuda(
    config: EngineConfig, facts: ModelFacts, source: ModelSource, draft: Draft | None, lap: Callable[[str], None]
) -> tuple[DeviceExecutor, MemoryLedger, AdapterBank | None]:
    """Load the model, measure what its steps take, and give the rest to the KV cache. lap: told what each part of the
    time went into. Raises ValueError naming an option or a file, and where memory is short, what to lower.
    """
    triton.load()
    device = torch.device("cuda", torch.cuda.current_device())
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.zeros(1, device=device)
    lap("CUDA")
    values, option = as_loaded(source, device, config.quantization)
    method = method_of(option, values.get("quantization_config"))
    compiling = _compile(config, facts, method, draft, device)
    with _memory_for("the weights", "use a smaller model, or quantization=fp8"):
        model = load_model(source, _DTYPES[config.dtype], device, config.options.seed, config.quantization)
        torch.cuda.synchronize()
    lap("weights")
    _log.info("linear layers: %.1f bits a weight in memory", model.linear_bits)
    with _memory_for("the copy of the weights", "use dequantized_copy=False"):
        _copy_weights(model, config.options.dequantized_copy)
    with _memory_for("the adapters", "lower max_loras or max_lora_rank"):
        bank = adapter_bank(config, model, _DTYPES[config.dtype], device)
    small: CausalLM | DraftHead | None = None
    if draft is not None:
        with _memory_for("the draft model", "use a smaller one"):
            small = load_drafter(draft, model, _DTYPES[config.dtype], device)
        lap("draft")
    compiling.result()
    lap("kernels")

    limits = DeviceLimits(config.max_num_seqs, config.max_num_batched_tokens, config.max_model_len, config.block_size)
    if draft is not None:
        limits = limits._replace(max_draft_rows=draft.num_draft_rows(config.max_num_seqs))
    max_rows = limits.max_num_seqs + limits.max_draft_rows
    make_attention = _attention_maker(config, facts, max_rows, device, draft is not None)

    def make_runner(num_blocks: int, max_model_len: int, use_graphs: bool) -> DeviceRunner:
        own = limits._replace(max_model_len=max_model_len)
        sampler = DeviceSampler(config.max_num_seqs, facts.vocab_size, device)
        slots = DeviceSlots(own, device)
        speculation = None
        if draft is not None:
            speculation = _speculation(draft, (model, small), slots, own, (num_blocks, use_graphs))
        return DeviceRunner(model, make_attention(num_blocks), sampler, slots, own, use_graphs, bank, speculation)

    with _memory_for("the largest step", "lower max_num_batched_tokens or max_num_seqs"):
        trial = make_runner(2, config.max_model_len, False)
        memory = _measure(trial, limits)
    del trial
    torch.cuda.empty_cache()
    lap("largest step")
    ledger = plan_device_memory(config, model.weight_bytes, memory)
    with _memory_for("the KV cache", "lower gpu_memory_utilization or kv_cache_memory"):
        runner = make_runner(ledger.num_blocks, ledger.max_model_len, config.records_graphs)
    lap("KV cache")
    if runner.graphs is not None:
        _log.info("%d CUDA graphs before the first request", runner.record_graphs(_GRAPH_SECONDS))
        lap("graphs")
    return DeviceExecutor(runner), ledger, bank


def _compile(
    config: EngineConfig, facts: ModelFacts, method: QuantizationMethod, draft: Draft | None, device: torch.device
) -> Future[None]:
    """Start compiling the kernels of the model, and of the draft model, whose are done before it is first used."""
    dtype = _DTYPES[config.dtype]
    num_drafts = 0 if draft is None else draft.config.num_speculative_tokens
    compiling = compile_kernels(KernelShapes(config, facts, method, dtype, device, num_drafts))
    if draft is not None and draft.facts is not None:
        stored = None if draft.source is None else draft.source.config.get("quantization_config")
        of_draft = method_of(draft.config.quantization, stored)
        compile_kernels(KernelShapes(config, draft.facts, of_draft, dtype, device, num_drafts))
    return compiling


def _speculation(
    draft: Draft,
    models: tuple[CausalLM, CausalLM | DraftHead | None],
    slots: DeviceSlots,
    limits: DeviceLimits,
    blocks: tuple[int, bool],
) -> DeviceSpeculation:
    """What makes and verifies guesses on a GPU. models: that which is served, and what drafts for it. blocks: how many
    the KV cache has, and whether CUDA graphs are recorded."""
    target, model = models
    device, most = slots.token_ids.device, draft.config.num_speculative_tokens
    groups = limits.max_num_seqs, limits.max_num_seqs + limits.max_draft_rows
    drafter: DeviceDrafter
    recent: RecentFeatures | None = None
    if model is None:
        drafter = DeviceLookupDrafter(draft.lookup, slots.token_ids)
    else:
        sizes = limits.block_size, min(limits.max_num_seqs, limits.max_draft_rows)
        dtype = target.embed_tokens.weight.dtype
        attention = _draft_attention(draft, sizes, blocks[0], dtype, device)
        rest = attention, slots.block_tables, sizes, most, blocks[1]
        if isinstance(model, CausalLM):
            draws = draft.config.draft_sample_method == "probabilistic"
            drafter = DeviceModelDrafter(model, *rest, slots.params if draws else None)
        else:
            recent = RecentFeatures(model, target, limits.max_num_seqs, reach_of(most), most)
            drafter = DeviceHeadDrafter(model, recent, *rest)
    return DeviceSpeculation(drafter, most, groups, device, draft.config.synthetic_acceptance, recent)


def _draft_attention(
    draft: Draft, sizes: tuple[int, int], num_blocks: int, dtype: torch.dtype, device: torch.device
) -> TritonAttention:
    """Over a KV cache of so many blocks. sizes: tokens of a block, and sequences that get guesses in a step."""
    facts, (block_size, num_sequences) = draft.facts, sizes
    assert facts is not None
    block = 2, facts.num_kv_heads, block_size, facts.head_dim
    cache = torch.zeros(facts.num_layers, num_blocks, *block, dtype=dtype, device=device)
    num_processors = torch.cuda.get_device_properties(device).multi_processor_count
    rows = num_sequences * reach_of(draft.config.num_speculative_tokens)
    return TritonAttention(cache, facts.num_heads, num_processors, rows, NoLongPrefill(), shares=True)


def _copy_weights(model: CausalLM, wanted: bool | None) -> None:
    """wanted: None where the copy is small beside the device's memory."""
    if wanted is False:
        return
    total = torch.cuda.mem_get_info()[1]
    layers = [layer for layer in model.modules() if isinstance(layer, LinearLayer)]
    num_bytes = keep_plain_copies(layers, None if wanted else int(_COPY_SHARE * total))
    if num_bytes:
        _log.info("linear layers: %.0f MiB more for a copy that steps of many tokens use", num_bytes / 1024**2)


@contextmanager
def _memory_for(what: str, advice: str) -> Iterator[None]:
    """Tell a user whose GPU is too small what to do about it."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        reason = str(error).partition(". ")[0]
        raise ValueError(f"the GPU has too little memory for {what}: {advice}; {reason}") from None


def _attention_maker(
    config: EngineConfig, facts: ModelFacts, max_rows: int, device: torch.device, speculates: bool
) -> Callable[[int], FusedAttentionBackend]:
    """max_rows: of a step. speculates: rows may verify guesses. Makes the attention over a KV cache of so many blocks.
    Says which backend it is."""
    dtype = _DTYPES[config.dtype]
    cache_dtype = torch.float8_e4m3fn if config.options.kv_cache_dtype == "fp8" else dtype
    block = 2, facts.num_kv_heads, config.block_size, facts.head_dim
    name = config.options.attention_backend
    num_processors = torch.cuda.get_device_properties(device).multi_processor_count
    long_prefill, said = _long_prefill(config, facts, dtype, cache_dtype, device)
    _log.info("attention: %s", "torch operators" if name == "torch" else f"triton; long prompts: {said}")

    def make(num_blocks: int) -> FusedAttentionBackend:
        # Zeros: what padding and masks keep out of a sum must not be NaN.
        cache = torch.zeros(facts.num_layers, num_blocks, *block, dtype=cache_dtype, device=device)
        if name == "torch":
            return TorchAttention(cache, facts.num_heads)
        return TritonAttention(cache, facts.num_heads, num_processors, max_rows, long_prefill, speculates)

    return make


def _measure(trial: DeviceRunner, limits: DeviceLimits) -> DeviceMemory:
    """Run the largest step and the largest decode step, and read off the allocator what they took."""

    def peak_of(num_rows: int, num_tokens: int) -> int:
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        trial.compute_largest(num_rows, num_tokens)
        return torch.cuda.max_memory_allocated() - before

    max_rows = limits.max_num_seqs + limits.max_draft_rows
    decode = peak_of(max_rows, max_rows)
    largest = peak_of(max_rows, limits.max_num_batched_tokens)
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    slack = (largest + decode) // 16  # fragments, and what libraries take for themselves later
    return DeviceMemory(total=total, free=free, activations=largest + slack, graphs=decode)


def _long_prefill(
    config: EngineConfig, facts: ModelFacts, dtype: torch.dtype, cache_dtype: torch.dtype, device: torch.device
) -> tuple[LongPrefill, str]:
    """What attends long prompts, and that in words. Raises ValueError where FlashInfer is asked for and refuses."""
    name = config.options.attention_backend
    if name == "torch":
        return NoLongPrefill(), "torch"
    shape = LongPrefillShape(
        num_heads=facts.num_heads,
        num_kv_heads=facts.num_kv_heads,
        head_dim=facts.head_dim,
        dtype=dtype,
        kv_dtype=cache_dtype,
        block_size=config.block_size,
        max_context=config.max_model_len,
        sliding_window=facts.sliding_window,
        device=device,
    )
    if name == "flashinfer":
        try:
            return FlashInferPrefill(shape), "FlashInfer"
        except (ImportError, ValueError) as error:
            raise ValueError(f"attention_backend=flashinfer cannot be used: {error}; allowed: auto, triton") from error
    if name == "triton":
        return NoLongPrefill(), "triton"
    try:
        return CudnnPrefill(shape, piece=LONG_CHUNK), "cuDNN"
    except ValueError as error:
        return NoLongPrefill(), f"triton, for cuDNN does not serve {error}"
