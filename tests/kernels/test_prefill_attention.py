"""The prefill kernels beside their oracles; without a GPU, in Triton's interpreter."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from octavo.attention.prefill_items import max_prefill_items, prefill_items, tokens_per_item
from octavo.kernels.reference import prefill_attention as reference
from octavo.kernels.triton import prefill_attention as kernels
from octavo.kernels.triton.prefill_attention import PrefillTuning

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
FP8 = torch.float8_e4m3fn


SMALL = PrefillTuning(64, 32, 4, 2)


@dataclass(frozen=True)
class Case:
    """Rows of (start, length), in slots of falling number, and the shape of their layer."""

    rows: tuple[tuple[int, int], ...]
    group: int = 4
    kv_heads: int = 1
    head_dim: int = 32
    block_size: int = 16
    dtype: torch.dtype = torch.float32
    kv_dtype: torch.dtype | None = None
    window: int | None = None
    tuning: PrefillTuning | None = SMALL


class Rig:
    """A NaN-filled cache with the rows' keys and values in scattered blocks, and their queries."""

    def __init__(self, case: Case, seed: int = 0) -> None:
        self.case = case
        rng = torch.Generator().manual_seed(seed)
        size, kv_dtype = case.block_size, case.kv_dtype or case.dtype
        num_blocks = [-(-(start + length) // size) for start, length in case.rows]
        free = (torch.randperm(sum(num_blocks) + 2, generator=rng) + 1).tolist()
        shape = (len(free) + 1, 2, case.kv_heads, size, case.head_dim)
        cache = torch.full(shape, torch.nan)
        self.slots = list(range(len(case.rows), 0, -1))
        # Entries past a row's last block name no block at all: reading one would fault, or find NaN.
        tables = torch.full((len(case.rows) + 1, max(num_blocks) + 1), 2**30, dtype=torch.int32)
        for slot, count, (start, length) in zip(self.slots, num_blocks, case.rows, strict=True):
            for index in range(count):
                block = tables[slot, index] = free.pop()
                live = min(size, start + length - index * size)
                cache[block, :, :, :live] = torch.randn(2, case.kv_heads, live, case.head_dim, generator=rng)
        self.cache, self.tables = cache.to(kv_dtype).to(DEVICE), tables.to(DEVICE)
        self.starts = np.array([start for start, _ in case.rows], np.int32)
        self.lengths = np.array([length for _, length in case.rows], np.int32)
        self.num_tokens = int(self.lengths.sum())
        heads = case.kv_heads * case.group
        # As the queries of a fused projection lie: rows longer than their heads.
        wide = torch.randn(self.num_tokens, heads + 2, case.head_dim, generator=rng).to(case.dtype).to(DEVICE)
        self.query = wide[:, :heads]
        self.scale = case.head_dim**-0.5

    def expected(self) -> Tensor:
        out = torch.full(self.query.shape, torch.nan, dtype=self.query.dtype, device=DEVICE)
        rows = [(slot, *row) for slot, row in zip(self.slots, self.case.rows, strict=True)]
        reference.paged_prefill(self.query, self.cache, self.tables, rows, out, self.scale, self.case.window)
        return out

    def run(self, items: np.ndarray, tuning: PrefillTuning | None, block_m: int = 128) -> Tensor:
        out = torch.full(self.query.shape, torch.nan, dtype=self.query.dtype, device=DEVICE)
        padding = [0, 0]  # a padding row of length 1, and its items
        kernels.paged_prefill(
            self.query,
            self.cache,
            self.tables,
            torch.tensor([*self.slots, -1], dtype=torch.int32, device=DEVICE),
            torch.tensor([*self.starts, padding[0]], dtype=torch.int32, device=DEVICE),
            torch.tensor([0, *np.cumsum([*self.lengths, 1])], dtype=torch.int32, device=DEVICE),
            torch.from_numpy(np.concatenate((items, [[-1, 0]])).astype(np.int32)).to(DEVICE),
            out,
            self.scale,
            self.case.window,
            block_m,
            tuning,
        )
        return out


CASES = {
    "one row, from empty": Case(((0, 40),)),
    "chunk after a prefix": Case(((37, 30),)),
    "rows of all kinds": Case(((0, 2), (50, 17), (16, 16), (3, 33)), kv_heads=2),
    "group of 1": Case(((5, 70),), group=1),
    "group of 3": Case(((20, 35),), group=3, kv_heads=2),
    "group of 16": Case(((20, 9),), group=16),
    "tile within a block": Case(((70, 60), (0, 9)), block_size=64),
    "blocks of another size": Case(((30, 40),), block_size=48),
    "window": Case(((60, 50), (0, 30)), window=24),
    "window of one": Case(((9, 12),), window=1),
    "window wider than all": Case(((9, 30),), window=100),
    "window, tile within a block": Case(((100, 40),), block_size=64, window=70),
    "head_dim 80": Case(((20, 30),), head_dim=80),
    "bfloat16": Case(((33, 40), (0, 20)), dtype=torch.bfloat16),
    "float16": Case(((33, 40),), dtype=torch.float16),
    "float8 cache": Case(((33, 40), (0, 20)), dtype=torch.bfloat16, kv_dtype=FP8),
    "float8 cache, window": Case(((33, 40),), dtype=torch.bfloat16, kv_dtype=FP8, window=20),
    "own tuning": Case(((10, 50),), block_size=64, dtype=torch.bfloat16, tuning=None),
    "own tuning, float32": Case(((10, 50),), tuning=None),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_paged_prefill_equals_the_oracle(case: Case) -> None:
    rig = Rig(case)
    items = prefill_items(rig.starts, rig.lengths, case.group)  # each split in two by tiles of 64 rows
    tolerance = TOLERANCE[case.dtype]
    torch.testing.assert_close(rig.run(items, case.tuning), rig.expected(), rtol=tolerance, atol=tolerance)


def test_only_the_items_are_written() -> None:
    rig = Rig(Case(((0, 40), (5, 3))))
    items = prefill_items(rig.starts, rig.lengths, 4, 64, {0: (16, 32)})
    out, expected = rig.run(items, SMALL, 64), rig.expected()
    assert out[16:32].isnan().all()
    done = [*range(16), *range(32, 43)]
    torch.testing.assert_close(out[done], expected[done], rtol=2e-5, atol=2e-5)


def test_paged_prefill_refuses() -> None:
    rig = Rig(Case(((0, 4),), head_dim=24))
    with pytest.raises(ValueError, match="head_dim=24"):
        rig.run(np.zeros((1, 2), np.int32), None)
    rig = Rig(Case(((0, 4),), group=16))
    with pytest.raises(ValueError, match="tiles of 8 rows"):
        rig.run(np.zeros((1, 2), np.int32), PrefillTuning(8))


@pytest.mark.parametrize(("block_m", "group"), [(128, 4), (128, 3), (64, 1), (16, 16)])
def test_items_cover_every_token_once_and_long_contexts_first(block_m: int, group: int) -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        num_rows = int(rng.integers(1, 20))
        starts = rng.integers(0, 1000, num_rows).astype(np.int32)
        lengths = rng.integers(1, 300, num_rows).astype(np.int32)
        taken = {int(row): (70, 130) for row in np.flatnonzero(lengths > 200)[:2]}
        items = prefill_items(starts, lengths, group, block_m, taken)
        step = tokens_per_item(group, block_m)
        assert items.dtype == np.int32
        assert len(prefill_items(starts, lengths, group, block_m)) <= max_prefill_items(
            int(lengths.sum()), num_rows, group, block_m
        )
        covered = [np.zeros(length, int) for length in lengths]
        for row, offset in items:
            covered[row][offset : offset + step] += 1
        for row, counts in enumerate(covered):
            first, last = taken.get(row, (0, 0))
            wanted = np.ones_like(counts) if lengths[row] > 1 else np.zeros_like(counts)
            wanted[first:last] = counts[first:last]  # a tile may reach into what is computed elsewhere
            assert (counts == wanted).all()
            assert counts[min(last, first + step) : last].sum() == 0
        context = starts[items[:, 0]] + items[:, 1]
        assert (np.diff(context) <= 0).all()


def test_no_items_without_rows_of_several_tokens() -> None:
    assert prefill_items(np.array([3], np.int32), np.array([1], np.int32), 4).shape == (0, 2)
    assert max_prefill_items(1, 1, 4) == 0
    with pytest.raises(ValueError, match="group_size=32"):
        tokens_per_item(32, 16)


@pytest.mark.parametrize("kv_dtype", [torch.bfloat16, FP8])
@pytest.mark.parametrize("num_tokens", [1, 70, 96])
def test_gather_kv_equals_the_oracle(kv_dtype: torch.dtype, num_tokens: int) -> None:
    rig = Rig(Case(((50, 46),), kv_heads=2, head_dim=48, dtype=torch.bfloat16, kv_dtype=kv_dtype))
    outs = [torch.full((2, 2, 100, 48), -1.0, dtype=torch.bfloat16, device=DEVICE) for _ in range(2)]
    for gather, out in zip((kernels.gather_kv, reference.gather_kv), outs, strict=True):
        gather(rig.cache, rig.tables[1], num_tokens, out)
    assert not outs[0].isnan().any()
    assert torch.equal(*outs)


@pytest.mark.parametrize("count", range(1, kernels.MAX_PARTS + 1))
def test_merge_attention_equals_the_oracle(count: int) -> None:
    rng = torch.Generator().manual_seed(count)
    parts = [torch.randn(20, 3, 32, generator=rng).to(DEVICE).transpose(0, 1) for _ in range(count)]
    sums = [(torch.randn(3, 20, generator=rng) * 30).to(DEVICE) for _ in range(count)]
    outs = [torch.full((20, 4, 32), torch.nan, device=DEVICE)[:, :3] for _ in range(2)]
    for merge, out in zip((kernels.merge_attention, reference.merge_attention), outs, strict=True):
        merge(parts, sums, out)
    torch.testing.assert_close(*outs, rtol=1e-5, atol=1e-5)


def test_merge_attention_refuses_more_than_it_can() -> None:
    parts, sums = [torch.zeros(1, 1, 16)] * 9, [torch.zeros(1, 1)] * 9
    with pytest.raises(ValueError, match="9 parts"):
        kernels.merge_attention(parts, sums, torch.zeros(1, 1, 16))
