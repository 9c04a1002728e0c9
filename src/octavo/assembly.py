"""Puts an engine together: source, configuration, model, KV pool, sampler, scheduler. A composition root."""

from __future__ import annotations

import logging
import os
import time
from dataclasses import dataclass

import torch

from octavo.attention.cpu import CpuAttention
from octavo.config import DeviceFacts, EngineConfig, EngineOptions, home, resolve
from octavo.distributed.executor import InProcessExecutor
from octavo.engine.engine import Engine
from octavo.kernels.cpu import library
from octavo.loading.source import ModelSource, resolve_source
from octavo.loading.weights import load_model
from octavo.models.registry import model_facts
from octavo.protocol.messages import Ready
from octavo.scheduler.scheduler import Scheduler
from octavo.worker.memory import MemoryLedger, free_host_bytes, plan_memory
from octavo.worker.model_runner import ModelRunner
from octavo.worker.sampler.sampler import Sampler
from octavo.worker.slots import Slots

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class BuiltEngine:
    """An engine ready to step, and what was decided on the way."""

    engine: Engine
    config: EngineConfig
    source: ModelSource
    ledger: MemoryLedger
    ready: Ready


def build_engine(options: EngineOptions) -> BuiltEngine:
    """Load the model and size its KV pool. Raises ValueError naming an option or a file, OSError for one unread."""
    began = time.perf_counter()
    source = resolve_source(
        options.model, revision=options.revision, load_format=options.load_format, tokenizer=options.tokenizer
    )
    facts = model_facts(source.config)
    device = DeviceFacts(kind="cpu", num_threads=len(os.sched_getaffinity(0)))
    config = resolve(options, facts, device)
    torch.set_num_threads(config.num_threads)
    _log.info("%s", library.load(home() / "kernels"))
    dtype = {"bfloat16": torch.bfloat16, "float32": torch.float32}[config.dtype]
    cpu = torch.device("cpu")
    model = load_model(source, dtype, cpu, options.seed)
    loaded = time.perf_counter()

    ledger = plan_memory(config, model.weight_bytes, free_host_bytes())
    attention = CpuAttention(
        facts.num_layers, ledger.num_blocks, options.block_size, facts.num_kv_heads, facts.head_dim, dtype
    )
    sampler = Sampler(config.max_num_seqs, facts.vocab_size, cpu)
    slots = Slots(config.max_num_seqs, config.max_model_len, options.block_size, cpu)
    runner = ModelRunner(model, attention, sampler, slots)
    scheduler = Scheduler(config.scheduler(ledger.num_blocks))
    executor = InProcessExecutor(runner, threaded=config.pipeline_depth > 1)
    engine = Engine(scheduler, executor, config.pipeline_depth)

    for line in (*config.decisions, *ledger.lines()):
        _log.info("%s", line)
    _log.info(
        "%s ready in %.2f s (weights %.2f s), %s, %d threads",
        source.name,
        time.perf_counter() - began,
        loaded - began,
        config.dtype,
        config.num_threads,
    )
    ready = Ready(config.max_model_len, config.max_num_seqs, ledger.num_blocks, options.block_size, facts.vocab_size)
    return BuiltEngine(engine, config, source, ledger, ready)
