"""Too few blocks, aborts and failed steps; statistics; what the audit sees."""

from __future__ import annotations

import pytest
from scheduler_rig import Rig, config, make_request, rows

from octavo.scheduler.audit import ConsistencyError

# Preemption


def test_the_last_arrived_is_preempted_and_comes_back_with_its_tokens():
    rig = Rig(config(num_blocks=6, enable_prefix_caching=False))
    rig.add(make_request("a", [0] * 8, 8, ignore_eos=True))
    rig.add(make_request("b", [1] * 7, 8, ignore_eos=True))
    rig.step()  # a takes 2 blocks, b 2
    rig.step()  # a takes the fifth; b has room for one more
    rig.step()  # b needs a block and is the last: it goes back
    stats = rig.scheduler.stats()
    assert (stats.num_running, stats.num_waiting, stats.num_preemptions_total) == (1, 1, 1)
    while not (plan := rig.submit()).new_sequences:
        rig.commit()
    (back,) = plan.new_sequences
    assert back.num_prompt_tokens == 7
    # The worker has added what this step sampled.
    assert back.token_ids[:-1] == [1] * 7 + rig.accounts["b"].tokens
    rig.commit()
    rig.drain()


def test_a_preempted_sequence_comes_back_before_those_that_wait():
    rig = Rig(config(num_blocks=6, max_num_seqs=2, enable_prefix_caching=False))
    for name in "abc":
        rig.add(make_request(name, [0] * 7, 8, ignore_eos=True))
    while rig.scheduler.stats().num_preemptions_total == 0:
        rig.step()
    assert [s.request.request_id for s in rig.scheduler._waiting] == ["b", "c"]
    rig.drain()


def test_with_all_in_flight_the_pipeline_drains_before_anyone_is_preempted():
    rig = Rig(config(num_blocks=5, enable_prefix_caching=False), depth=2)
    rig.add(make_request("a", [0] * 8, 8, ignore_eos=True))
    rig.add(make_request("b", [1] * 8, 8, ignore_eos=True))
    assert len(rig.submit().rows) == 2
    assert rig.submit() is None
    assert rig.scheduler.stats().num_preemptions_total == 0
    rig.commit()
    assert len(rig.submit().rows) == 1
    assert rig.scheduler.stats().num_preemptions_total == 1
    rig.drain()


def test_a_half_computed_prompt_goes_on_while_a_decode_of_lower_rank_lacks_a_block():
    rig = Rig(config(num_blocks=4, policy="priority", max_num_batched_tokens=4, enable_prefix_caching=False))
    rig.add(make_request("low", [0] * 3, 6, priority=1, ignore_eos=True))
    rig.step()
    rig.add(make_request("high", [1] * 8, 4, priority=0, ignore_eos=True))
    assert rows(rig.submit()) == [(0, 3, 1, True), (1, 0, 3, False)]
    rig.commit()
    assert rows(rig.submit()) == [(1, 3, 4, False)]
    assert rig.scheduler.stats().num_preemptions_total == 1
    rig.commit()
    rig.drain()


def test_priority_decides_who_runs_first_and_who_is_preempted():
    def order(policy):
        rig = Rig(config(num_blocks=6, policy=policy, max_num_seqs=2, enable_prefix_caching=False))
        for name, priority in (("low", 5), ("high", 1), ("high2", 1)):
            rig.add(make_request(name, [0] * 8, 5, priority=priority, ignore_eos=True))
        rig.step()
        running = [s.request.request_id for s in rig.scheduler._running]
        while rig.scheduler.stats().num_preemptions_total == 0:
            rig.step()
        waiting = [s.request.request_id for s in rig.scheduler._waiting]
        rig.drain()
        return running, waiting

    assert order("fcfs") == (["low", "high"], ["high", "high2"])
    assert order("priority") == (["high", "high2"], ["high2", "low"])


def test_a_more_urgent_arrival_outlives_a_running_one():
    rig = Rig(config(num_blocks=6, policy="priority", enable_prefix_caching=False))
    rig.add(make_request("low", [0] * 7, 8, priority=1, ignore_eos=True))
    rig.step()
    rig.add(make_request("high", [0] * 7, 8, priority=0, ignore_eos=True))
    while rig.scheduler.stats().num_preemptions_total == 0:
        rig.step()
    assert [s.request.request_id for s in rig.scheduler._running] == ["high"]
    rig.drain()


# Abort and failure


def test_abort_in_every_state_and_twice():
    rig = Rig(config(max_num_seqs=3, max_num_batched_tokens=8), depth=2)
    for name in ("running", "prefill", "waiting"):
        rig.add(make_request(name, [ord(name[0]) % 2] * 12, 4))
    rig.submit()
    assert len(rig.abort(["waiting", "waiting", "nobody", "running"])) == 2
    assert rig.abort(["waiting", "running"]) == []
    assert rig.commit() == []
    assert len(rig.abort(["prefill"])) == 1
    rig.drain()


