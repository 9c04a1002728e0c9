"""Split paged decode attention against the float64 oracle, on the GPU or in Triton's interpreter."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from torch import Tensor

from octavo.attention.work_items import DecodePlanner
from octavo.kernels.reference import decode_attention as reference
from octavo.kernels.triton.decode_attention import DecodeConfig, DecodeScratch, decode_scratch, paged_decode

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
# Cuts rows at every 128 positions, as long as there are at most 64 pieces.
FINE = DecodePlanner(16, 2, min_positions=128, programs_per_processor=8)


@dataclass
class Case:
    """One decode step of sequences of `lengths` positions; sequence i has slot num_sequences - i.

    shares: rows of each sequence, which share its items: of its last tokens; one where nothing is said.
    """

    lengths: list[int]
    num_kv_heads: int = 2
    group_size: int = 2
    head_dim: int = 16
    block_size: int = 16
    dtype: torch.dtype = torch.float32
    cache_dtype: torch.dtype | None = None
    planner: DecodePlanner = FINE
    shares: list[int] = field(default_factory=list)
    query: Tensor = field(init=False)
    cache: Tensor = field(init=False)
    block_tables: Tensor = field(init=False)
    row_slots: Tensor = field(init=False)
    cu_q: Tensor = field(init=False)
    items: Tensor = field(init=False)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        sequences, num_heads = len(self.lengths), self.num_kv_heads * self.group_size
        shares = self.shares or [1] * sequences
        rows = sum(shares)
        counts = [-(-length // self.block_size) for length in self.lengths]
        num_blocks = sum(counts) + 3
        shape = (num_blocks, 2, self.num_kv_heads, self.block_size, self.head_dim)
        values = torch.randn(shape, generator=generator)
        self.block_tables = torch.full((sequences + 1, max(counts) + 1), -1, dtype=torch.int32)
        free = (torch.randperm(num_blocks - 1, generator=generator) + 1).tolist()
        poisoned = torch.full(shape, torch.nan)
        for index, (length, count) in enumerate(zip(self.lengths, counts)):
            blocks = [free.pop() for _ in range(count)]
            self.block_tables[sequences - index, :count] = torch.tensor(blocks)
            # What no row sees stays NaN, the rest of a row's last block too.
            poisoned[blocks[:-1]] = values[blocks[:-1]]
            rest = length - (count - 1) * self.block_size
            poisoned[blocks[-1], :, :, :rest] = values[blocks[-1], :, :, :rest]
        self.cache = poisoned.to(self.cache_dtype or self.dtype)
        self.query = torch.randn(rows, num_heads, self.head_dim, generator=generator).to(self.dtype)
        self.row_slots = torch.arange(sequences, 0, -1, dtype=torch.int32).repeat_interleave(torch.tensor(shares))
        self.cu_q = torch.arange(rows + 1, dtype=torch.int32)
        firsts = np.cumsum([0, *shares[:-1]])
        self.items = torch.from_numpy(self.planner.plan(self.lengths, firsts, shares=shares))
        for name in ("cache", "query", "block_tables", "row_slots", "cu_q", "items"):
            setattr(self, name, getattr(self, name).to(DEVICE))

    def scratch(self) -> DecodeScratch:
        """All NaN, so that nothing unwritten is read unnoticed."""
        rows, num_heads, head_dim = self.query.shape
        made = decode_scratch(len(self.items), rows, num_heads, self.num_kv_heads, head_dim, DEVICE, self.queries)
        made.acc.fill_(torch.nan)
        made.lse.fill_(torch.nan)
        return made

    @property
    def queries(self) -> int:
        """The power of two that the kernel is to have room for."""
        return 1 << (max(self.shares, default=1) - 1).bit_length()

    def check(self, window: int | None = None, config: DecodeConfig | None = None, beside: bool = False) -> None:
        """The kernel and the oracle agree at every token, those of rows without items (NaN) included."""
        scale, scratch = self.head_dim**-0.5, self.scratch()
        actual = torch.full(self.query.shape, torch.nan, dtype=self.dtype, device=DEVICE)
        expected = torch.full(self.query.shape, torch.nan, dtype=torch.float64)
        on_cpu = [getattr(self, n).cpu() for n in ("query", "cache", "block_tables", "row_slots", "cu_q", "items")]
        reference.paged_decode(on_cpu[0].double(), *on_cpu[1:], expected, scale, window)
        shared = (self.block_tables, self.row_slots, self.cu_q, self.items)
        for _ in range(2):  # the second launch finds the counters that the first left
            paged_decode(self.query, self.cache, *shared, actual, scratch, scale, window, config, self.queries, beside)
            tolerance = TOLERANCE[self.dtype]
            torch.testing.assert_close(actual.cpu().double(), expected, rtol=tolerance, atol=tolerance, equal_nan=True)
            assert not scratch.arrivals.any()


@pytest.mark.parametrize("group_size", [1, 3, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_groups_of_query_heads(group_size: int, dtype: torch.dtype) -> None:
    Case([1, 70, 300], group_size=group_size, dtype=dtype).check()


@pytest.mark.parametrize("group_size", [17, 20])
def test_groups_larger_than_the_smallest_product(group_size: int) -> None:
    Case([40], num_kv_heads=1, group_size=group_size).check()


@pytest.mark.parametrize("block_size", [16, 32, 48, 64])
@pytest.mark.parametrize("tile", [16, 32, 64])
def test_tiles_within_blocks_and_across(block_size: int, tile: int) -> None:
    Case([1, 16, 17, 64, 150], num_kv_heads=1, block_size=block_size).check(config=DecodeConfig(tile, 4, 2))


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128])
def test_head_dimensions(head_dim: int) -> None:
    Case([33, 140], num_kv_heads=1, head_dim=head_dim).check()


@pytest.mark.parametrize("block_size", [16, 64])
@pytest.mark.parametrize("window", [1, 16, 100, 128, 129, 1000])
def test_sliding_windows(window: int, block_size: int) -> None:
    """Items wholly before the window, on its edge and in it; the window of 1 leaves a row its own token."""
    Case([1, 128, 129, 300], block_size=block_size).check(window)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("block_size", [16, 64])
@pytest.mark.parametrize("value_pairs", [True, False])
def test_fp8_cache(dtype: torch.dtype, block_size: int, value_pairs: bool) -> None:
    case = Case([5, 200], dtype=dtype, block_size=block_size, head_dim=80, cache_dtype=torch.float8_e4m3fn)
    case.check(window=150, config=DecodeConfig(32, 4, 2, value_pairs=value_pairs))


def test_fp8_cache_with_queries_of_any_magnitude() -> None:
    """bfloat16 queries go through float16, which ends at 65,504."""
    case = Case([5, 40, 64], dtype=torch.bfloat16, cache_dtype=torch.float8_e4m3fn)
    case.query[0] *= 1e6
    case.query[1] *= 1e-6
    case.query[2] = 0
    case.check()


@pytest.mark.parametrize("group_size", [1, 3, 4, 8])
@pytest.mark.parametrize("window", [None, 1, 100, 129])
def test_rows_that_share_items(group_size: int, window: int | None) -> None:
    """Sequences shorter than their rows, rows that end before the last item begins, rows before the window; a row
    of a sequence that has no more."""
    Case([2, 4, 129, 130, 259, 70, 300], shares=[2, 4, 4, 3, 4, 1, 2], group_size=group_size).check(window)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_that_share_items_of_an_fp8_cache(dtype: torch.dtype) -> None:
    Case([5, 131, 300], shares=[2, 4, 3], dtype=dtype, cache_dtype=torch.float8_e4m3fn, head_dim=80).check(window=150)


def test_more_shared_items_than_are_merged_at_once() -> None:
    Case([2000, 3], shares=[8, 2], num_kv_heads=1, group_size=2, head_dim=128, dtype=torch.bfloat16).check()


def test_more_items_than_are_merged_at_once() -> None:
    """5,000 positions in 40 items, merged 32 at a time; the window leaves only the last of them something to say."""
    case = Case([5000, 3], num_kv_heads=1, group_size=2, head_dim=128, dtype=torch.bfloat16)
    assert len(case.items) == 41
    case.check()
    case.check(window=100)


def test_the_longest_row_fills_its_block_table() -> None:
    case = Case([256, 64], block_size=64)
    case.block_tables = case.block_tables[:, :4].contiguous()
    case.check()


def test_padding_rows_and_items_do_nothing() -> None:
    """Rows 1 and 3 have no slot; their tokens keep what they held, and so do those of rows without items."""
    case = Case([20, 300, 260, 7])
    case.row_slots[1] = case.row_slots[3] = -1
    padding = torch.tensor([[-1, 9, 9, 9, 9, 9]], dtype=torch.int32, device=DEVICE)
    case.items = torch.cat([case.items, padding, padding])
    case.check()
    case.items = case.items[:0]
    case.check()


def test_rows_of_a_mixed_step() -> None:
    """Row 0 has five query tokens and no items: decode rows' tokens come after its own."""
    case = Case([300, 40, 130])
    tokens = torch.randn(7, *case.query.shape[1:], generator=torch.Generator().manual_seed(3)).to(DEVICE)
    case.query, case.cu_q = tokens, torch.tensor([0, 5, 6, 7], dtype=torch.int32, device=DEVICE)
    case.items = torch.from_numpy(case.planner.plan([40, 130], rows=[1, 2])).to(DEVICE)
    case.check()


