"""Heavy seeded load on tiny pools: more preemption, eviction and sharing a second than a shrinking search reaches."""

from __future__ import annotations

import os
import random

import pytest
from scheduler_rig import EOS, Rig, hash0, hash8, make_request

from octavo.config import SchedulerConfig
from octavo.protocol.request import Request
from octavo.scheduler.prefix_cache import sha256

NUM_STORMS = int(os.environ.get("OCTAVO_TEST_STORMS", "60"))


def random_rig(rng: random.Random) -> Rig:
    config = SchedulerConfig(
        max_num_seqs=rng.choice([1, 2, 4, 8]),
        max_num_batched_tokens=rng.choice([1, 3, 10, 40, 200]),
        max_model_len=70,
        block_size=rng.choice([2, 3, 4, 8, 16]),
        num_blocks=min(rng.randint(8, 40), rng.randint(8, 40)),
        enable_prefix_caching=rng.random() < 0.85,
        enable_chunked_prefill=rng.random() < 0.8,
        chunk_alignment=rng.choice([1, 8, 7]),
        policy=rng.choice(["fcfs", "priority"]),
    )
    return Rig(config, rng.randint(1, 3), rng.choice([sha256, sha256, hash8, hash0]))


def random_request(rng: random.Random, rig: Rig, name: str) -> Request:
    """Most prompts begin alike, some continue what an earlier request was told; all fit."""
    kind, told = rng.random(), list(rig.accounts.values())
    if kind < 0.25 and told:
        account = rng.choice(told)
        prompt = [*account.request.prompt_token_ids, *account.tokens]
    else:
        prompt = ([0, 1, 1, 0, 1] * 12)[: rng.randint(0, 40)] if kind < 0.8 else []
    prompt = [*prompt[: rig.capacity - 3], *rng.choices([0, 1], k=rng.randint(1, 3))][: rig.capacity]
    return make_request(
        name,
        prompt,
        rng.randint(1, min(24, rig.capacity + 1 - len(prompt))),
        ignore_eos=rng.random() < 0.6,
        stop_token_ids=rng.choice([None, [4], [EOS]]),
        prompt_logprobs=rng.choice([None] * 5 + [0]),
        priority=rng.randint(0, 2),
        cache_salt=rng.choice([None] * 5 + ["a"]),
    )


@pytest.mark.parametrize("seed", range(NUM_STORMS))
def test_storm(seed):
    rng = random.Random(seed)
    rig = random_rig(rng)
    trouble = rng.choice([0.0, 0.02, 0.1])
    num_added = 0
    for _ in range(120):
        if rng.random() < 0.25:
            for _ in range(rng.randint(1, 4)):
                rig.add(random_request(rng, rig, f"r{num_added}"))
                num_added += 1
        if rng.random() < trouble:
            rig.abort(rng.choices([f"r{i}" for i in range(num_added + 1)], k=2) + rig.unfinished[-1:])
        if rng.random() < trouble / 4:
            rig.scheduler.reset_prefix_cache()
        if len(rig.in_flight) < rig.depth and rng.random() < 0.7:
            rig.submit(broken=rng.random() < trouble)
        elif rig.in_flight:
            rig.commit(frozenset([rng.randrange(8)]) if rng.random() < trouble else frozenset())
    rig.drain()
