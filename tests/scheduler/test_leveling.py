"""Prompts of patient requests spread over the steps that decoding takes anyway."""

from __future__ import annotations

from itertools import count

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scheduler_rig import config

from octavo.protocol.plan import RowResult, StepPlan, StepResult
from octavo.protocol.request import Request
from octavo.protocol.sampling import SamplingParams
from octavo.scheduler.scheduler import Scheduler

BUDGET = 2048
NUM_SEQS = 64

Lengths = list[tuple[int, int]]  # of prompt and output, one each


def scheduler(lengths: Lengths, patient: bool = True, levels: bool = True) -> Scheduler:
    made = Scheduler(
        config(
            max_num_seqs=NUM_SEQS,
            max_num_batched_tokens=BUDGET,
            max_model_len=4096,
            num_blocks=1 << 16,
            enable_prefix_caching=False,
            levels_prompts=levels,
        )
    )
    for index, (prompt, output) in enumerate(lengths):
        sampling = SamplingParams(ignore_eos=True)
        made.add(
            Request(
                request_id=str(index),
                prompt_token_ids=[1] * prompt,
                sampling=sampling,
                max_tokens=output,
                patient=patient,
            )
        )
    return made


def plans_of(made: Scheduler) -> list[StepPlan]:
    """All steps to the end, one in flight at a time."""
    plans = []
    for number in count():
        plan = made.schedule(float(number))
        if plan is None:
            break
        plans.append(plan)
        rows = [RowResult([5] if row.samples else []) for row in plan.rows]
        made.commit(plan, StepResult(plan.step_id, rows))
    assert not made.has_unfinished()
    return plans


# Longest first; together they have 190 tokens for each of the longest one's.
FALLING: Lengths = [(1600, output) for output in range(600, 0, -10)]


def test_steps_are_level_while_there_are_prompts() -> None:
    tokens = [plan.num_tokens for plan in plans_of(scheduler(FALLING))]
    at_once = [plan.num_tokens for plan in plans_of(scheduler(FALLING, levels=False))]
    assert sum(tokens) == sum(at_once)
    assert at_once[:10] == [BUDGET] * 10
    first, *others = tokens
    assert first == BUDGET  # nothing decodes yet
    assert others[:400] == [256] * 400
    assert sum(n < 128 for n in at_once) > 500 > 2 * sum(n < 128 for n in others)
    assert len(tokens) == 600  # the longest one's prompt is computed in the first step, and samples there


@pytest.mark.parametrize("patient", [[False] * 60, [True] * 59 + [False]])
def test_nobody_who_does_not_say_so_waits(patient: list[bool]) -> None:
    made = scheduler(FALLING[:-1], patient=patient[0])
    prompt, output = FALLING[-1]
    sampling = SamplingParams(ignore_eos=True)
    made.add(Request(request_id="last", prompt_token_ids=[1] * prompt, sampling=sampling, max_tokens=output))
    assert [plan.num_tokens for plan in plans_of(made)[:20]] == [BUDGET] * 20


def test_equal_lengths_are_computed_at_once() -> None:
    """The one that starts last ends last."""
    lengths = [(500, 100)] * 40
    tokens = [plan.num_tokens for plan in plans_of(scheduler(lengths))]
    assert tokens == [plan.num_tokens for plan in plans_of(scheduler(lengths, levels=False))]


def test_long_prompts_are_computed_at_once() -> None:
    """A level above what small steps are good for is none."""
    lengths = [(3000, output) for output in range(100, 40, -1)]
    assert [plan.num_tokens for plan in plans_of(scheduler(lengths))[:50]] == [BUDGET] * 50


@settings(max_examples=30, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(1, 900), st.one_of(st.integers(1, 300), st.integers(1, 20))),
        min_size=1,
        max_size=30,
    )
)
def test_the_batch_does_not_become_longer(lengths: Lengths) -> None:
    """Each step is full, or one in which whoever ends last decodes."""
    lengths.sort(key=lambda pair: -pair[1])
    plans = plans_of(scheduler(lengths))
    num_prompt_tokens = sum(prompt for prompt, _ in lengths)
    assert len(plans) <= lengths[0][1] + -(-num_prompt_tokens // (BUDGET - NUM_SEQS))
    sampled = sum(row.samples for plan in plans for row in plan.rows)
    assert sampled == sum(output for _, output in lengths)