def test_query_is_a_view_of_a_fused_projection() -> None:
    case = Case([9, 140], group_size=3)
    fused = torch.full((2, 10, case.head_dim), torch.nan, device=DEVICE)
    fused[:, :6] = case.query
    case.query = fused[:, :6]
    assert not case.query.is_contiguous()
    case.check()


def test_misfits_are_refused() -> None:
    case, scale = Case([4]), 1.0
    out, scratch = torch.empty_like(case.query), case.scratch()
    rest = (case.block_tables, case.row_slots, case.cu_q)
    with pytest.raises(ValueError, match="cannot attend"):
        paged_decode(case.query, case.cache.half(), *rest, case.items, out, scratch, scale)
    with pytest.raises(ValueError, match="fit together"):
        paged_decode(case.query[..., :8], case.cache, *rest, case.items, out, scratch, scale)
    with pytest.raises(ValueError, match="scratch"):
        paged_decode(case.query, case.cache, *rest, case.items.repeat(2, 1), out, scratch, scale)


def test_the_oracle_refuses_items_that_leave_a_gap() -> None:
    case = Case([300])
    case.items[1, 1] += 1
    out = torch.empty_like(case.query).double()
    with pytest.raises(ValueError, match="last ended"):
        reference.paged_decode(
            case.query, case.cache, case.block_tables, case.row_slots, case.cu_q, case.items, out, 1.0
        )
