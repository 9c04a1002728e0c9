"""Sizing the KV pool, and what the ledger says of it."""

from __future__ import annotations

from typing import Literal

import pytest

from octavo.config import DeviceFacts, EngineConfig, EngineOptions, ModelFacts, resolve
from octavo.worker.memory import DeviceMemory, free_host_bytes, plan_device_memory, plan_memory

MIB = 1024**2
# 2 (K and V) * 4 layers * 2 heads * 32 dims * 4 bytes = 2 KiB a token in float32, 32 KiB a block of 16.
FACTS = ModelFacts(max_position_embeddings=1024, vocab_size=100, num_layers=4, num_kv_heads=2, head_dim=32)


def config(kind: Literal["cpu", "cuda"] = "cpu", **options: object) -> EngineConfig:
    made = EngineOptions(dtype="float32", **options)  # type: ignore[arg-type]
    return resolve(made, FACTS, DeviceFacts(kind=kind, num_threads=2))


def test_what_the_user_says_is_what_is_used() -> None:
    ledger = plan_memory(config(kv_cache_memory="4MiB"), weight_bytes=0, free_bytes=0)
    assert ledger.num_blocks == 128
    assert ledger.num_tokens == 127 * 16
    assert ledger.kv_bytes == 4 * MIB


def test_a_fraction_of_what_is_free() -> None:
    ledger = plan_memory(config(gpu_memory_utilization=0.5, max_num_seqs=64), weight_bytes=7, free_bytes=8 * MIB)
    assert ledger.num_blocks == 128
    assert ledger.weight_bytes == 7


def test_no_more_than_the_sequences_could_fill() -> None:
    ledger = plan_memory(config(max_num_seqs=2, max_model_len=160), weight_bytes=0, free_bytes=10**12)
    assert ledger.num_blocks == 2 * 10 + 1


def test_too_little_says_what_fits() -> None:
    with pytest.raises(
        ValueError,
        match=r"max_model_len=1024 needs 3 MiB .* there are 1 MiB, 2 MiB too little: lower max_model_len to 496",
    ):
        plan_memory(config(kv_cache_memory="1MiB"), weight_bytes=0, free_bytes=0)
    with pytest.raises(ValueError, match=r"needs 3 MiB .* there are 2 MiB, 1 MiB too little: lower .* to 1008"):
        plan_memory(config(kv_cache_memory="2MiB"), weight_bytes=0, free_bytes=0)
    assert plan_memory(config(kv_cache_memory="3MiB"), weight_bytes=0, free_bytes=0).max_model_len == 1024


STEPS = "lower max_num_batched_tokens or max_num_seqs"


@pytest.mark.parametrize(
    ("options", "free", "advice"),
    [
        ({}, 4, "lower max_model_len to 800 or less, or raise gpu_memory_utilization, or give kv_cache_memory"),
        ({}, 0, "raise gpu_memory_utilization, or give kv_cache_memory"),
        ({"kv_cache_memory": "1MiB"}, 4, "lower max_model_len to 496 or less, or raise kv_cache_memory"),
        ({"kv_cache_memory": "1KiB", "max_model_len": "auto"}, 4, "raise kv_cache_memory"),
    ],
)
def test_too_little_on_a_cpu_names_what_decides(options: dict[str, object], free: int, advice: str) -> None:
    with pytest.raises(ValueError, match=rf"too little: {advice}$"):
        plan_memory(config(**options), weight_bytes=0, free_bytes=free * MIB)


@pytest.mark.parametrize(
    ("options", "free", "advice"),
    [
        ({}, 9, f"4 MiB too little: {STEPS}, or raise gpu_memory_utilization"),
        ({}, 12, f"1 MiB too little: lower max_model_len to 960 or less, or {STEPS}, or raise gpu_memory_utilization"),
        (
            {"kv_cache_memory": "1MiB"},
            13,
            "2 MiB too little: lower max_model_len to 448 or less, or raise kv_cache_memory",
        ),
        ({"kv_cache_memory": "4MiB"}, 9, f"the 1048576 bytes left .*: lower it by 3 MiB, or {STEPS}"),
        ({"kv_cache_memory": str(MIB + 1)}, 9, f"the 1048576 bytes left .*: lower it by 1 MiB, or {STEPS}"),
        ({"kv_cache_memory": "4MiB"}, 7, f"the 0 bytes left .*: {STEPS}"),
    ],
)
def test_too_little_on_a_gpu_names_what_decides(options: dict[str, object], free: int, advice: str) -> None:
    device = DeviceMemory(total=20 * MIB, free=free * MIB, activations=6 * MIB, graphs=2 * MIB)
    with pytest.raises(ValueError, match=rf"{advice}$"):
        plan_device_memory(config("cuda", **options), weight_bytes=0, device=device)


def test_lines_name_tokens_and_whole_requests() -> None:
    lines = plan_memory(config(kv_cache_memory="4MiB"), weight_bytes=3 * MIB, free_bytes=0).lines()
    assert lines[0] == "weights 3 MiB"
    assert "2,032 tokens, 2.0 concurrent requests of 1,024 tokens" in lines[1]


def test_free_host_bytes_is_within_the_machine() -> None:
    assert 0 < free_host_bytes() < 2**50
