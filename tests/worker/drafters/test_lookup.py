"""The ring of past outputs, settings, and drafts found in both."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.worker.drafters.lookup import Lookup, LookupSettings, PastOutputs

CPU = torch.device("cpu")


def ring_of(past: PastOutputs) -> list[int]:
    """Its tokens, the oldest first."""
    head = int(past.head)
    return [*past.tokens[head:].tolist(), *past.tokens[:head].tolist()]


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.integers(1, 12), st.lists(st.lists(st.integers(0, 99), max_size=20), max_size=8))
def test_the_ring_holds_the_latest_tokens_of_all_outputs(capacity: int, outputs: list[list[int]]) -> None:
    past = PastOutputs(capacity, CPU)
    tokens, head = past.tokens, past.head
    written = [-1] * capacity
    for output in outputs:
        past.add(torch.tensor(output, dtype=torch.int64))
        written += [*output[max(0, len(output) - capacity + 1) :], -1]
    assert ring_of(past) == written[-capacity:]
    assert past.tokens is tokens
    assert past.head is head


def find(lookup: Lookup, tokens: list[int], wanted: int) -> list[int]:
    drafts = torch.zeros(1, lookup.settings.max_drafts, dtype=torch.int32)
    counts = torch.zeros(1, dtype=torch.int32)
    one = (torch.tensor([value], dtype=torch.int32) for value in (0, len(tokens), wanted))
    lookup.find(torch.tensor([tokens]), *one, drafts, counts)
    return drafts[0, : int(counts)].tolist()


def test_drafts_come_from_a_past_output_as_long_as_the_ring_holds_it() -> None:
    lookup = Lookup(LookupSettings(min_match=2, max_match=4, max_drafts=3, corpus_tokens=10), CPU)
    assert lookup.past is not None
    assert find(lookup, [1, 2], 3) == []
    lookup.past.add(torch.tensor([1, 2, 3, 4, 5]))
    assert find(lookup, [1, 2], 3) == [3, 4, 5]
    assert find(lookup, [1, 2], 2) == [3, 4]
    lookup.past.add(torch.tensor([6, 7, 8]))
    assert find(lookup, [1, 2], 3) == [3, 4, 5]
    assert find(lookup, [6, 7], 3) == [8]
    lookup.past.add(torch.tensor([9]))
    assert find(lookup, [1, 2], 3) == []
    assert find(lookup, [3, 4], 3) == [5]


def test_without_a_corpus_a_sequence_has_its_own_tokens_alone() -> None:
    lookup = Lookup(LookupSettings(min_match=2, max_match=4, max_drafts=3), CPU)
    assert lookup.past is None
    assert find(lookup, [1, 2, 3, 4, 1, 2], 3) == [3, 4, 1]
    assert find(lookup, [1, 2, 3, 4, 2, 1], 3) == []


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((0, 4, 4, 0), r"min_match=0; allowed: 1 to 64"),
        ((2, 65, 4, 0), r"max_match=65; allowed: 1 to 64"),
        ((5, 4, 4, 0), r"min_match=5; allowed: 1 to max_match=4"),
        ((2, 4, 0, 0), r"max_drafts=0; allowed: 1 to 64"),
        ((2, 4, 4, -1), r"corpus_tokens=-1; allowed: 0 to 268435456"),
    ],
)
def test_settings_out_of_range_are_refused(values: tuple[int, int, int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LookupSettings(*values)
