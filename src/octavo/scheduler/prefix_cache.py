"""PrefixCache: finds the KV block that holds given tokens after a given prefix."""

from __future__ import annotations

import hashlib
import secrets
from array import array
from collections.abc import Callable, Sequence

from octavo.protocol.plan import NULL_BLOCK
from octavo.scheduler.audit import require

HashFunction = Callable[[bytes], bytes]


def sha256(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


class BlockKey:
    """What a full block holds: its tokens and, through `parent`, the whole prefix before them.

    digest: the chained hash of all that; equal content has an equal digest, not the reverse.
    tokens: uint32 token ids as bytes; of a root, the encoded adapter and cache salt.
    """

    __slots__ = ("digest", "parent", "tokens")

    def __init__(self, digest: bytes, parent: BlockKey | None, tokens: bytes) -> None:
        self.digest = digest
        self.parent = parent
        self.tokens = tokens

    def same_content(self, other: BlockKey) -> bool:
        """Compare whole prefixes. Stops at the first ancestor in common, so it is O(1) along a shared chain."""
        a: BlockKey | None = self
        b: BlockKey | None = other
        while a is not b:
            if a is None or b is None or a.tokens != b.tokens:
                return False
            a, b = a.parent, b.parent
        return True


class PrefixCache:
    """digest -> block, for full blocks whose KV is computed or is being computed by a step in flight.

    A hit is believed only after its tokens and prefix compare equal, so a collision of `hash_function`
    costs a miss and never gives one request the KV of another. The random secret keeps digests from
    being predicted. One block a digest: the first to be registered stays.
    """

    def __init__(self, hash_function: HashFunction = sha256) -> None:
        self._hash = hash_function
        self._secret = secrets.token_bytes(32)
        self._blocks: dict[bytes, int] = {}
        self._keys: dict[int, BlockKey] = {}

    def __len__(self) -> int:
        return len(self._keys)

    def root(self, salt: str | None, adapter: bytes | None = None) -> BlockKey:
        """The empty prefix of requests with this salt. adapter: the digest, 32 bytes, of the weights they run with."""
        tokens = b"" if adapter is None else b"\x02" + adapter
        tokens += b"" if salt is None else b"\x01" + salt.encode("utf-8", "surrogatepass")
        return BlockKey(self._hash(self._secret + tokens), None, tokens)

    def child(self, parent: BlockKey, token_ids: Sequence[int]) -> BlockKey:
        """The key of the block with these tokens after `parent`. Ids: 0 .. 2**32-1."""
        tokens = array("I", token_ids).tobytes()
        return BlockKey(self._hash(parent.digest + tokens), parent, tokens)

    def find(self, key: BlockKey) -> tuple[int, BlockKey] | None:
        """The block with this content and the key it was registered under, or None."""
        block = self._blocks.get(key.digest)
        if block is None:
            return None
        stored = self._keys[block]
        return (block, stored) if stored.same_content(key) else None

    def is_cached(self, block: int) -> bool:
        return block in self._keys

    def key_of(self, block: int) -> BlockKey | None:
        return self._keys.get(block)

    def register(self, block: int, key: BlockKey) -> bool:
        """Let `block` be found under `key`. False if the digest is taken: the block stays private."""
        require(block != NULL_BLOCK, "I3: the null block cannot be cached")
        require(block not in self._keys, f"I5: block {block} is cached already")
        if self._blocks.setdefault(key.digest, block) != block:
            return False
        self._keys[block] = key
        return True

    def forget(self, block: int) -> None:
        """Find `block` no more. Does nothing if it is not cached."""
        key = self._keys.pop(block, None)
        if key is not None:
            del self._blocks[key.digest]

    def clear(self) -> None:
        self._blocks.clear()
        self._keys.clear()

    def audit(self) -> None:
        """I3, I5: both maps agree, and every digest is the hash of its content."""
        require(NULL_BLOCK not in self._keys, "I3: the null block is cached")
        require(len(self._blocks) == len(self._keys), "I5: the two maps of the prefix cache differ in size")
        for block, key in self._keys.items():
            require(self._blocks.get(key.digest) == block, f"I5: the digest of block {block} leads elsewhere")
            above = self._secret if key.parent is None else key.parent.digest
            require(self._hash(above + key.tokens) == key.digest, f"I4: the digest of block {block} is stale")
