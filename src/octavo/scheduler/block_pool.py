"""BlockPool: who holds which KV block, and in which order free blocks are used up."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable

from octavo.protocol.plan import NULL_BLOCK
from octavo.scheduler.audit import require


class BlockPool:
    """Reference counts over blocks 1 .. num_blocks-1, and an O(1) LRU list of those that nobody holds.

    A block without a reference is in the free list, whether or not the prefix cache still finds it.
    The list is used up from its front: blocks that are not cached stand before cached ones that were
    freed at the same time, and cached ones in the order in which they were freed (LRU).
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks  # the null block counts
        self._ref_counts = [0] * num_blocks
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(NULL_BLOCK + 1, num_blocks))

    @property
    def num_free(self) -> int:
        return len(self._free)

    def ref_count(self, block: int) -> int:
        return self._ref_counts[block]

    def allocate(self, count: int) -> list[int]:
        """Take `count` blocks from the front of the free list, each with one reference.

        The caller must drop what the prefix cache says of them. Requires count <= num_free.
        """
        require(count <= len(self._free), f"asked for {count} blocks, {len(self._free)} are free")
        blocks = [self._free.popitem(last=False)[0] for _ in range(count)]
        for block in blocks:
            self._ref_counts[block] = 1
        return blocks

    def share(self, block: int) -> None:
        """Add a reference to a block that the prefix cache found, free or held."""
        require(block != NULL_BLOCK, "the null block cannot be shared")
        if self._ref_counts[block] == 0:
            del self._free[block]
        self._ref_counts[block] += 1

    def release(self, blocks: Iterable[int], is_cached: Callable[[int], bool]) -> None:
        """Drop one reference to each, in the given order: the first is evicted first."""
        for block in blocks:
            count = self._ref_counts[block]
            require(count > 0, f"block {block} is freed but nobody holds it")
            self._ref_counts[block] = count - 1
            if count == 1:
                self._free[block] = None
                if not is_cached(block):
                    self._free.move_to_end(block, last=False)

    def audit(self, owners: Counter[int]) -> None:
        """I1-I3: `owners` counts the holders of each block, recomputed from the sequences."""
        for block in range(self.num_blocks):
            count, held = self._ref_counts[block], owners[block]
            require(count == held, f"I2: block {block} has ref count {count} but {held} owners")
            free = block in self._free
            if block == NULL_BLOCK:
                require(count == 0 and not free, "I3: the null block is held or free")
            else:
                require(free == (count == 0), f"I1: block {block} has ref count {count}, in the free list: {free}")
        require(len(self._free) <= self.num_blocks - 1, "I1: the free list holds more than the pool")
