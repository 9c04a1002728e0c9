"""Items cover every position once, stay within their bounds and put long work first."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from octavo.attention.work_items import (
    ITEM_FIELDS,
    KV_TILE,
    DecodePlanner,
    Int32Array,
    queries_of_item,
    sharing_rows,
)

PLANNERS = st.builds(
    DecodePlanner,
    num_processors=st.integers(1, 200),
    num_kv_heads=st.integers(1, 16),
    programs_per_processor=st.integers(1, 8),
    min_positions=st.sampled_from([KV_TILE, 2 * KV_TILE]),
    longest_first=st.booleans(),
)
LENGTHS = st.lists(st.one_of(st.integers(1, 300), st.integers(1, 140_000)), min_size=1, max_size=40)


def check(items: Int32Array, expected: dict[int, int], shares: int = 1) -> None:
    """Each row's items are together, in order, and cover its positions once; `expected`: positions by row."""
    seen: dict[int, int] = {}
    for number, (row, begin, end, sharing, count, first) in enumerate(items.tolist()):
        index = number - first
        assert sharing == shares
        assert begin == seen.get(row, 0)
        assert begin < end
        assert begin % KV_TILE == 0
        assert end % KV_TILE == 0 or index == count - 1
        assert 0 <= index < count
        assert (items[first : first + count, 0] == row).all()
        seen[row] = end
    assert seen == expected


@given(PLANNERS, LENGTHS)
def test_items_cover_every_position_once(planner: DecodePlanner, lengths: list[int]) -> None:
    items = planner.plan(lengths)
    check(items, dict(enumerate(lengths)))
    assert items.dtype == np.int32
    assert len(items) <= planner.max_items(len(lengths), max(lengths)) <= planner.max_items(len(lengths))
    assert planner.max_items(len(lengths)) == planner.target_items + len(lengths)


@given(PLANNERS, LENGTHS)
def test_no_item_is_much_longer_than_a_fair_share(planner: DecodePlanner, lengths: list[int]) -> None:
    items = planner.plan(lengths)
    share = max(planner.min_positions, sum(lengths) / planner.target_items)
    longest = (items[:, 2] - items[:, 1]).max()
    assert longest < (share + 1 + KV_TILE) * 9 / 8 + KV_TILE
    if longest >= share + 1 + KV_TILE:
        assert len(items) <= planner.target_items


def test_somewhat_longer_items_where_all_then_run_at_once() -> None:
    assert DecodePlanner(132, 8).target_items == 33
    assert len(DecodePlanner(132, 8).plan([32_000] * 16)) == 32
    assert len(DecodePlanner(132, 8).plan([32_000] * 20)) == 40  # whole rows would be too long


def test_rows_keep_their_indices_and_padding_follows() -> None:
    planner = DecodePlanner(8, 2)
    out = np.full((planner.max_items(3), ITEM_FIELDS), 7, np.int32)
    items = planner.plan([5, 3000, 400], rows=[1, 4, 6], out=out)
    assert np.shares_memory(items, out)
    check(items, {1: 5, 4: 3000, 6: 400})
    assert (out[len(items) :, 0] == -1).all()
    assert len(items) < len(out)


def test_longest_first() -> None:
    lengths = [200, 1, 900, 129, 500]
    spans = {}
    for longest_first in (True, False):
        items = DecodePlanner(1, 1, programs_per_processor=1, longest_first=longest_first).plan(lengths)
        spans[longest_first] = (items[:, 2] - items[:, 1]).tolist()
    assert spans[True] == [900, 500, 200, 129, 1]
    assert spans[False] == lengths


@pytest.mark.parametrize(("length", "count"), [(1, 1), (256, 1), (257, 2), (512, 2), (1024, 4)])
def test_one_row_is_split_over_the_device_but_not_too_finely(length: int, count: int) -> None:
    items = DecodePlanner(132, 8, min_positions=256).plan([length])
    assert len(items) == count


def test_a_full_batch_is_not_split() -> None:
    assert len(DecodePlanner(132, 8).plan([1024] * 256)) == 256


def test_no_rows() -> None:
    planner = DecodePlanner(132, 8)
    out = np.zeros((2, ITEM_FIELDS), np.int32)
    assert planner.plan([], out=out).shape == (0, ITEM_FIELDS)
    assert (out[:, 0] == -1).all()
    assert planner.max_items(0) == 0


ROWS = st.lists(st.tuples(st.integers(0, 2), st.sampled_from([0, 1, 1, 1, 2]), st.booleans()), max_size=30)


@given(ROWS, st.sampled_from([1, 2, 4]))
def test_rows_share_items_where_they_follow_each_other(rows: list[tuple[int, int, bool]], most: int) -> None:
    slots = np.array([slot for slot, _, _ in rows], np.int32)
    starts = np.cumsum([step for _, step, _ in rows], dtype=np.int32)
    indices = np.cumsum([1 + gap for _, _, gap in rows], dtype=np.int32)
    firsts, counts = sharing_rows(slots, starts, indices, most)
    groups = [range(first, first + count) for first, count in zip(firsts.tolist(), counts.tolist())]
    assert [place for group in groups for place in group] == list(range(len(rows)))
    joined = [tuple((column[b] - column[a]) for column in (slots, starts, indices)) for a, b in zip(*_pairs(groups))]
    assert all(steps == (0, 1, 1) for steps in joined)
    assert all(1 <= len(group) <= most for group in groups)
    for one, other in pairwise(groups):  # none is cut short without a reason
        a, b = one[-1], other[0]
        follows = slots[a] == slots[b] and starts[b] - starts[a] == 1 and indices[b] - indices[a] == 1
        assert not follows or len(one) == most


def _pairs(groups: list[range]) -> tuple[list[int], list[int]]:
    """Neighbours within the groups."""
    return [a for group in groups for a in group[:-1]], [b for group in groups for b in group[1:]]


def test_items_that_are_shared_say_so() -> None:
    planner = DecodePlanner(8, 2)
    check(planner.plan([3000, 400], rows=[0, 3], shares=[3, 3]), {0: 3000, 3: 400}, shares=3)


@pytest.mark.parametrize(("group_size", "rows"), [(1, 16), (3, 4), (4, 4), (7, 2), (8, 2), (16, 1), (20, 1)])
def test_rows_that_share_items_fill_a_product(group_size: int, rows: int) -> None:
    assert queries_of_item(group_size) == rows


def test_shared_items_are_not_as_short_as_others() -> None:
    planner = DecodePlanner(132, 8)
    assert len(planner.plan([601])) == 10
    assert len(planner.plan([601], shares=[4])) == 5
