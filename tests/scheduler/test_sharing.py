"""What is found in the prefix cache, by whom and when, as seen in plans and outputs."""

from __future__ import annotations

from scheduler_rig import Rig, config, expected, make_request, rows


def test_hits_are_whole_blocks_and_leave_the_last_token_to_compute():
    rig = Rig(config())
    for name, length, cached in (("a", 12, 0), ("b", 12, 8), ("c", 13, 12), ("d", 11, 8), ("e", 4, 0), ("f", 3, 0)):
        rig.add(make_request(name, [0] * length, 1))
        rig.drain()
        assert rig.accounts[name].last.num_cached_tokens == cached, name
    stats = rig.scheduler.stats()
    assert (stats.prefix_cache_queries_total, stats.prefix_cache_hits_total) == (55, 28)


def test_requests_of_one_step_share_their_prefix():
    rig = Rig(config())
    rig.add(make_request("a", [0, 1] * 6 + [0], 2))
    rig.add(make_request("b", [0, 1] * 6 + [1], 2))
    plan = rig.submit()
    assert rows(plan) == [(0, 0, 13, True), (1, 12, 1, True)]
    assert plan.new_sequences[0].block_table[:3] == plan.new_sequences[1].block_table[:3]
    rig.commit()
    rig.drain()


def test_a_chunk_makes_known_only_what_it_fills():
    """The chunk ends inside the third block: a second request finds two, and the rest once it is filled."""
    rig = Rig(config(max_num_batched_tokens=11), depth=2)
    rig.add(make_request("a", [0, 1] * 8, 1))
    assert rows(rig.submit()) == [(0, 0, 11, False)]
    rig.add(make_request("b", [0, 1] * 8, 1))
    assert rows(rig.submit()) == [(0, 11, 5, True), (1, 12, 4, True)]
    rig.drain()


def test_output_tokens_are_found_once_they_are_known():
    rig = Rig(config(), depth=2)
    request = make_request("a", [0, 1, 0], 12, ignore_eos=True)
    rig.add(request)
    rig.drain()
    told = rig.accounts["a"].tokens
    rig.add(make_request("b", [*request.prompt_token_ids, *told, 1], 1))
    rig.drain()
    # 14 of the 15 tokens were computed: the last one never is.
    assert rig.accounts["b"].last.num_cached_tokens == 12


def test_salts_do_not_share():
    rig = Rig(config())
    for name, salt, cached in (("a", "x", 0), ("b", "y", 0), ("c", None, 0), ("d", "x", 8)):
        rig.add(make_request(name, [0] * 9, 1, cache_salt=salt))
        rig.drain()
        assert rig.accounts[name].last.num_cached_tokens == cached, name


def test_prompt_logprobs_skip_the_cache_and_come_with_the_first_token():
    rig = Rig(config(max_num_batched_tokens=4))
    rig.add(make_request("a", [0] * 9, 1))
    rig.drain()
    request = make_request("b", [0] * 9, 3, prompt_logprobs=1, ignore_eos=True)
    rig.add(request)
    outputs = [output for _ in range(5) for output in rig.step()]
    assert outputs[0].prompt_logprobs == expected(request).prompt_logprobs
    assert [output.prompt_logprobs for output in outputs[1:]] == [None, None]
    assert outputs[0].num_cached_tokens == 0


def test_prompt_logprobs_of_one_token_are_none_at_all():
    rig = Rig(config())
    rig.add(make_request("a", [0], 1, prompt_logprobs=1))
    assert rig.step()[0].prompt_logprobs == []


def test_reset_forgets_everything_and_runs_on():
    rig = Rig(config())
    rig.add(make_request("a", [0] * 9, 4, ignore_eos=True))
    rig.submit()
    assert rig.scheduler.reset_prefix_cache()
    rig.add(make_request("b", [0] * 9, 1))
    rig.drain()
    assert rig.accounts["b"].last.num_cached_tokens == 0
    assert not Rig(config(enable_prefix_caching=False)).scheduler.reset_prefix_cache()


def test_the_least_recently_used_tail_is_evicted_first():
    """9 blocks: two cached prompts of 4; a third of 4 evicts the free one and the tail of the older."""
    rig = Rig(config(num_blocks=10))
    rig.add(make_request("old", [0] * 16, 1))
    rig.drain()
    rig.add(make_request("new", [1] * 16, 1))
    rig.drain()
    rig.add(make_request("third", [0, 1] * 7, 1))
    rig.drain()
    for name, prompt, cached in (("new2", [1] * 17, 16), ("old2", [0] * 17, 4)):
        rig.add(make_request(name, prompt, 1))
        rig.drain()
        assert rig.accounts[name].last.num_cached_tokens == cached, name
