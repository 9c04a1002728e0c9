"""The real model in float32: the same tokens and log-probabilities as transformers, however it is scheduled."""

from __future__ import annotations

from verify import verify


def test_equal_to_transformers_and_to_itself() -> None:
    rows = {row["check"]: row for row in verify(num_prompts=10, num_tokens=8)}
    assert set(rows) == {
        "transformers",
        "prefix cache hit",
        "prefix cache off",
        "alone",
        "chunks of 7",
        "preempted, depth 2",
    }
    assert rows["prefix cache hit"]["cached_tokens"] > 0
    assert rows["preempted, depth 2"]["preemptions"] > 0
    for row in rows.values():
        assert row["tokens_different"] == 0, row
        assert row["max_logprob_difference"] < 1e-3, row
