"""Stop strings against a model that searches the whole text anew after every character."""

from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.text.stop_strings import MAX_STOP_CHARACTERS, StopStrings


def naive(text: str, stops: list[str], armed_from: int = 0) -> tuple[int, str] | None:
    """(end, stop) of the stop string that ends first after `armed_from` characters, the longest at that end."""
    for end in range(armed_from + 1, len(text) + 1):
        for stop in sorted(stops, key=len, reverse=True):
            if text.endswith(stop, 0, end):
                return end, stop
    return None


def naive_held(text: str, stops: list[str]) -> int:
    """Length of the longest end of `text` that is a proper prefix of a stop string."""
    lengths = range(1, max(map(len, stops)))
    return max((n for n in lengths if any(len(s) > n and text.endswith(s[:n]) for s in stops)), default=0)


LETTERS = st.text("ab", max_size=24) | st.text("abé🦊", max_size=12)
STOPS = st.lists(
    st.text("ab", min_size=1, max_size=5) | st.text("abé🦊", min_size=1, max_size=3), min_size=1, max_size=4
)


@settings(max_examples=600, deadline=None, derandomize=True, database=None)
@given(st.lists(LETTERS, max_size=8), STOPS, st.booleans())
def test_equals_the_naive_model(pieces: list[str], stops: list[str], include: bool) -> None:
    finder = StopStrings(stops, include)
    seen = released = ""
    for piece in pieces:
        released += finder.push(piece)
        seen += piece
        found = naive(seen, stops)
        if found is not None:
            end, stop = found
            assert finder.matched == stop
            assert released == seen[: end if include else end - len(stop)]
            assert finder.push("more") == finder.flush() == ""
            return
        assert finder.matched is None
        assert len(seen) - len(released) == naive_held(seen, stops) < max(map(len, stops))
        assert seen.startswith(released)
    assert released + finder.flush() == seen
    assert finder.flush() == ""


@settings(max_examples=400, deadline=None, derandomize=True, database=None)
@given(st.text("ab", max_size=12), st.text("ab", max_size=16), STOPS)
def test_what_ends_before_it_counts_is_passed_over(start: str, rest: str, stops: list[str]) -> None:
    finder = StopStrings(stops)
    released = finder.push(start, armed=False)
    assert finder.matched is None
    assert len(start) - len(released) == naive_held(start, stops)
    released += finder.push(rest)
    found = naive(start + rest, stops, armed_from=len(start))
    if found is None:
        assert finder.matched is None
        assert released + finder.flush() == start + rest
    else:
        end, stop = found
        assert finder.matched == stop
        assert released == (start + rest)[: end - len(stop)]


@pytest.mark.parametrize(
    ("stops", "text", "released", "matched"),
    [
        (["stop"], "a stop b", "a ", "stop"),
        (["b", "abc"], "xabc", "xa", "b"),  # ends first
        (["bc", "abc"], "xabc", "x", "abc"),  # ends at the same place, begins first
        (["abcd", "bc"], "abce", "a", "bc"),  # inside what may become another
        (["\n\n"], "a\n\n\nb", "a", "\n\n"),
        (["aab"], "aaab", "a", "aab"),
    ],
)
def test_which_match_wins(stops: list[str], text: str, released: str, matched: str) -> None:
    for size in range(1, len(text) + 1):
        finder = StopStrings(stops)
        assert "".join(finder.push(text[i : i + size]) for i in range(0, len(text), size)) == released
        assert finder.matched == matched


def test_text_that_begins_no_stop_string_passes_at_once() -> None:
    finder = StopStrings(["###", "END"])
    assert finder.push("a#b E") == "a#b "
    assert finder.push("x") == "Ex"
    assert finder.push("##") == ""
    assert finder.push("EN") == "##"
    assert finder.flush() == "EN"


def test_too_long_is_refused() -> None:
    StopStrings(["x" * MAX_STOP_CHARACTERS])
    with pytest.raises(ValueError, match=f"{MAX_STOP_CHARACTERS + 1} characters in all"):
        StopStrings(["x" * MAX_STOP_CHARACTERS, "y"])


def test_time_is_linear() -> None:
    """The worst text for a search that starts over: always almost a match."""
    finder = StopStrings(["a" * 8000 + "b", "a" * 4000 + "c"])
    start = time.perf_counter()
    released = sum(len(finder.push("aaaa")) for _ in range(50_000))
    assert released == 200_000 - 8000
    assert time.perf_counter() - start < 10  # quadratic takes minutes
