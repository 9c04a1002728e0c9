"""Places for adapters: who has one, who gets one, and that nobody waits for ever."""

from __future__ import annotations

import random
from collections import deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from scheduler_rig import Rig, adapter_request, config, make_request

from octavo.scheduler.adapter_cache import AdapterCache
from octavo.scheduler.audit import ConsistencyError
from octavo.scheduler.scheduler import Scheduler


def test_the_least_recently_used_of_the_idle_makes_room():
    cache = AdapterCache(2)
    assert [cache.can_take(i) and cache.take(i) for i in (1, 2)] == [0, 1]
    cache.release(2)
    cache.release(1)
    assert cache.can_take(2)
    assert cache.take(2) is None
    cache.release(2)
    assert cache.can_take(3)
    assert cache.take(3) == 0
    assert 1 not in cache
    assert 2 in cache


def test_one_in_use_is_never_evicted():
    cache = AdapterCache(1)
    assert cache.can_take(1)
    cache.take(1)
    assert not cache.can_take(2)
    with pytest.raises(ConsistencyError, match="I27"):
        cache.take(2)
    with pytest.raises(ConsistencyError, match="I27"):
        cache.evict(1)


def test_a_claimed_one_takes_no_more_users_until_the_next_round():
    cache = AdapterCache(2)
    for adapter_id in (1, 2, 2):
        assert cache.can_take(adapter_id)
        cache.take(adapter_id)
    assert not cache.can_take(3)  # claims 1, which has fewer users
    assert not cache.can_take(1)
    assert cache.can_take(2)
    cache.begin_round()
    assert cache.can_take(1)


def test_one_place_at_most_is_claimed():
    cache = AdapterCache(4)
    for adapter_id in range(1, 5):
        assert cache.can_take(adapter_id)
        cache.take(adapter_id)
    assert not any(cache.can_take(adapter_id) for adapter_id in range(5, 20))
    assert sum(cache.can_take(adapter_id) for adapter_id in range(1, 5)) == 3


class CacheMachine(RuleBasedStateMachine):
    """Users in a queue, each of which takes its adapter for a while; the cache beside a plain account of it."""

    @initialize(num_places=st.integers(1, 4))
    def start(self, num_places):
        self.cache = AdapterCache(num_places)
        self.waiting: deque[int] = deque()
        self.using: list[int] = []
        self.places: dict[int, int] = {}

    @rule(adapter_ids=st.lists(st.integers(1, 7), min_size=1, max_size=5))
    def arrive(self, adapter_ids):
        self.waiting.extend(adapter_ids)

    @rule()
    def round(self):
        self.cache.begin_round()
        for adapter_id in list(self.waiting):
            if self.cache.can_take(adapter_id):
                self.waiting.remove(adapter_id)
                place = self.cache.take(adapter_id)
                if place is not None:
                    evicted = [i for i, p in self.places.items() if p == place]
                    assert not set(evicted) & set(self.using), "one in use was evicted"
                    for old in evicted:
                        del self.places[old]
                    self.places[adapter_id] = place
                self.using.append(adapter_id)
        assert self.using or not self.waiting, "there is room and nobody takes it"

    @rule(index=st.integers(0, 20))
    def leave(self, index):
        if self.using:
            self.cache.release(self.using.pop(index % len(self.using)))

    @invariant()
    def agrees(self):
        if hasattr(self, "cache"):
            self.cache.audit()
            assert {i: self.cache.place(i) for i in self.places} == self.places
            assert {i: c for i, c in self.cache.users().items() if c} == {i: self.using.count(i) for i in self.using}


TestCacheMachine = CacheMachine.TestCase
TestCacheMachine.settings = settings(max_examples=60, stateful_step_count=30, deadline=None, derandomize=True)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(num_places=st.integers(1, 4), hot=st.integers(1, 4), length=st.integers(1, 5), seed=st.integers(0, 1000))
def test_a_steady_stream_for_resident_adapters_starves_nobody(num_places, hot, length, seed):
    """New users of `hot` adapters come every round; one cold adapter waits among them, and gets its turn."""
    rng = random.Random(seed)
    cache = AdapterCache(num_places)
    using: deque[tuple[int, int]] = deque()  # (round of the end, adapter id)
    waiting = deque([99])
    for now in range(200):
        while using and using[0][0] <= now:
            cache.release(using.popleft()[1])
        waiting.extend(rng.randint(1, hot) for _ in range(3))
        cache.begin_round()
        for adapter_id in list(waiting):
            if cache.can_take(adapter_id):
                cache.take(adapter_id)
                waiting.remove(adapter_id)
                using.append((now + length, adapter_id))
        if 99 not in waiting:
            return
    pytest.fail("the cold adapter never got a place")


def test_requests_without_an_adapter_do_not_wait_for_one():
    rig = Rig(config(max_loras=1, max_num_seqs=4), depth=2)
    rig.add(make_request("a", [1, 2, 3], 12, ignore_eos=True, lora=adapter_request(1)))
    rig.step()
    rig.add(make_request("b", [1, 2, 3], 2, ignore_eos=True, lora=adapter_request(2)))
    rig.add(make_request("c", [1, 2, 3], 2, ignore_eos=True))
    rig.add(make_request("d", [1, 2, 3], 2, ignore_eos=True, lora=adapter_request(1)))
    rig.step()
    stats = rig.scheduler.stats()
    assert (stats.running_adapters, stats.waiting_adapters) == (("a1",), ("a1", "a2"))
    while rig.accounts["c"].last is None:
        rig.step()
    assert rig.accounts["b"].last is None
    rig.drain()
    assert rig.scheduler.stats().num_adapter_loads_total == 3


def test_equal_prefixes_are_shared_between_equal_adapters_only():
    rig = Rig(config(max_loras=3))
    prompt = [1, 0, 1, 1, 0, 1, 0, 0, 1]
    for name, number in (("none", 0), ("one", 1), ("two", 2), ("nine", 9)):  # 9 holds the weights of 1
        adapter = {"lora": adapter_request(number)} if number else {}
        rig.add(make_request(name, prompt, 2, **adapter))
        rig.drain()
    cached = {name: account.last.num_cached_tokens for name, account in rig.accounts.items()}
    assert cached == {"none": 0, "one": 0, "two": 0, "nine": 8}


def test_an_adapter_needs_slots():
    with pytest.raises(ValueError, match="lora_request='a1' needs an engine with enable_lora"):
        Scheduler(config()).add(make_request("a", [1], lora=adapter_request(1)))
