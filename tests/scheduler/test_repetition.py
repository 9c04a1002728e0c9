"""An output ends at the first token that completes copies enough of one pattern, and at no other."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scheduler_rig import EOS, config, make_request

from octavo.protocol.plan import RowResult, StepResult
from octavo.protocol.repetition import RepetitionDetectionParams
from octavo.scheduler.repetition import RepetitionDetector
from octavo.scheduler.scheduler import Scheduler
from octavo.scheduler.sequence import Sequence


def ends_in_copies(tokens: list[int], params: RepetitionDetectionParams) -> bool:
    """Long-hand: the last min_count stretches of some size are one and the same."""
    for size in range(max(1, params.min_pattern_size), params.max_pattern_size + 1):
        stretch = size * params.min_count
        copies = {tuple(tokens[i : i + size]) for i in range(len(tokens) - stretch, len(tokens), size)}
        if len(tokens) >= stretch and len(copies) == 1:
            return True
    return False


@settings(max_examples=200, deadline=None)
@given(st.data(), st.integers(0, 6), st.integers(2, 4))
def test_every_token_is_judged_as_by_hand(data: st.DataObject, most: int, count: int) -> None:
    params = RepetitionDetectionParams(
        max_pattern_size=most, min_pattern_size=data.draw(st.integers(0, most)), min_count=count if most else 0
    )
    pieces = data.draw(st.lists(st.tuples(st.lists(st.integers(0, 2), max_size=6), st.integers(1, 5)), max_size=8))
    tokens = [token for piece, times in pieces for token in piece * times]
    detector = RepetitionDetector(params)
    for end in range(1, len(tokens) + 1):
        assert detector.push(tokens[end - 1]) == ends_in_copies(tokens[:end], params), tokens[:end]


def sequence(prompt: list[int], **wish: Any) -> Sequence:
    detection = RepetitionDetectionParams(max_pattern_size=2, min_count=3)
    return Sequence(make_request("a", prompt, 20, repetition_detection=detection, **wish), (0, 0))


def test_only_the_output_counts_and_only_from_min_tokens_on() -> None:
    own = sequence([1, 1, 1, 1])
    assert [own.append(1) for _ in range(3)] == [None, None, "repetition"]
    late = sequence([5], min_tokens=5)
    assert [late.append(1) for _ in range(5)] == [None] * 4 + ["repetition"]
    pairs = sequence([5])
    assert [pairs.append(token) for token in (1, 2, 1, 2, 1, 2)] == [None] * 5 + ["repetition"]
    ended = sequence([5], stop_token_ids=[3])
    assert [ended.append(3), ended.append(EOS)] == ["stop", "stop"]


def test_it_ends_with_a_step_in_flight_and_leaves_nothing() -> None:
    scheduler = Scheduler(config())
    detection = RepetitionDetectionParams(max_pattern_size=1, min_count=3)
    scheduler.add(make_request("a", [5, 6], 20, repetition_detection=detection))
    outputs, plans = [], [scheduler.schedule(0.0)]
    while scheduler.has_unfinished():
        plans.append(scheduler.schedule(0.0))
        plan = plans.pop(0)
        assert plan is not None
        outputs += scheduler.commit(plan, StepResult(plan.step_id, [RowResult([7]) for _ in plan.rows]))
    assert [output.finish_reason for output in outputs] == [None, None, "repetition"]
    assert outputs[-1].stop_reason is None
    for plan in plans:
        if plan is not None:
            assert scheduler.commit(plan, StepResult(plan.step_id, [RowResult([7]) for _ in plan.rows])) == []
    scheduler.audit()


@pytest.mark.parametrize(
    ("wish", "message"),
    [
        ({"max_pattern_size": 257}, r"repetition_detection.max_pattern_size=257 is out of range; allowed: 0..256"),
        ({"max_pattern_size": 2, "min_pattern_size": 3, "min_count": 2}, r"min_pattern_size=3 .* allowed: 0..2"),
        ({"max_pattern_size": 2, "min_count": 1}, r"min_count=1 is out of range; allowed: 2.."),
        ({"max_pattern_size": True, "min_count": 2}, r"max_pattern_size=True is not an integer"),
    ],
)
def test_what_cannot_be_is_refused(wish: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RepetitionDetectionParams(**wish)
