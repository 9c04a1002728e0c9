"""Single behaviours of the scheduler, each seen in its plans and outputs."""

from __future__ import annotations

import pytest
from scheduler_rig import EOS, Rig, config, make_request, rows

from octavo.protocol.plan import RowResult, StepResult, TokenLogprobs
from octavo.scheduler.audit import ConsistencyError
from octavo.scheduler.scheduler import Scheduler


def answer(plan, tokens):
    """A result in which every sampling row says the next of `tokens`."""
    tokens = iter(tokens)
    return StepResult(plan.step_id, [RowResult([next(tokens)] if row.samples else []) for row in plan.rows])


def run_one(request, tokens, **changes):
    """The outputs of a request alone, whose worker says `tokens`."""
    scheduler = Scheduler(config(**changes))
    scheduler.add(request)
    outputs = []
    for token in tokens:
        plan = scheduler.schedule(1.0)
        outputs += scheduler.commit(plan, answer(plan, [token]))
    return outputs


# Admission


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "changes", "words"),
    [
        ([], 4, {}, "prompt_token_ids is empty"),
        ([1], 128, {}, "more than max_model_len=128"),
        ([1] * 13, 5, {"num_blocks": 5}, "they need 5 KV blocks of 4 tokens, the cache has 4"),
        ([1] * 60, 10, {"enable_chunked_prefill": False}, "max_num_batched_tokens=64"),
        ([1, -1], 4, {}, "no token id"),
        ([1, 2**32], 4, {}, "no token id"),
    ],
)
def test_what_can_never_run_is_refused(prompt, max_tokens, changes, words):
    scheduler = Scheduler(config(**changes))
    with pytest.raises(ValueError, match=words):
        scheduler.add(make_request("a", prompt, max_tokens))
    assert not scheduler.has_unfinished()
    scheduler.audit()


def test_what_fits_exactly_runs():
    """16 computed tokens in 4 blocks of 4: the 17th is sampled and never computed."""
    rig = Rig(config(num_blocks=5, max_model_len=17, max_num_batched_tokens=16, enable_chunked_prefill=False))
    rig.add(make_request("a", [1] * 13, 4, ignore_eos=True))
    rig.drain()
    assert len(rig.accounts["a"].tokens) == 4


def test_an_id_is_unique_among_unfinished_requests():
    rig = Rig(config())
    rig.add(make_request("a", [1], 1))
    with pytest.raises(ValueError, match="'a' is in use"):
        rig.scheduler.add(make_request("a", [1], 1))
    rig.drain()
    rig.add(make_request("a", [1], 1))
    rig.drain()


def test_a_prompt_waits_until_all_its_blocks_fit():
    rig = Rig(config(num_blocks=9))
    rig.add(make_request("a", [1] * 20, 2))
    rig.add(make_request("b", [0] * 20, 2))
    assert len(rig.submit().rows) == 1
    assert rig.scheduler.stats().num_waiting == 1
    rig.commit()
    rig.drain()


