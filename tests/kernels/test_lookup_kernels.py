"""Lookup of drafts: the reference against plain Python, and the kernels against the reference."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from octavo.kernels.reference import lookup as reference
from octavo.kernels.triton import lookup

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
UNTOUCHED = -7
WIDTH = 6  # columns of drafts


@dataclass(frozen=True)
class Case:
    """tokens: of each slot, of which the last `unknown` are what an earlier sequence left. rows: (slot, drafts wanted).
    ring: with its head."""

    tokens: list[list[int]]
    rows: list[tuple[int, int]]
    ring: list[int] | None = None
    head: int = 0
    matches: tuple[int, int] = (2, 5)
    unknown: int = 0

    def known(self, slot: int) -> list[int]:
        tokens = self.tokens[slot] if slot >= 0 else []
        return tokens[: max(0, len(tokens) - self.unknown)]


def best_of_row(case: Case, row: int) -> list[int]:
    """The definition, place by place."""
    slot, wanted = case.rows[row]
    known = case.known(slot)
    least, most = case.matches
    places: list[tuple[int, int, int, list[int]]] = []  # match, own or not, how late, what follows
    for end in range(1, len(known)):
        repeated = known[end:] * wanted
        places.append((common(known[:end], known, most), 1, end, repeated[:wanted]))
    ring = [] if case.ring is None else case.ring[case.head :] + case.ring[: case.head]  # the oldest first
    for end in range(1, len(ring)):
        follows = ring[end : end + wanted]
        if -1 in follows:
            follows = follows[: follows.index(-1)]
        if ring[end] != -1:
            places.append((common(ring[:end], known, most), 0, end, follows))
    found = [place for place in places if place[0] >= least]
    return max(found)[3] if found and wanted > 0 else []


def common(one: list[int], other: list[int], most: int) -> int:
    """Tokens that the ends of both have in common, at most `most`."""
    count = 0
    while count < min(most, len(one), len(other)) and one[-1 - count] == other[-1 - count] != -1:
        count += 1
    return count


def found_by(module: object, case: Case, dtype: torch.dtype = torch.int32) -> list[list[int]]:
    """The drafts; asserts that nothing else was written."""
    width = max(map(len, case.tokens))
    tokens = torch.tensor([ids + [0] * (width - len(ids)) for ids in case.tokens], dtype=dtype, device=DEVICE)
    slots, wanted = torch.tensor(case.rows, dtype=torch.int32, device=DEVICE).T.contiguous()
    known = [len(case.known(slot)) for slot in range(len(case.tokens))]
    lengths = torch.tensor(known, dtype=torch.int32, device=DEVICE)
    ring: tuple[Tensor | None, Tensor | None] = (None, None)
    if case.ring is not None:
        corpus, head = (torch.tensor(ids, dtype=torch.int32, device=DEVICE) for ids in (case.ring, [case.head]))
        ring = corpus, head
    drafts = torch.full((len(case.rows), WIDTH), UNTOUCHED, dtype=torch.int32, device=DEVICE)
    counts = torch.full((len(case.rows),), UNTOUCHED, dtype=torch.int32, device=DEVICE)
    module.find_drafts(tokens, slots, lengths, wanted, *ring, *case.matches, drafts, counts)  # type: ignore[attr-defined]
    for row, count in zip(drafts.tolist(), counts.tolist()):
        assert row[count:] == [UNTOUCHED] * (WIDTH - count)
    return [row[:count] for row, count in zip(drafts.tolist(), counts.tolist())]


def check(case: Case, expected: list[list[int]] | None = None) -> None:
    want = [best_of_row(case, row) for row in range(len(case.rows))]
    assert expected is None or want == expected
    assert found_by(reference, case) == want
    assert found_by(lookup, case) == want


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Few different ids, so that runs repeat; rings written once or more round."""
    ids = st.integers(0, draw(st.sampled_from([0, 1, 3])))
    tokens = draw(st.lists(st.lists(ids, min_size=1, max_size=40), min_size=1, max_size=3))
    slots = draw(st.lists(st.integers(-1, len(tokens) - 1), min_size=1, max_size=3))
    rows = [(slot, draw(st.integers(0, WIDTH))) for slot in slots]
    ring, head = None, 0
    if draw(st.booleans()):
        ring = draw(st.lists(st.one_of(ids, st.just(-1)), min_size=1, max_size=40))
        head = draw(st.integers(0, len(ring) - 1))
        ring[head - 1] = -1
    least = draw(st.integers(1, 4))
    return Case(tokens, rows, ring, head, (least, draw(st.integers(least, 7))), draw(st.integers(0, 3)))


