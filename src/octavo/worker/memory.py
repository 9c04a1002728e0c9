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

    @property
    def num_tokens(self) -> int:
        """Tokens whose KV entries fit."""
        return (self.num_blocks - 1) * self.block_size

    def lines(self) -> list[str]:
        """The ledger in words, for the log."""
        whole = self.num_tokens / self.max_model_len
        return [
            f"weights {self.weight_bytes / _MIB:,.0f} MiB",
            f"KV cache {self.kv_bytes / _MIB:,.0f} MiB: {self.num_blocks - 1:,} blocks of {self.block_size}, "
            f"{self.num_tokens:,} tokens, {whole:.1f} concurrent requests of {self.max_model_len:,} tokens",
        ]


def plan_memory(config: EngineConfig, weight_bytes: int, free_bytes: int) -> MemoryLedger:
    """Size the KV pool: what the user said, else a fraction of what is free once the weights are in,
    and no more than max_num_seqs sequences of max_model_len could fill.

    Raises ValueError when not even one sequence of max_model_len fits, saying what to change.
    """
    block_size = config.options.block_size
    block_bytes = config.kv_bytes_per_token * block_size
    blocks_per_sequence = -(-config.max_model_len // block_size)
    budget = config.kv_cache_memory
    if budget is None:
        budget = int(free_bytes * config.memory_fraction)
        budget = min(budget, (config.max_num_seqs * blocks_per_sequence + 1) * block_bytes)
    num_blocks = budget // block_bytes
    if num_blocks - 1 < blocks_per_sequence:
        fits = max(0, (num_blocks - 1) * block_size)
        needs = (blocks_per_sequence + 1) * block_bytes / _MIB
        raise ValueError(
            f"max_model_len={config.max_model_len} needs {needs:,.0f} MiB of KV cache, but there are "
            f"{budget / _MIB:,.0f} MiB: lower max_model_len to {fits} or less, or raise kv_cache_memory"
        )
    return MemoryLedger(
        weight_bytes=weight_bytes,
        kv_bytes=num_blocks * block_bytes,
        num_blocks=num_blocks,
        block_size=block_size,
        max_model_len=config.max_model_len,
    )


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
