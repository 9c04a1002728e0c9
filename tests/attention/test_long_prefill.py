"""Long prefill in dense pieces, beside the oracle: the library calls are replaced by torch operators."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from octavo.attention.long_prefill import (
    CudnnPrefill,
    FlashInferPrefill,
    LongPrefillShape,
    NoLongPrefill,
    Thresholds,
)
from octavo.kernels.reference.prefill_attention import paged_prefill
from octavo.kernels.triton.prefill_attention import MAX_PARTS

CPU = torch.device("cpu")
SHAPE = LongPrefillShape(2, 1, 64, torch.bfloat16, torch.bfloat16, 16, 2048, None, CPU)
EVERYTHING = Thresholds(2, 2)


@dataclass(frozen=True)
class Row:
    slot: int
    start: int
    length: int


class Dense:
    """A `DenseAttention` in float64 that notes the shapes it was asked for."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, int, bool]] = []

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
        self.asked.append((query.shape[2], key.shape[2], causal))
        group = query.shape[1] // key.shape[1]
        key, value = (x.double().repeat_interleave(group, 1) for x in (key, value))
        scores = query.double() @ key.transpose(2, 3) * scale
        if causal:
            hidden = torch.ones(scores.shape[2:], dtype=torch.bool).triu(1)
            scores.masked_fill_(hidden, -torch.inf)
        return (scores.softmax(-1) @ value).to(query.dtype), scores.logsumexp(-1).float()


def problem(rows: list[Row], shape: LongPrefillShape) -> tuple[Tensor, Tensor, Tensor]:
    """(query, cache, block tables) of these rows; blocks of no row hold NaN."""
    rng = torch.Generator().manual_seed(1)
    blocks = [-(-(row.start + row.length) // shape.block_size) for row in rows]
    free = (torch.randperm(sum(blocks), generator=rng) + 1).tolist()
    tables = torch.zeros(max(row.slot for row in rows) + 1, max(blocks), dtype=torch.int32)
    for row, count in zip(rows, blocks, strict=True):
        tables[row.slot, :count] = torch.tensor([free.pop() for _ in range(count)])
    cache = torch.randn(sum(blocks) + 1, 2, shape.num_kv_heads, shape.block_size, shape.head_dim, generator=rng)
    cache[0] = torch.nan
    num_tokens = sum(row.length for row in rows)
    query = torch.randn(num_tokens, shape.num_heads + 1, shape.head_dim, generator=rng)[:, : shape.num_heads]
    return query.to(shape.dtype), cache.to(shape.kv_dtype), tables


ROWS = {
    "from empty": ([Row(0, 0, 600)], {0: (0, 512)}),
    "after a prefix of whole grains": ([Row(1, 768, 300)], {0: (0, 256)}),
    "after a prefix of any length": ([Row(0, 700, 900)], {0: (68, 836)}),
    "among others": ([Row(2, 9, 1), Row(0, 250, 530), Row(1, 0, 40), Row(3, 1279, 260)], {1: (6, 518), 3: (1, 257)}),
    "too little left for a piece": ([Row(0, 255, 256)], {}),
}


@pytest.mark.parametrize(("rows", "taken"), ROWS.values(), ids=ROWS.keys())
@pytest.mark.parametrize("kv_dtype", [torch.bfloat16, torch.float8_e4m3fn])
def test_dense_pieces_equal_the_oracle(
    rows: list[Row], taken: dict[int, tuple[int, int]], kv_dtype: torch.dtype
) -> None:
    shape = replace(SHAPE, kv_dtype=kv_dtype)
    query, cache, tables = problem(rows, shape)
    dense = Dense()
    strategy = CudnnPrefill(shape, EVERYTHING, 1024, dense)
    assert strategy.prepare(rows, tables) == taken
    out, expected = (torch.full(query.shape, torch.nan, dtype=query.dtype) for _ in range(2))
    strategy.forward(0, query, cache, out, 0.2)
    paged_prefill(query, cache, tables, [(r.slot, r.start, r.length) for r in rows], expected, 0.2)
    token = 0
    for index, row in enumerate(rows):
        first, last = taken.get(index, (0, 0))
        ours = slice(token + first, token + last)
        torch.testing.assert_close(out[ours], expected[ours], rtol=2e-2, atol=2e-2)
        assert out[token : token + first].isnan().all()
        assert out[token + last : token + row.length].isnan().all()
        token += row.length
    causal, runs = {(256, 256, True)}, {(256, keys, False) for keys in (256, 512, 1024)}
    assert set(dense.asked) <= causal | runs


def test_what_pieces_leave_is_cut_into_quarters() -> None:
    shape = replace(SHAPE, max_context=4096)
    query, cache, tables = problem([Row(0, 116, 600)], shape)
    dense = Dense()
    strategy = CudnnPrefill(shape, EVERYTHING, 256, dense)
    assert strategy.prepare([Row(0, 116, 600)], tables) == {0: (12, 12 + 2 * 256 + 64)}
    out, expected = (torch.full(query.shape, torch.nan, dtype=query.dtype) for _ in range(2))
    strategy.forward(0, query, cache, out, 0.2)
    paged_prefill(query, cache, tables, [(0, 116, 600)], expected, 0.2)
    torch.testing.assert_close(out[12:588], expected[12:588], rtol=2e-2, atol=2e-2)
    assert out[:12].isnan().all()
    assert out[588:].isnan().all()
    assert set(dense.asked) <= {
        *((n, n, True) for n in (256, 64)),
        *((n, keys, False) for n in (256, 64) for keys in (64, 128, 256, 512)),
    }


@given(st.integers(0, 900_000), st.integers(2, 20_000), st.sampled_from([256, 768, 4096]))
def test_pieces_follow_each_other_and_one_merge_takes_what_each_sees(start: int, length: int, piece: int) -> None:
    strategy = CudnnPrefill(replace(SHAPE, max_context=1), EVERYTHING, piece, Dense())
    taken = strategy.prepare([Row(0, start, length)], torch.zeros(1, 1))
    grain = piece // 4
    if not taken:
        assert length < 2 * grain - 1
        return
    at, last = taken[0]
    assert at < grain
    for cut in strategy._rows[0].pieces:
        assert (cut.token, cut.position) == (at, start + at)
        runs = strategy._runs(cut.position)
        assert sum(runs) == cut.position
        assert all(run % piece == 0 or run in (grain, 2 * grain) for run in runs)
        assert len(runs) < MAX_PARTS
        at += cut.length
    assert at == last <= length < last + grain


def test_short_rows_are_left_to_the_kernel() -> None:
    tables = torch.zeros(1, 512, dtype=torch.int32)
    strategy = CudnnPrefill(replace(SHAPE, max_context=8192), attend=Dense())
    assert strategy.prepare([Row(0, 0, 4095)], tables) == {}
    assert strategy.prepare([Row(0, 7000, 1000)], tables) == {}
    assert strategy.prepare([Row(0, 0, 4096)], tables) == {0: (0, 4096)}
    assert NoLongPrefill().prepare([Row(0, 0, 9000)], tables) == {}
    NoLongPrefill().forward(0, tables, tables, tables, 1.0)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"dtype": torch.float32}, "dtype=torch.float32"),
        ({"head_dim": 256}, "head_dim=256"),
        ({"sliding_window": 100}, "sliding_window=100"),
    ],
)
def test_what_is_not_served_is_refused(change: dict[str, Any], name: str) -> None:
    with pytest.raises(ValueError, match=name):
        CudnnPrefill(replace(SHAPE, **change))
    if "head_dim" not in change:
        with pytest.raises(ValueError, match=name):
            FlashInferPrefill(replace(SHAPE, **change))
    with pytest.raises(ValueError, match="piece=102"):
        CudnnPrefill(SHAPE, piece=102)