@settings(max_examples=400, deadline=None, derandomize=True)
@given(cases())
def test_the_reference_finds_what_the_definition_says(case: Case) -> None:
    want = [best_of_row(case, row) for row in range(len(case.rows))]
    assert found_by(reference, case) == want
    assert found_by(reference, case, torch.int64) == want


@settings(max_examples=60, deadline=None, derandomize=True)
@given(cases())
def test_find_drafts_finds_what_the_reference_does(case: Case) -> None:
    assert found_by(lookup, case) == found_by(reference, case)


def test_the_longest_match_wins_and_then_the_latest() -> None:
    long_first = [1, 2, 3, 50, 9, 2, 3, 60, 8, 1, 2, 3]
    check(Case([long_first], [(0, 2)]), [[50, 9]])
    check(Case([long_first], [(0, 2)], matches=(1, 2)), [[60, 8]])
    check(Case([long_first], [(0, 2)], matches=(4, 5)), [[]])


def test_a_match_is_found_behind_many_shorter_ones() -> None:
    often = [3, 1] * 150
    check(Case([[7, 8, 1, 50, *often, 7, 8, 1]], [(0, 2)], matches=(1, 5)), [[50, 3]])
    check(Case([[50, *often]], [(0, 3)], matches=(1, 5)), [[3, 1, 3]])


def test_own_tokens_are_repeated_and_past_outputs_are_not() -> None:
    check(Case([[5, 7, 8, 9, 7, 8, 9, 99]], [(0, 5)], unknown=1), [[7, 8, 9, 7, 8]])
    check(Case([[4, 4, 4]], [(0, 3)]), [[4, 4, 4]])
    ring = [7, 8, 1, 2, -1, 6, 7, 8, -1, -1]
    check(Case([[6, 7, 8]], [(0, 5)], ring), [[1, 2]])  # 6, 7, 8 matches more, and nothing follows


def test_own_tokens_come_before_as_long_a_match_elsewhere() -> None:
    ring = [1, 2, 30, -1]
    check(Case([[1, 2, 40, 1, 2]], [(0, 1)], ring), [[40]])
    check(Case([[1, 2, 40, 0, 1, 2]], [(0, 1)], [0, *ring]), [[30]])


@pytest.mark.parametrize(("head", "expected"), [(0, 22), (4, 11)])
def test_of_past_outputs_the_latest_wins(head: int, expected: int) -> None:
    check(Case([[1, 2]], [(0, 1)], [1, 2, 11, -1, 1, 2, 22, -1], head), [[expected]])


def test_a_match_spans_the_rings_end_but_no_two_outputs() -> None:
    ring = [3, 4, -1, 9, 9, 9, -1, 1, 2]
    check(Case([[1, 2, 3]], [(0, 4)], ring, 3, (3, 3)), [[4]])
    check(Case([[4, 9, 9]], [(0, 4)], ring, 3, (3, 3)), [[]])


def test_rows_without_a_slot_without_a_wish_or_without_tokens_get_none() -> None:
    tokens = [[1, 1, 1, 1, 1], [2, 2, 2, 2], [3], [4, 4]]
    check(Case(tokens, [(-1, 2), (0, 0), (1, 2), (2, 2), (3, 2)], unknown=1), [[], [], [2, 2], [], []])


@pytest.mark.parametrize("shares", [1, 3, 512])
def test_long_rows_and_a_large_ring_in_few_and_many_programs(shares: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """More blocks than programs; the only place lies in the first block, in the last, or in the ring."""
    monkeypatch.setattr(lookup, "_MAX_SHARES", shares)
    generator = torch.Generator().manual_seed(1)
    row = torch.randint(10, 50_000, (5000,), generator=generator).tolist()
    ring = torch.randint(10, 50_000, (4500,), generator=generator).tolist()
    tail = [1, 2, 3, 4]
    early, late, absent = list(row), list(row), list(row)
    early[7:13] = [*tail, 70, 71]
    late[4980:4986] = [*tail, 80, 81]
    for tokens in (early, late, absent):
        tokens[-4:] = tail
    ring[4096:4102] = [*tail, 90, 91]
    ring[2000] = -1
    case = Case([early, late, absent, row], [(slot, 2) for slot in range(4)], None, 0, (3, 16))
    nothing: list[int] = []
    assert found_by(lookup, case) == found_by(reference, case) == [[70, 71], [80, 81], nothing, nothing]
    with_ring = replace(case, ring=ring, head=2001)
    assert found_by(lookup, with_ring) == found_by(reference, with_ring) == [[70, 71], [80, 81], [90, 91], nothing]
