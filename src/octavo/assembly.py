"""Puts an engine together: source, configuration, model, KV pool, sampler, scheduler. A composition root."""

from __future__ import annotations

import gc
import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import torch

from octavo.attention.cpu import CpuAttention
from octavo.config import DeviceFacts, EngineConfig, EngineOptions, ModelFacts, home, resolve
from octavo.distributed.executor import InProcessExecutor
from octavo.draft_assembly import Draft, cpu_drafter, find_draft
from octavo.engine.adapters import AdapterDesk
from octavo.engine.engine import Engine
from octavo.engine.executor import Executor
from octavo.engine.grammars import GrammarDesk
from octavo.kernels.cpu import library
from octavo.loading.source import ModelSource, source_of
from octavo.loading.weights import load_model
from octavo.models.registry import CLASSIFIER_IDS, model_facts
from octavo.protocol.messages import Ready
from octavo.protocol.speculation import speculation_config
from octavo.scheduler.scheduler import Scheduler
from octavo.structured.vocabulary import Vocabulary, vocabulary_of
from octavo.text.tokenizer import load_tokenizer
from octavo.worker.adapters import AdapterBank, adapter_bank
from octavo.worker.memory import MemoryLedger, free_host_bytes, plan_memory
from octavo.worker.model_runner import ModelRunner
from octavo.worker.sampler.sampler import Sampler
from octavo.worker.slots import Slots
from octavo.worker.speculation import Speculation

if TYPE_CHECKING:
    from octavo.structured.grammars import Grammars

_log = logging.getLogger(__name__)

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class BuiltEngine:
    """An engine ready to step, and what was decided on the way. max_model_len is in `ready`."""

    engine: Engine
    config: EngineConfig
    source: ModelSource
    ledger: MemoryLedger
    ready: Ready


class Stopwatch:
    """Where the seconds of a start went."""

    def __init__(self) -> None:
        self._began = self._last = time.perf_counter()
        self._laps: list[str] = []

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self._laps.append(f"{name} {now - self._last:.2f} s")
        self._last = now

    def __str__(self) -> str:
        return f"{time.perf_counter() - self._began:.2f} s ({', '.join(self._laps)})"


def build_engine(options: EngineOptions) -> BuiltEngine:
    """Load the model and size its KV pool. Raises ValueError naming an option or a file, OSError for one unread."""
    watch = Stopwatch()
    source = _with_classifier(source_of(options))
    facts = model_facts(source.config)
    device = _device(options)
    config = resolve(options, facts, device)
    wanted = speculation_config(options.speculative_config, options.speculative_model, options.num_speculative_tokens)
    draft = None if wanted is None else find_draft(wanted, config)
    if draft is not None:
        config = replace(config, kv_bytes_per_token=config.kv_bytes_per_token + draft.kv_bytes_per_token)
    torch.set_num_threads(config.num_threads)
    if config.device == "cpu":
        built = _build_cpu(config, facts, source, draft, watch)
    else:
        from octavo.device_assembly import build_cuda  # brings Triton

        built = build_cuda(config, facts, source, draft, watch.lap)
    executor, ledger, bank = built
    scheduler_config = config.scheduler(ledger.num_blocks, ledger.max_model_len)
    if draft is not None:
        scheduler_config = replace(scheduler_config, **draft.scheduling(config.max_num_seqs))
    scheduler = Scheduler(scheduler_config)
    grammars = None if options.skip_tokenizer_init else _grammar_desk(source, facts.vocab_size)
    adapters = None
    if bank is not None and config.lora is not None:
        _log.info("LoRA: an adapter takes %.0f MiB", bank.slot_bytes / 1024**2)
        adapters = AdapterDesk(bank.load, bank.drop, config.lora.max_cpu_loras)
    engine = Engine(scheduler, executor, config.pipeline_depth, grammars=grammars, adapters=adapters)
    for line in (*config.decisions, *ledger.lines()):
        _log.info("%s", line)
    _log.info("%s on %s in %s, ready in %s", source.name, device.name, config.dtype, watch)
    gc.collect()
    gc.freeze()  # what is there now stays: collections need not look at it again
    ready = Ready(
        ledger.max_model_len,
        config.max_num_seqs,
        ledger.num_blocks,
        config.block_size,
        facts.vocab_size,
        0 if config.lora is None else config.lora.max_loras,
    )
    return BuiltEngine(engine, config, source, ledger, ready)


