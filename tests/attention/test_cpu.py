"""CpuAttention against the oracle: whatever the mix of rows, whatever lies in slots that nobody wrote."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from attention_rig import NUM_BLOCKS, TOLERANCE, Rig, Shape, random_qkv
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from octavo.attention.backend import AttentionBackend, AttentionBatch
from octavo.attention.cpu import CpuAttention


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


def run(shape: Shape, rows: list[tuple[int, int]], seed: int = 0) -> None:
    """Fill the rows' contexts, then one step of them, checked."""
    starts, lengths = [start for start, _ in rows], [length for _, length in rows]
    rig = Rig(shape)
    rig.allocate([start + length for start, length in rows], seed)
    rig.fill(starts)
    batch = rig.batch(starts, lengths)
    rig.backend.prepare(batch)
    rig.step(batch, random_qkv(shape, sum(lengths), seed))


shapes = st.builds(
    Shape,
    num_kv_heads=st.integers(1, 3),
    group_size=st.integers(1, 4),
    head_dim=st.sampled_from([8, 16, 24]),
    block_size=st.sampled_from([1, 3, 4, 16]),
    dtype=st.sampled_from(list(TOLERANCE)),
    sliding_window=st.none() | st.integers(1, 12),
)
row = st.tuples(st.integers(0, 20), st.just(1) | st.integers(1, 8))


@settings(max_examples=120, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(shape=shapes, rows=st.lists(row, min_size=1, max_size=5), seed=st.integers(0, 1000))
def test_any_mix_of_rows_matches_the_oracle(shape: Shape, rows: list[tuple[int, int]], seed: int) -> None:
    run(shape, rows, seed)


CASES = {
    "one short decode": [(20, 1)],
    "one long decode": [(700, 1)],
    "decodes of unlike lengths": [(n, 1) for n in (3, 60, 17, 4, 90, 33, 8)],
    "decodes in two groups": [(400, 1), (1, 1), (2, 1), (3, 1), (390, 1), (4, 1), (5, 1), (6, 1)],
    "a prompt of several tiles": [(0, 300)],
    "a chunk of several tiles": [(77, 260)],
    "equal prompts": [(0, 5), (0, 5), (0, 5)],
    "prompts of unlike lengths": [(0, 1), (0, 9), (0, 2), (0, 14)],
    # The last two make a group, which pads to as many queries as the batch has tokens.
    "a group as large as the batch": [(0, 1), (1600, 1), (800, 2)],
    "decodes around a chunk": [(9, 1), (33, 1), (30, 140), (2, 1), (64, 1)],
}


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("window", [None, 1, 37, 150])
@pytest.mark.parametrize("name", CASES)
def test_cases_match_the_oracle(name: str, window: int | None, dtype: torch.dtype) -> None:
    run(Shape(dtype=dtype, sliding_window=window, num_kv_heads=1, group_size=3, block_size=16), CASES[name])


def test_rows_read_what_another_row_writes_in_the_same_step() -> None:
    """Sequence 1 has sequence 0's first two blocks in its table, and sequence 0 computes them just now."""
    shape = Shape(block_size=4)
    rig = Rig(shape)
    rig.allocate([11, 10])
    rig.tables[1, :2] = rig.tables[0, :2]
    starts, lengths = [0, 8], [11, 2]
    for order in ([0, 1], [1, 0]):
        ordered = rig.batch([starts[i] for i in order], [lengths[i] for i in order], order)
        rig.backend.prepare(ordered)
        rig.step(ordered, random_qkv(shape, 13))


def test_decodes_of_a_shared_prefix() -> None:
    shape = Shape(block_size=4)
    rig = Rig(shape)
    rig.allocate([20, 21, 23, 24])
    rig.fill([16, 0, 0, 0])
    rig.tables[:, :4] = rig.tables[0, :4]
    starts, lengths = [16] * 4, [4, 5, 7, 8]
    for _ in range(2):  # the second time, the rows' own blocks hold the tokens already
        batch = rig.batch(starts, lengths)
        rig.backend.prepare(batch)
        rig.step(batch, random_qkv(shape, sum(lengths)))
        starts, lengths = [start + length - 1 for start, length in zip(starts, lengths)], [1] * 4


def test_layers_have_their_own_cache_and_window() -> None:
    shape = Shape(num_layers=3)
    layers = [replace(shape, layer_index=index, sliding_window=window) for index, window in enumerate((None, 5, None))]
    rig = Rig(shape)
    rig.allocate([30, 19, 8])
    rig.fill([29, 12, 0])
    batch = rig.batch([29, 12, 0], [1, 7, 8])
    rig.backend.prepare(batch)
    for layer in layers:
        rig.step(batch, random_qkv(shape, 16, seed=layer.layer_index), layer)


def test_steps_of_a_generation() -> None:
    """Sequences that cross block boundaries at different steps, through one prefill and many decodes."""
    shape = Shape(block_size=4, dtype=torch.bfloat16)
    rig = Rig(shape)
    starts, lengths = [0, 0, 0], [3, 6, 8]
    rig.allocate([length + 10 for length in lengths])
    for step in range(10):
        batch = rig.batch(starts, lengths)
        rig.backend.prepare(batch)
        rig.step(batch, random_qkv(shape, sum(lengths), seed=step))
        starts, lengths = [start + length for start, length in zip(starts, lengths)], [1, 1, 1]


def test_a_block_that_held_nan_is_clean_for_its_next_owner() -> None:
    shape = Shape(block_size=4)
    rig = Rig(shape)
    rig.allocate([9, 40])
    rig.fill([8, 39])
    rig.poison(rig.tables[0, 2:3])  # freed by a request whose values had overflowed
    batch = rig.batch([8, 39], [1, 1])
    rig.backend.prepare(batch)
    rig.step(batch, random_qkv(shape, 2))


def test_one_rows_nan_stays_its_own() -> None:
    shape = Shape()
    rig = Rig(shape)
    rig.allocate([6, 9, 5])
    rig.fill([5, 8, 4])
    batch = rig.batch([5, 8, 4], [1, 1, 1])
    query, key, value = random_qkv(shape, 3)
    key[1] = value[1] = torch.nan
    rig.backend.prepare(batch)
    out = rig.backend.forward(shape, query, key, value)
    assert out[1].isnan().all()
    assert out[[0, 2]].isfinite().all()


@pytest.mark.parametrize("window", [None, 6])
def test_order_of_rows_does_not_matter(window: int | None) -> None:
    shape = Shape(sliding_window=window)
    starts, lengths = [0, 21, 7, 40, 3], [9, 1, 4, 1, 1]
    rig = Rig(shape)
    rig.allocate([start + length for start, length in zip(starts, lengths)])
    rig.fill(starts)
    tokens = random_qkv(shape, sum(lengths))
    parts = [torch.split(part, lengths) for part in tokens]
    results = []
    for order in ([0, 1, 2, 3, 4], [3, 0, 4, 2, 1]):
        batch = rig.batch(*([values[i] for i in order] for values in (starts, lengths)), order)  # type: ignore[arg-type]
        rig.backend.prepare(batch)
        query, key, value = (torch.cat([part[i] for i in order]) for part in parts)
        out = torch.split(rig.backend.forward(shape, query, key, value), [lengths[i] for i in order])
        results.append([out[order.index(i)] for i in range(len(order))])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("window", [None, 10])
def test_chunks_equal_the_whole(window: int | None) -> None:
    shape = Shape(sliding_window=window, block_size=16)
    tokens = random_qkv(shape, 200)
    results = []
    for chunks in ([200], [1, 15, 16, 130, 38]):
        rig = Rig(shape)
        rig.allocate([200])
        outs, start = [], 0
        for length in chunks:
            rig.backend.prepare(rig.batch([start], [length]))
            outs.append(rig.backend.forward(shape, *(part[start : start + length] for part in tokens)))
            start += length
        results.append(torch.cat(outs))
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-5)