class FakeWrapper:
    """The part of FlashInfer's wrapper that is called, by the oracle."""

    def __init__(self, workspace: Tensor, kv_layout: str, backend: str) -> None:
        assert (kv_layout, backend, workspace.dtype) == ("HND", "fa3", torch.uint8)

    def plan(self, *args: Any, causal: bool, **dtypes: torch.dtype) -> None:
        self.qo_indptr, self.kv_indptr, self.indices, self.last, *self.sizes = args
        assert causal
        assert dtypes == {"q_data_type": SHAPE.dtype, "kv_data_type": SHAPE.kv_dtype}

    def run(self, query: Tensor, cache: Tensor, q_scale: float, out: Tensor) -> None:
        heads, kv_heads, head_dim, size = self.sizes
        assert query.shape == (int(self.qo_indptr[-1]), heads, head_dim)
        assert cache.shape[1:] == (2, kv_heads, size, head_dim)
        counts = self.kv_indptr.diff().tolist()
        tables = torch.zeros(len(counts), max(counts), dtype=torch.int32)
        rows = []
        for row, (blocks, length) in enumerate(zip(counts, self.qo_indptr.diff().tolist(), strict=True)):
            tables[row, :blocks] = self.indices[self.kv_indptr[row] : self.kv_indptr[row + 1]]
            end = (blocks - 1) * size + int(self.last[row])
            rows.append((row, end - length, length))
        paged_prefill(query, cache, tables, rows, out, q_scale * head_dim**-0.5)


def test_flashinfer_is_told_where_the_rows_lie(monkeypatch: pytest.MonkeyPatch) -> None:
    module = SimpleNamespace(BatchPrefillWithPagedKVCacheWrapper=FakeWrapper)
    monkeypatch.setitem(sys.modules, "flashinfer", module)
    rows = [Row(0, 30, 50), Row(2, 0, 64), Row(3, 5, 1), Row(1, 17, 20)]
    query, cache, tables = problem(rows, SHAPE)
    strategy = FlashInferPrefill(SHAPE, EVERYTHING)
    for _ in range(2):  # the second step uses the wrappers of the first
        assert strategy.prepare(rows, tables) == {0: (0, 50), 1: (0, 64), 3: (0, 20)}
    out, expected = (torch.full(query.shape, torch.nan, dtype=query.dtype) for _ in range(2))
    strategy.forward(0, query, cache, out, 0.2)
    paged_prefill(query, cache, tables, [(r.slot, r.start, r.length) for r in rows], expected, 0.2)
    assert out[114].isnan().all()
    out[114] = expected[114]
    torch.testing.assert_close(out, expected, rtol=2e-2, atol=2e-2)
