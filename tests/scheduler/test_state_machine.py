"""The whole scheduler under random load, aborts, failures and every setting, against a machine without limits."""

from __future__ import annotations

import os
from unittest.mock import patch

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from scheduler_rig import EOS, Rig, adapter_request, hash0, hash8, make_request

from octavo.config import SchedulerConfig
from octavo.scheduler import leveling
from octavo.scheduler.prefix_cache import sha256

# Long runs: OCTAVO_TEST_EXAMPLES=2000 python -m pytest tests/scheduler/test_state_machine.py
NUM_EXAMPLES = int(os.environ.get("OCTAVO_TEST_EXAMPLES", "50"))

configs = st.builds(
    SchedulerConfig,
    max_num_seqs=st.sampled_from([4, 6, 2, 1]),
    max_num_batched_tokens=st.sampled_from([512, 48, 16, 5, 2, 1]),
    max_model_len=st.just(80),
    block_size=st.sampled_from([4, 2, 3, 16]),
    num_blocks=st.sampled_from([8, 12, 18, 25, 40]),
    enable_prefix_caching=st.sampled_from([True, True, True, False]),
    enable_chunked_prefill=st.sampled_from([True, True, False]),
    chunk_alignment=st.sampled_from([1, 8, 7]),
    policy=st.sampled_from(["fcfs", "priority"]),
    max_loras=st.sampled_from([2, 1, 3]),
    num_speculative_tokens=st.sampled_from([0, 3, 1, 7]),
    adaptive_speculation=st.booleans(),
    drafts_are_free=st.booleans(),
    levels_prompts=st.booleans(),
)
# All prompts are of two tokens and most begin alike, so that many of their blocks are equal.
prompts = st.tuples(st.sampled_from([17, 16, 5, 31, 36, 0]), st.lists(st.integers(0, 1), min_size=1, max_size=4)).map(
    lambda x: ([0, 1, 1, 0] * 9)[: x[0]] + x[1]
)
options = st.fixed_dictionaries(
    {},
    optional={
        "priority": st.integers(-1, 1),
        "cache_salt": st.sampled_from(["", "a"]),
        "ignore_eos": st.booleans(),
        "stop_token_ids": st.just([4, EOS]),
        "prompt_logprobs": st.just(1),
        "min_tokens": st.just(1),
        "patient": st.just(True),
        "lora": st.sampled_from([1, 2, 3, 4, 9]).map(adapter_request),
    },
)
wishes = st.tuples(prompts, st.sampled_from([12, 1, 4, 20, 32]), st.one_of(st.just({}), options))


class SchedulerMachine(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.small_levels = patch.multiple(leveling, _LEAST=2, _MOST=64, _GRAIN=2)  # of such small steps
        self.small_levels.start()

    @initialize(
        config=configs,
        depth=st.integers(1, 3),
        hash_function=st.sampled_from([sha256, hash8, hash0]),
        wishes=st.lists(wishes, min_size=3, max_size=8),
    )
    def start(self, config, depth, hash_function, wishes):
        self.rig = Rig(config, depth, hash_function)
        self.num_added = 0
        self.add(wishes)

    def add_one(self, prompt, max_tokens, options):
        if self.num_added % 8:
            room = self.rig.capacity
            prompt = prompt[-max(1, room // 2) :]
            max_tokens = min(max_tokens, room + 1 - len(prompt))
        request = make_request(f"r{self.num_added}", prompt, max_tokens, **options)
        fits = len(prompt) + max_tokens - 1 <= self.rig.capacity
        self.num_added += 1
        try:
            self.rig.add(request)
        except ValueError:
            assert not fits
        else:
            assert fits
        self.rig.check()

    def add(self, wishes):
        for wish in wishes:
            self.add_one(*wish)

    @rule(wishes=st.lists(wishes, min_size=1, max_size=6))
    def add_more(self, wishes):
        self.add(wishes)

    @rule(index=st.integers(0, 30), suffix=st.lists(st.integers(0, 1), max_size=2), max_tokens=st.integers(1, 8))
    def follow_up(self, index, suffix, max_tokens):
        """The next turn of a conversation: its prompt begins with what an earlier request was told."""
        account = self.rig.accounts.get(f"r{index}")
        if account is not None:
            self.add_one([*account.request.prompt_token_ids, *account.tokens, *suffix], max_tokens, {})

    @precondition(lambda self: len(self.rig.in_flight) < self.rig.depth)
    @rule()
    def submit(self):
        self.rig.submit()

    @precondition(lambda self: self.rig.in_flight)
    @rule()
    def commit(self):
        self.rig.commit()

    @rule(count=st.integers(1, 16))
    def steps(self, count):
        for _ in range(count):
            self.rig.step()

    @rule(indices=st.lists(st.integers(0, 30), min_size=1, max_size=3))
    def abort(self, indices):
        self.rig.abort([f"r{index}" for index in indices])

    @rule(kind=st.sampled_from(["broken step", "broken row", "reset"]), row=st.integers(0, 5))
    def trouble(self, kind, row):
        if kind == "broken step" and len(self.rig.in_flight) < self.rig.depth:
            self.rig.submit(broken=True)
        elif kind == "broken row" and self.rig.in_flight:
            self.rig.commit(frozenset([row]))
        elif kind == "reset":
            assert self.rig.scheduler.reset_prefix_cache() is self.rig.config.enable_prefix_caching
            self.rig.check()

    def teardown(self):
        try:
            if hasattr(self, "rig"):
                self.rig.drain()
        finally:
            self.small_levels.stop()


SchedulerMachine.TestCase.settings = settings(
    max_examples=NUM_EXAMPLES,
    stateful_step_count=40,
    deadline=None,
    derandomize=NUM_EXAMPLES <= 100,
    suppress_health_check=list(HealthCheck),
)
TestSchedulerMachine = SchedulerMachine.TestCase