def test_blocks_of_an_aborted_sequence_wait_for_its_last_step():
    rig = Rig(config(), depth=2)
    rig.add(make_request("a", [0] * 8, 4, ignore_eos=True))
    rig.submit()
    rig.submit()
    rig.abort(["a"])
    assert rig.scheduler.stats().num_free_blocks == 29
    rig.commit()
    assert rig.scheduler.stats().num_free_blocks == 29
    rig.commit()
    rig.check_empty()


def test_a_failed_step_ends_its_requests_and_restarts_those_that_took_its_blocks():
    rig = Rig(config(), depth=3)
    rig.add(make_request("a", [0] * 9, 4))
    rig.submit(broken=True)
    rig.add(make_request("taker", [0] * 9, 4))
    rig.add(make_request("other", [1] * 9, 4))
    assert rows(rig.submit())[1:] == [(1, 8, 1, True), (2, 0, 9, True)]
    rig.submit()
    (output,) = rig.commit()
    assert (output.request_id, output.finish_reason, output.error) == ("a", "error", "the step failed")
    assert [s.request.request_id for s in rig.scheduler._waiting] == ["taker"]
    assert [output.request_id for output in rig.commit()] == ["other"]
    rig.drain()
    rig.add(make_request("late", [0] * 9, 4))
    rig.drain()


def test_what_an_aborted_sequence_should_have_filled_is_not_found_after_its_step_failed():
    rig = Rig(config(), depth=2)
    rig.add(make_request("a", [0] * 9, 4))
    rig.submit(broken=True)
    rig.abort(["a"])
    assert rig.commit() == []
    rig.add(make_request("b", [0] * 9, 4))
    rig.drain()
    assert rig.accounts["b"].last.num_cached_tokens == 0


def test_a_block_of_output_is_not_found_after_the_step_that_should_have_filled_it_failed():
    """Step 1 fills the first block; its last token, sampled by step 0, is known only when step 0 is committed."""
    rig = Rig(config(), depth=2)
    rig.add(make_request("a", [0, 1, 0], 4, ignore_eos=True))
    rig.submit()
    rig.submit(broken=True)
    rig.commit()
    rig.add(make_request("b", [0, 1, 0, *rig.accounts["a"].tokens, 1], 4))
    assert rows(rig.submit())[-1] == (1, 4, 1, True)
    rig.commit()
    rig.drain()
    rig.add(make_request("c", [0, 1, 0, *rig.accounts["a"].tokens, 0], 4))
    rig.drain()


# Statistics and audit


def test_stats_count():
    rig = Rig(config())
    rig.add(make_request("a", [0] * 9, 3, ignore_eos=True))
    rig.add(make_request("b", [0] * 9, 1))
    rig.step()
    stats = rig.scheduler.stats()
    assert (stats.num_running, stats.num_waiting, stats.num_blocks, stats.num_free_blocks) == (1, 0, 32, 29)
    assert (stats.num_kv_tokens, stats.num_kv_slots) == (9, 12)
    assert (stats.prompt_tokens_total, stats.generation_tokens_total, stats.num_steps_total) == (18, 2, 1)
    assert (stats.prefix_cache_queries_total, stats.prefix_cache_hits_total) == (18, 8)
    rig.drain()
    assert rig.scheduler.stats().prompt_tokens_total == 18
    assert rig.accounts["b"].last.scheduled_time == 1.0


def break_table(_scheduler, sequence):
    sequence.block_table[0] = sequence.block_table[1]


def break_ref_count(scheduler, sequence):
    scheduler._kv.pool._ref_counts[sequence.block_table[0]] += 1


def break_content(_scheduler, sequence):
    sequence.token_ids[0] += 1


def break_count(_scheduler, sequence):
    sequence.num_tokens += 1


def break_slot(scheduler, sequence):
    scheduler._free_slots.append(sequence.slot)


def break_queue(scheduler, sequence):
    scheduler._waiting.add(sequence)


def lose_block(scheduler, _sequence):
    scheduler._kv.pool._free.popitem()


def cache_partial_block(scheduler, sequence):
    scheduler._kv.cache.register(sequence.block_table[-1], scheduler._kv.cache.root(None))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (break_table, "I2"),
        (break_ref_count, "I2"),
        (break_content, "I4"),
        (break_count, "I8"),
        (break_slot, "I7"),
        (break_queue, "I9"),
        (lose_block, "I1"),
        (cache_partial_block, "I4"),
    ],
)
def test_audit_sees(damage, words):
    rig = Rig(config())
    rig.add(make_request("a", [0] * 9, 4, ignore_eos=True))
    rig.step()
    (sequence,) = rig.scheduler._running
    damage(rig.scheduler, sequence)
    with pytest.raises(ConsistencyError, match=words):
        rig.scheduler.audit()