def test_first_come_first_served_even_if_a_later_one_fits():
    rig = Rig(config(num_blocks=9))
    for name, length in (("a", 20), ("b", 20), ("c", 2)):
        rig.add(make_request(name, [len(name), ord(name)] * (length // 2), 2))
    assert len(rig.submit().rows) == 1
    rig.commit()
    rig.drain()


def test_slots_bound_the_running_sequences():
    rig = Rig(config(max_num_seqs=2))
    for index in range(5):
        rig.add(make_request(str(index), [index], 3, ignore_eos=True))
    assert rows(rig.submit()) == [(0, 0, 1, True), (1, 0, 1, True)]
    rig.commit()
    rig.drain()


# Budget


def test_decodes_run_before_prompts_and_prompts_are_cut_to_the_budget():
    rig = Rig(config(max_num_batched_tokens=10))
    rig.add(make_request("a", [0, 1], 8, ignore_eos=True))
    rig.submit()
    rig.commit()
    rig.add(make_request("b", [1] * 13, 8, ignore_eos=True))
    rig.add(make_request("c", [0] * 7, 8, ignore_eos=True))
    assert rows(rig.submit()) == [(0, 2, 1, True), (1, 0, 9, False)]
    rig.commit()
    assert rows(rig.submit()) == [(0, 3, 1, True), (1, 9, 4, True), (2, 0, 5, False)]
    rig.commit()
    assert rows(rig.submit()) == [(0, 4, 1, True), (1, 13, 1, True), (2, 5, 2, True)]
    rig.commit()
    rig.drain()


def test_chunks_end_at_multiples_of_the_alignment_unless_that_takes_most_of_them_away():
    rig = Rig(config(max_num_batched_tokens=20, chunk_alignment=8))
    rig.add(make_request("a", [0, 1], 8, ignore_eos=True))
    rig.submit()
    rig.commit()
    rig.add(make_request("b", [1] * 37, 8, ignore_eos=True))
    rig.add(make_request("c", [0] * 12, 8, ignore_eos=True))
    # Of b's 19 tokens 16; what is left is c's, but of 3 the alignment would leave none.
    assert rows(rig.submit()) == [(0, 2, 1, True), (1, 0, 16, False), (2, 0, 3, False)]
    rig.commit()
    # b: 16 + 19 = 35, cut to 32. c: 3 + 3 = 6 reaches no multiple.
    assert rows(rig.submit()) == [(0, 3, 1, True), (1, 16, 16, False), (2, 3, 3, False)]
    rig.commit()
    # The ends of prompts are where they are.
    assert rows(rig.submit()) == [(0, 4, 1, True), (1, 32, 5, True), (2, 6, 6, True)]
    rig.commit()
    rig.drain()


def test_without_chunked_prefill_a_prompt_runs_whole_or_waits():
    rig = Rig(config(max_num_batched_tokens=20, enable_chunked_prefill=False))
    rig.add(make_request("a", [0] * 12, 4, ignore_eos=True))
    rig.add(make_request("b", [1] * 12, 4))
    assert rows(rig.submit()) == [(0, 0, 12, True)]
    rig.commit()
    assert rows(rig.submit()) == [(0, 12, 1, True), (1, 0, 12, True)]
    rig.commit()
    rig.drain()


def test_without_chunked_prefill_only_the_uncached_part_must_fit():
    rig = Rig(config(max_num_batched_tokens=20, enable_chunked_prefill=False))
    rig.add(make_request("a", [0] * 12, 4, ignore_eos=True))
    rig.add(make_request("b", [0] * 12, 4))
    assert rows(rig.submit()) == [(0, 0, 12, True), (1, 8, 4, True)]
    rig.commit()
    rig.drain()


# Steps in flight


def test_a_sequence_is_scheduled_ahead_up_to_its_last_token():
    rig = Rig(config(), depth=4)
    rig.add(make_request("a", [0, 1, 0], 3, ignore_eos=True))
    assert [rows(rig.submit()) for _ in range(3)] == [[(0, 0, 3, True)], [(0, 3, 1, True)], [(0, 4, 1, True)]]
    assert rig.submit() is None
    assert [len(rig.commit()) for _ in range(3)] == [1, 1, 1]
    rig.check_empty()


def test_nothing_to_do_is_none():
    assert Scheduler(config()).schedule(0.0) is None


def test_a_row_planned_before_the_end_was_known_is_discarded():
    scheduler = Scheduler(config())
    scheduler.add(make_request("a", [1, 2], 8))
    first, second = scheduler.schedule(1.0), scheduler.schedule(1.0)
    (output,) = scheduler.commit(first, answer(first, [EOS]))
    assert (output.new_token_ids, output.finish_reason) == ([EOS], "stop")
    assert scheduler.stats().num_free_blocks == 31
    assert not scheduler.has_unfinished()
    assert scheduler.schedule(1.0) is None
    assert scheduler.commit(second, answer(second, [3])) == []
    assert scheduler.stats().num_free_blocks == 32
    scheduler.audit()


def test_a_slot_is_reused_while_a_step_in_flight_still_names_it():
    rig = Rig(config(max_num_seqs=1), depth=3)
    rig.add(make_request("a", [0, 1], 8, ignore_eos=True))
    rig.add(make_request("b", [1, 1], 2))
    rig.submit()
    rig.submit()
    rig.abort(["a"])
    assert rig.submit().new_sequences[0].slot == 0
    rig.drain()


def test_plans_are_committed_in_order():
    scheduler = Scheduler(config())
    scheduler.add(make_request("a", [1, 2], 8))
    first, second = scheduler.schedule(1.0), scheduler.schedule(1.0)
    with pytest.raises(ConsistencyError, match="step 1 ends before step 0"):
        scheduler.commit(second, answer(second, [3]))
    with pytest.raises(ConsistencyError, match="result of step 1 for plan 0"):
        scheduler.commit(first, answer(second, [3]))
    with pytest.raises(ConsistencyError, match="0 results for 1 rows"):
        scheduler.commit(first, StepResult(0, []))


# Ends


@pytest.mark.parametrize(
    ("options", "tokens", "reason", "stop_reason"),
    [
        ({}, [3, EOS], "stop", None),
        ({"ignore_eos": True}, [3, EOS, 4, 5], "length", None),
        ({"stop_token_ids": [7]}, [3, 7], "stop", 7),
        ({"stop_token_ids": [EOS]}, [EOS], "stop", None),
        ({"stop_token_ids": [EOS], "ignore_eos": True}, [EOS], "stop", EOS),
        ({"min_tokens": 3}, [EOS, EOS, EOS], "stop", None),
        ({"min_tokens": 2, "stop_token_ids": [7]}, [7, 7], "stop", 7),
        ({}, [1, 2, 3, EOS], "stop", None),
        ({}, [1, 2, 3, 4], "length", None),
    ],
)
def test_how_an_output_ends(options, tokens, reason, stop_reason):
    outputs = run_one(make_request("a", [1, 2], 4, **options), tokens)
    assert [output.new_token_ids for output in outputs] == [[token] for token in tokens]
    assert [output.finish_reason for output in outputs] == [None] * (len(tokens) - 1) + [reason]
    assert outputs[-1].stop_reason == stop_reason


def speculating(**changes):
    """A scheduler that always asks for three guesses."""
    return Scheduler(config(num_speculative_tokens=3, adaptive_speculation=False, **changes))


def test_several_tokens_a_row_end_at_the_first_end():
    scheduler = speculating()
    scheduler.add(make_request("a", [1, 2], 8))
    plan = scheduler.schedule(1.0)
    assert plan.drafts == [3]
    scheduler.commit(plan, StepResult(0, [RowResult([3], draft_ids=[4, 5, 6])]))
    plan = scheduler.schedule(1.0)
    assert (rows(plan), plan.rows[0].num_drafts) == ([(0, 2, 4, True)], 3)
    lp = [TokenLogprobs([t], [-1.0], 1) for t in (4, EOS, 6)]
    (output,) = scheduler.commit(plan, StepResult(1, [RowResult([4, EOS, 6], lp)]))
    assert (output.new_token_ids, output.logprobs, output.finish_reason) == ([4, EOS], lp[:2], "stop")
    assert scheduler.stats().generation_tokens_total == 3


def test_what_does_not_come_true_is_computed_again_in_the_same_place():
    scheduler = speculating()
    scheduler.add(make_request("a", [1, 2], 20))
    scheduler.commit(plan := scheduler.schedule(1.0), StepResult(0, [RowResult([3], draft_ids=[4, 5, 6])]))
    scheduler.commit(plan := scheduler.schedule(1.0), StepResult(1, [RowResult([4, 9], draft_ids=[7])]))
    plan = scheduler.schedule(1.0)
    assert (rows(plan), plan.rows[0].num_drafts) == ([(0, 4, 2, True)], 1)  # one guess is all the worker found
    assert not plan.rows[0].new_block_ids  # the block that two of the guesses were in is there
    scheduler.audit()


def test_a_step_in_flight_counts_all_its_guesses():
    scheduler = speculating()
    scheduler.add(make_request("a", [1, 2], 20))
    first, second, third = (scheduler.schedule(1.0) for _ in range(3))
    assert rows(second) == [(0, 2, 4, True)]
    assert rows(third) == [(0, 6, 4, True)]
    scheduler.commit(first, StepResult(0, [RowResult([3], draft_ids=[4, 5, 6])]))
    scheduler.commit(second, StepResult(1, [RowResult([4, 8], draft_ids=[1, 1, 1])]))
    scheduler.audit()
    assert rows(scheduler.schedule(1.0)) == [(0, 8, 4, True)]


def test_guesses_stop_short_of_the_longest_output():
    scheduler = speculating()
    scheduler.add(make_request("a", [1, 2], 4))
    first = scheduler.schedule(1.0)
    assert first.drafts == [2]
    second = scheduler.schedule(1.0)
    assert (rows(second), second.drafts) == ([(0, 2, 3, True)], [0])
    assert scheduler.schedule(1.0) is None  # all that may come is under way
    scheduler.commit(first, StepResult(0, [RowResult([3], draft_ids=[4, 5])]))
    scheduler.commit(second, StepResult(1, [RowResult([7])]))
    assert rows(scheduler.schedule(1.0)) == [(0, 3, 1, True)]


def test_guesses_take_no_block_and_no_budget_that_others_need():
    """2 blocks of 4, one each: a's guesses would need a third."""
    scheduler = speculating(num_blocks=3, max_num_batched_tokens=5, enable_prefix_caching=False)
    scheduler.add(make_request("a", [1, 2], 3))
    scheduler.add(make_request("b", [1, 2], 3))
    plan = scheduler.schedule(1.0)
    scheduler.commit(plan, StepResult(0, [RowResult([3], draft_ids=[4]), RowResult([3], draft_ids=[4])]))
    plan = scheduler.schedule(1.0)
    assert rows(plan) == [(0, 2, 2, True), (1, 2, 2, True)]
    scheduler = speculating(num_blocks=5, max_num_batched_tokens=5, enable_prefix_caching=False)
    for name in "ab":
        scheduler.add(make_request(name, [1, 2], 7))
    plan = scheduler.schedule(1.0)
    drafts = [4, 5, 6]
    scheduler.commit(plan, StepResult(0, [RowResult([3], draft_ids=drafts), RowResult([3], draft_ids=drafts)]))
    plan = scheduler.schedule(1.0)
    assert rows(plan) == [(0, 2, 4, True), (1, 2, 1, True)]
    assert scheduler.stats().num_preemptions_total == 0


def test_a_worker_that_breaks_the_contract_is_loud():
    for tokens in ([3, 4], []):
        scheduler = Scheduler(config())
        scheduler.add(make_request("a", [1, 2], 8))
        first = scheduler.schedule(1.0)
        with pytest.raises(ConsistencyError, match=f"{len(tokens)} tokens for 'a' with 0 guesses"):
            scheduler.commit(first, StepResult(0, [RowResult(tokens)]))


def test_a_row_error_ends_one_request_and_its_cache_entries():
    rig = Rig(config())
    rig.add(make_request("a", [0] * 9, 4))
    rig.add(make_request("b", [1] * 9, 4))
    rig.submit()
    first = rig.commit(frozenset([0]))[0]
    assert (first.request_id, first.finish_reason, first.error) == ("a", "error", "NaN")
    rig.drain()
    assert rig.accounts["b"].last.finish_reason in ("stop", "length")
    rig.add(make_request("c", [0] * 9, 1))
    rig.add(make_request("d", [1] * 9, 1))
    rig.drain()
    assert rig.accounts["c"].last.num_cached_tokens == 0
    assert rig.accounts["d"].last.num_cached_tokens == 8


def test_a_row_that_is_refused_leaves_its_cache_entries():
    rig = Rig(config())
    rig.add(make_request("a", [0] * 9, 4))
    rig.add(make_request("b", [1] * 9, 4))
    rig.submit()
    ends = {output.request_id: output for output in rig.commit(frozenset([0, 1]))}
    assert (ends["a"].refused, ends["b"].refused) == (False, True)
    rig.add(make_request("c", [1] * 9, 1))
    rig.drain()
    assert rig.accounts["c"].last.num_cached_tokens == 8
