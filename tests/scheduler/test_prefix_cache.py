"""Keys, hits that are believed only when equal, and what a poor hash may and may not cost."""

from __future__ import annotations

import pytest
from scheduler_rig import hash0, hash8

from octavo.scheduler.audit import ConsistencyError
from octavo.scheduler.prefix_cache import PrefixCache, sha256


def chain(cache, salt, *blocks):
    key = cache.root(salt)
    for tokens in blocks:
        key = cache.child(key, tokens)
    return key


@pytest.mark.parametrize("hash_function", [sha256, hash8, hash0])
def test_a_hit_has_the_same_tokens_prefix_and_salt(hash_function):
    cache = PrefixCache(hash_function)
    key = chain(cache, None, [1, 2], [3, 4])
    assert cache.register(7, key)
    assert cache.find(chain(cache, None, [1, 2], [3, 4])) == (7, key)
    for other in (
        chain(cache, None, [1, 2], [3, 5]),
        chain(cache, None, [9, 2], [3, 4]),
        chain(cache, None, [3, 4]),
        chain(cache, "", [1, 2], [3, 4]),
        chain(cache, "tenant", [1, 2], [3, 4]),
    ):
        assert cache.find(other) is None
    cache.audit()


def test_token_ids_are_not_confused_by_their_encoding():
    cache = PrefixCache(hash0)
    cache.register(1, chain(cache, None, [1, 256]))
    assert cache.find(chain(cache, None, [256, 1])) is None
    assert cache.find(chain(cache, None, [1, 2**32 - 1])) is None


def test_a_taken_digest_keeps_its_first_block():
    cache = PrefixCache(hash0)
    assert cache.register(1, chain(cache, None, [1]))
    assert not cache.register(2, chain(cache, None, [2]))
    assert not cache.is_cached(2)
    cache.forget(2)
    cache.forget(1)
    assert len(cache) == 0
    assert cache.register(2, chain(cache, None, [2]))
    cache.audit()


def test_a_prefix_registered_anew_still_leads_to_its_children():
    """The parent was evicted and computed again: its children are found, under the new object."""
    cache = PrefixCache()
    parent = chain(cache, None, [1])
    cache.register(1, parent)
    cache.register(2, cache.child(parent, [2]))
    cache.forget(1)
    again = chain(cache, None, [1])
    cache.register(3, again)
    found = cache.find(cache.child(again, [2]))
    assert found is not None
    assert found[0] == 2


def test_digests_differ_between_processes():
    assert chain(PrefixCache(), None, [1]).digest != chain(PrefixCache(), None, [1]).digest


def test_misuse_is_loud():
    cache = PrefixCache()
    key = chain(cache, None, [1])
    with pytest.raises(ConsistencyError, match="I3"):
        cache.register(0, key)
    cache.register(1, key)
    with pytest.raises(ConsistencyError, match="I5"):
        cache.register(1, chain(cache, None, [2]))
    cache._blocks.clear()
    with pytest.raises(ConsistencyError, match="I5"):
        cache.audit()
