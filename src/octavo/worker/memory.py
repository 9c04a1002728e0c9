"""How much memory the KV cache gets, and the ledger that says so."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from octavo.config import EngineConfig

_MIB = 1024**2


@dataclass(frozen=True)
class MemoryLedger:
    """Where the memory went. Sizes in bytes; num_blocks counts the null block too."""

    weight_bytes: int
    kv_bytes: int
    num_blocks: int
    block_size: int
    max_model_len: int
    activation_bytes: int = 0
    """What the largest step takes beside the weights; known on a GPU only, where it is set aside."""
    graph_bytes: int = 0
    """What CUDA graphs are expected to take."""
    free_bytes: int = 0
    """What is left to others on the GPU."""

    @property
    def num_tokens(self) -> int:
        """Tokens whose KV entries fit."""
        return (self.num_blocks - 1) * self.block_size

    def lines(self) -> list[str]:
        """The ledger in words, for the log."""
        whole = self.num_tokens / self.max_model_len
        lines = [f"weights {self.weight_bytes / _MIB:,.0f} MiB"]
        if self.activation_bytes:
            lines.append(
                f"largest step {self.activation_bytes / _MIB:,.0f} MiB, graphs {self.graph_bytes / _MIB:,.0f} MiB, "
                f"left free {self.free_bytes / _MIB:,.0f} MiB"
            )
        return [
            *lines,
            f"KV cache {self.kv_bytes / _MIB:,.0f} MiB: {self.num_blocks - 1:,} blocks of {self.block_size}, "
            f"{self.num_tokens:,} tokens, {whole:.1f} concurrent requests of {self.max_model_len:,} tokens",
        ]


def plan_memory(config: EngineConfig, weight_bytes: int, free_bytes: int) -> MemoryLedger:
    """Size the KV pool of a CPU: what the user said, else a fraction of what is free once the weights are in.

    Raises ValueError when not even one sequence of max_model_len fits, saying what to change.
    """
    budget = config.kv_cache_memory
    if budget is None:
        budget = int(free_bytes * config.memory_fraction)
    return MemoryLedger(weight_bytes=weight_bytes, **_pool(config, budget))


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """A GPU once the weights are in. Sizes in bytes.

    total, free: of the device, as the driver tells; activations: of the largest step; graphs: expected.
    """

    total: int
    free: int
    activations: int
    graphs: int


def plan_device_memory(config: EngineConfig, weight_bytes: int, device: DeviceMemory) -> MemoryLedger:
    """Size the KV pool of a GPU: kv_cache_memory if it is given, else what memory_fraction of the device leaves beside
    everything that is in use or set aside.

    Raises ValueError when that is too little, or more than there is, saying what to change.
    """
    aside = device.activations + device.graphs
    left = device.free - aside
    budget = config.kv_cache_memory
    if budget is None:
        budget = int(device.total * config.memory_fraction) - (device.total - device.free) - aside
    elif budget > left:
        steps = "lower max_num_batched_tokens or max_num_seqs"
        advice = f"lower it by {-((left - budget) // _MIB):,} MiB, or {steps}" if left > 0 else steps
        raise ValueError(
            f"kv_cache_memory={budget} is more than the {max(0, left)} bytes left beside the weights and the largest "
            f"step: {advice}"
        )
    pool = _pool(config, budget)
    return MemoryLedger(
        weight_bytes=weight_bytes,
        activation_bytes=device.activations,
        graph_bytes=device.graphs,
        free_bytes=left - pool["kv_bytes"],
        **pool,
    )


def _pool(config: EngineConfig, budget: int) -> dict[str, int]:
    """The pool's part of the ledger: unless kv_cache_memory says how much, no more than max_num_seqs sequences of
    max_model_len could fill."""
    block_size = config.block_size
    block_bytes = config.kv_bytes_per_token * block_size
    max_model_len = config.max_model_len
    blocks_per_sequence = -(-max_model_len // block_size)
    if config.kv_cache_memory is None:
        budget = min(budget, (config.max_num_seqs * blocks_per_sequence + 1) * block_bytes)
    num_blocks = budget // block_bytes
    fits = max(0, (num_blocks - 1) * block_size)
    if config.shrinks and fits:
        max_model_len = min(max_model_len, fits)
    if fits < max_model_len:
        needs = (blocks_per_sequence + 1) * block_bytes
        # Rounded so that what it needs is enough, and what is missing never 0.
        needed, there, missing = -(-needs // _MIB), max(0, budget) // _MIB, -((budget - needs) // _MIB)
        raise ValueError(
            f"max_model_len={max_model_len} needs {needed:,} MiB of KV cache, but there are {there:,} MiB, "
            f"{missing:,} MiB too little: {_advice(config, fits)}"
        )
    return {
        "kv_bytes": num_blocks * block_bytes,
        "num_blocks": num_blocks,
        "block_size": block_size,
        "max_model_len": max_model_len,
    }


def _advice(config: EngineConfig, fits: int) -> str:
    """What helps where the pool is too small. fits: tokens that it holds."""
    ways = [f"lower max_model_len to {fits} or less"] if fits else []
    if config.kv_cache_memory is not None:
        ways.append("raise kv_cache_memory")
    elif config.device == "cpu":
        ways += ["raise gpu_memory_utilization", "give kv_cache_memory"]
    else:  # steps take of the same memory
        ways += ["lower max_num_batched_tokens or max_num_seqs", "raise gpu_memory_utilization"]
    return ", or ".join(ways)


def free_host_bytes() -> int:
    """RAM that can still be used: what the kernel calls available, within the control group's limit."""
    available = 0
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            available = int(line.split()[1]) * 1024
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        if limit != "max":
            used = int(Path("/sys/fs/cgroup/memory.current").read_text())
            available = min(available, max(0, int(limit) - used))
    except (OSError, ValueError):
        pass  # no control group v2 here: the machine's own figure stands
    return available
