"""Reference counts, the order in which free blocks are used up, and the audit's eyes."""

from __future__ import annotations

from collections import Counter

import pytest

from octavo.scheduler.audit import ConsistencyError
from octavo.scheduler.block_pool import BlockPool


def never_cached(block):  # noqa: ARG001
    return False


def always_cached(block):  # noqa: ARG001
    return True


def test_null_block_is_never_given_out():
    pool = BlockPool(5)
    assert pool.num_free == 4
    assert sorted(pool.allocate(4)) == [1, 2, 3, 4]
    with pytest.raises(ConsistencyError, match="asked for 1 blocks, 0 are free"):
        pool.allocate(1)
    with pytest.raises(ConsistencyError, match="null block"):
        pool.share(0)


def test_cached_blocks_are_used_up_in_the_order_in_which_they_were_freed():
    pool = BlockPool(4)
    pool.allocate(3)
    pool.release([3, 1, 2], always_cached)
    assert pool.allocate(3) == [3, 1, 2]


def test_blocks_that_are_not_cached_are_used_up_first():
    pool = BlockPool(5)
    pool.allocate(4)
    pool.release([3, 1], always_cached)
    pool.release([4], never_cached)
    assert pool.allocate(2) == [4, 3]


def test_a_shared_block_is_free_only_after_its_last_owner():
    pool = BlockPool(3)
    (block,) = pool.allocate(1)
    pool.share(block)
    pool.release([block], always_cached)
    assert (pool.ref_count(block), pool.num_free) == (1, 1)
    pool.release([block], always_cached)
    assert (pool.ref_count(block), pool.num_free) == (0, 2)
    pool.share(block)
    assert (pool.ref_count(block), pool.num_free) == (1, 1)


def test_double_free_is_loud():
    pool = BlockPool(3)
    blocks = pool.allocate(1)
    pool.release(blocks, never_cached)
    with pytest.raises(ConsistencyError, match="nobody holds it"):
        pool.release(blocks, never_cached)


def test_audit_compares_with_the_owners():
    pool = BlockPool(4)
    blocks = pool.allocate(2)
    pool.audit(Counter(blocks))
    with pytest.raises(ConsistencyError, match="I2: block"):
        pool.audit(Counter(blocks[:1]))
    pool._free[blocks[0]] = None
    with pytest.raises(ConsistencyError, match="I1: block"):
        pool.audit(Counter(blocks))
