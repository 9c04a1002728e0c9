"""KVManager: gives sequences their KV blocks, shared with others where the prefix is the same."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable

from octavo.scheduler.audit import require
from octavo.scheduler.block_pool import BlockPool
from octavo.scheduler.prefix_cache import BlockKey, HashFunction, PrefixCache, sha256
from octavo.scheduler.sequence import Sequence


class KVManager:
    """The block tables of all running sequences. Blocks that are shared are full and never written again."""

    def __init__(
        self, num_blocks: int, block_size: int, enable_prefix_caching: bool, hash_function: HashFunction = sha256
    ) -> None:
        self.pool = BlockPool(num_blocks)
        self.cache = PrefixCache(hash_function)
        self.block_size = block_size  # tokens
        self._caching = enable_prefix_caching

    def num_blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def match(self, sequence: Sequence) -> list[int]:
        """The cached blocks that hold the longest prefix of the sequence, at most (num_tokens - 1) // block_size:
        its last token is computed again, for its logits. Takes no reference.

        None for a sequence that still owes prompt logprobs, or the mean of its hidden states: those need every
        position computed. None either where the request wants it so.
        """
        request = sequence.request
        is_mean = request.pooling is not None and request.pooling.kind == "mean"
        needs_all = sequence.prompt_logprobs is not None or is_mean or request.sampling.skip_reading_prefix_cache
        if not self._caching or needs_all:
            return []
        blocks: list[int] = []
        for index in range((sequence.num_tokens - 1) // self.block_size):
            found = self.cache.find(self._key(sequence, index))
            if found is None:
                break
            block, sequence.block_keys[index] = found
            blocks.append(block)
        return blocks

    def admit(self, sequence: Sequence, cached_blocks: list[int]) -> bool:
        """Give a waiting sequence blocks for all its tokens, `cached_blocks` first. False: too few are free."""
        pool = self.pool
        num_new = self.num_blocks_for(sequence.num_tokens) - len(cached_blocks)
        if num_new + sum(pool.ref_count(block) == 0 for block in cached_blocks) > pool.num_free:
            return False
        for block in cached_blocks:
            pool.share(block)
        sequence.block_table = cached_blocks + self._allocate(num_new)
        sequence.num_computed_tokens = len(cached_blocks) * self.block_size
        sequence.num_reserved_tokens = sequence.num_tokens
        self._set_registered(sequence, len(cached_blocks))
        return True

    def grow(self, sequence: Sequence, num_tokens: int) -> list[int] | None:
        """Append blocks until `num_tokens` fit; returns the new ones. None, changing nothing: too few are free."""
        count = self.num_blocks_for(num_tokens) - len(sequence.block_table)
        if count > self.pool.num_free:
            return None
        blocks = self._allocate(count)
        sequence.block_table += blocks
        sequence.num_reserved_tokens = num_tokens
        return blocks

    def has_room(self, sequence: Sequence, num_tokens: int) -> bool:
        """Whether so many tokens fit in its blocks and those that are free."""
        return self.num_blocks_for(num_tokens) - len(sequence.block_table) <= self.pool.num_free

    def register(self, sequence: Sequence) -> list[int]:
        """Offer to the cache each full block whose tokens are known and computed, or being computed.

        Returns the blocks that were taken up. Call once num_computed_tokens reaches next_key_at.
        """
        first = sequence.num_registered_blocks
        end = min(sequence.num_computed_tokens, len(sequence.token_ids)) // self.block_size
        table = sequence.block_table
        taken = [table[i] for i in range(first, end) if self.cache.register(table[i], self._key(sequence, i))]
        self._set_registered(sequence, max(first, end))
        return taken

    def release(self, block_table: list[int]) -> None:
        """Drop a sequence's references. Its last blocks will be evicted first: they are the least shared."""
        self.pool.release(reversed(block_table), self.cache.is_cached)

    def forget(self, blocks: Iterable[int]) -> None:
        """Drop the cache entries of these blocks, whoever holds them."""
        for block in blocks:
            self.cache.forget(block)

    def audit(self, running: Iterable[Sequence], detached: Iterable[list[int]]) -> None:
        """I1-I5 and I8, recomputed. detached: tables of ended sequences that a step in flight still names."""
        owners: Counter[int] = Counter()
        for table in detached:
            owners.update(table)
        sequences = list(running)
        for sequence in sequences:
            owners.update(sequence.block_table)
        self.pool.audit(owners)
        self.cache.audit()
        for sequence in sequences:
            self._audit_table(sequence, owners)

    def _audit_table(self, sequence: Sequence, owners: Counter[int]) -> None:
        name, table, size = sequence.request.request_id, sequence.block_table, self.block_size
        require(len(set(table)) == len(table), f"I4: a block stands twice in the table of {name!r}")
        # Blocks that were taken for guesses stay where these did not come true.
        low, high = (
            self.num_blocks_for(n)
            for n in (sequence.num_computed_tokens, max(sequence.num_tokens, sequence.num_reserved_tokens))
        )
        require(low <= len(table) <= high, f"I8: {name!r} has {len(table)} blocks, needs {low}..{high}")
        key = self._root(sequence)
        for index, block in enumerate(table):
            end = (index + 1) * size
            full = end <= sequence.num_computed_tokens
            require(full or owners[block] == 1, f"I4: {name!r} writes block {block}, which others hold")
            stored = self.cache.key_of(block)
            require(full or stored is None, f"I4: block {block} of {name!r} is cached but not full")
            if end > len(sequence.token_ids):
                require(stored is None, f"I4: block {block} of {name!r} is cached but its tokens are unknown")
                continue
            key = self.cache.child(key, sequence.token_ids[end - size : end])
            if stored is not None:
                require(stored.same_content(key), f"I4: block {block} of {name!r} is cached with other tokens")
            if index < len(sequence.block_keys):
                require(sequence.block_keys[index].same_content(key), f"I4: a block key of {name!r} is wrong")

    def _allocate(self, count: int) -> list[int]:
        blocks = self.pool.allocate(count)
        if self._caching:
            self.forget(blocks)
        return blocks

    def _key(self, sequence: Sequence, index: int) -> BlockKey:
        """The key of block `index`; index <= len(block_keys). Each block is hashed once."""
        keys = sequence.block_keys
        if index < len(keys):
            key = keys[index]
            if index:
                # Equal content under the object that the cache holds, so that comparing stops there.
                key.parent = keys[index - 1]
            return key
        parent = keys[-1] if keys else self._root(sequence)
        start = index * self.block_size
        key = self.cache.child(parent, sequence.token_ids[start : start + self.block_size])
        keys.append(key)
        return key

    def _root(self, sequence: Sequence) -> BlockKey:
        return self.cache.root(sequence.request.cache_salt, sequence.adapter_digest)

    def _set_registered(self, sequence: Sequence, count: int) -> None:
        sequence.num_registered_blocks = count
        sequence.next_key_at = (count + 1) * self.block_size if self._caching else sys.maxsize