def _with_classifier(source: ModelSource) -> ModelSource:
    """The model with the ids of the tokens that classifier_from_token names. Raises ValueError for one there is not."""
    tokens = source.config.get("classifier_from_token")
    if tokens is None:
        return source
    if not isinstance(tokens, list) or not 1 <= len(tokens) <= 2 or source.outputs.head != "scores":
        raise ValueError(
            f"config field classifier_from_token={tokens!r} is not supported; allowed: one or two tokens, of a "
            "ForSequenceClassification architecture"
        )
    tokenizer = load_tokenizer(source.tokenizer_path)
    ids = [tokenizer.encode(str(token), add_special_tokens=False) for token in tokens]
    for token, found in zip(tokens, ids):
        if len(found) != 1:
            raise ValueError(
                f"config field classifier_from_token has {token!r}, which is {len(found)} tokens; allowed: 1"
            )
    return replace(source, config=source.config | {CLASSIFIER_IDS: [found[0] for found in ids]})


def _grammar_desk(source: ModelSource, vocab_size: int) -> GrammarDesk:
    """Reads the tokenizer, which the engine needs for nothing else, at the first grammar."""

    def load() -> tuple[Vocabulary, Callable[[str], list[int]]]:
        tokenizer = load_tokenizer(source.tokenizer_path)
        return vocabulary_of(tokenizer, vocab_size), partial(tokenizer.encode, add_special_tokens=False)

    def open_grammars() -> Grammars:
        from octavo.structured.grammars import Grammars  # brings llguidance

        return Grammars(load)

    return GrammarDesk(open_grammars)


def _device(options: EngineOptions) -> DeviceFacts:
    """Raises ValueError where a GPU is asked for and there is none."""
    num_threads = len(os.sched_getaffinity(0))
    if options.device != "cpu" and torch.cuda.is_available():
        return DeviceFacts(kind="cuda", num_threads=num_threads, name=torch.cuda.get_device_name())
    if options.device == "cuda":
        raise ValueError("device=cuda, and torch finds no CUDA device here; allowed: auto, cpu")
    return DeviceFacts(kind="cpu", num_threads=num_threads, name=f"{num_threads} CPU cores")


def _build_cpu(
    config: EngineConfig, facts: ModelFacts, source: ModelSource, draft: Draft | None, watch: Stopwatch
) -> tuple[Executor, MemoryLedger, AdapterBank | None]:
    _log.info("%s", library.load(home() / "kernels"))
    dtype, cpu = _DTYPES[config.dtype], torch.device("cpu")
    model = load_model(source, dtype, cpu, config.options.seed, config.quantization)
    watch.lap("weights")
    _log.info("linear layers: %.1f bits a weight in memory", model.linear_bits)
    bank = adapter_bank(config, model, dtype, cpu)
    ledger = plan_memory(config, model.weight_bytes, free_host_bytes())
    attention = CpuAttention(
        facts.num_layers, ledger.num_blocks, config.block_size, facts.num_kv_heads, facts.head_dim, dtype
    )
    sampler = Sampler(config.max_num_seqs, facts.vocab_size, cpu)
    slots = Slots(config.max_num_seqs, ledger.max_model_len, config.block_size, cpu)
    speculation, num_tapped = None, None
    if draft is not None:
        drafter, num_tapped = cpu_drafter(draft, model, slots, ledger.num_blocks)
        speculation = Speculation(drafter, slots)
        watch.lap("draft")
    runner = ModelRunner(model, attention, sampler, slots, bank, speculation, num_tapped)
    return InProcessExecutor(runner, threaded=config.pipeline_depth > 1), ledger, bank