def test_views_of_a_fused_projection_and_int32_tables() -> None:
    shape = Shape()
    rig = Rig(shape)
    rig.allocate([12, 30])
    rig.fill([11, 25])
    fused = torch.randn(6, shape.num_heads + 2 * shape.num_kv_heads, shape.head_dim)
    query, key, value = fused.split([shape.num_heads, shape.num_kv_heads, shape.num_kv_heads], dim=1)
    batch = rig.batch([11, 25], [1, 5])
    batch = AttentionBatch(batch.starts, batch.lengths, batch.block_tables.int(), batch.slot_mapping)
    rig.backend.prepare(batch)
    rig.step(batch, (query, key, value))


def test_layout_and_capability() -> None:
    backend: AttentionBackend = CpuAttention(2, 10, 16, 3, 64, torch.bfloat16)
    layout = backend.kv_layout()
    assert layout.shape == (2, 10, 2, 3, 16, 64)
    assert len(layout.dimensions) == len(layout.shape)
    assert layout.bytes_per_block == 2 * 2 * 3 * 16 * 64 * 2
    assert backend.capability.dtypes == set(TOLERANCE)


def test_memory_is_taken_only_by_blocks_in_use() -> None:
    """A cache of far more bytes than this machine may have is fine until it is used."""
    page = resource.getpagesize()

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * page

    before = resident()
    backend = CpuAttention(4, 1 << 14, 16, 4, 64, torch.float32)
    assert backend.kv_layout().bytes_per_block << 14 == 1 << 31
    backend.prepare(AttentionBatch([0], [1], torch.tensor([[5]]), torch.tensor([80])))
    assert resident() - before < 1 << 26


def test_contradictions_are_refused() -> None:
    backend = CpuAttention(1, NUM_BLOCKS, 4, 2, 16, torch.float32)
    table = torch.ones(1, 1, dtype=torch.int64)
    with pytest.raises(ValueError, match="rows"):
        backend.prepare(AttentionBatch([0, 0], [1], table, torch.tensor([4])))
    with pytest.raises(ValueError, match="slot_mapping has 2 slots for 1 tokens"):
        backend.prepare(AttentionBatch([0], [1], table, torch.tensor([4, 5])))
    with pytest.raises(ValueError, match="float16"):
        CpuAttention(1, NUM_BLOCKS, 4, 2, 16, torch.float16)
