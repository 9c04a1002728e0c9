"""JSON read in pieces, beside json.loads."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.structured.json_text import JsonReader, json_of, string_pieces, valid_json

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)


def _read(pieces: list[str]) -> tuple[str, str, JsonReader]:
    """What was given out, what was left, and the reader."""
    reader, out, left = JsonReader(), "", ""
    for piece in pieces:
        end = reader.read(piece, 0)
        out += reader.take()
        left += piece[end:]
    return out, left, reader


@given(value=JSON, indent=st.sampled_from([None, 2]), ensure_ascii=st.booleans())
@settings(deadline=None, derandomize=True)
def test_every_value_is_read_to_its_end_in_any_pieces(value: Any, indent: int | None, ensure_ascii: bool) -> None:
    text = json.dumps(value, indent=indent, ensure_ascii=ensure_ascii)
    for pieces in ([text + " rest"], list(text + " rest")):
        out, left, reader = _read(pieces)
        assert (out, left, reader.done, reader.failed) == (text, " rest", True, False)


@given(text=st.text(alphabet='{}[]",:\\ u1-.e0truefalsn\n', max_size=12))
@settings(max_examples=500, deadline=None, derandomize=True)
def test_what_is_valid_is_what_json_takes(text: str) -> None:
    try:
        json.loads(text, strict=False)
        valid = re.search(r"NaN|Infinity", text) is None
    except ValueError:
        valid = False
    assert (valid_json(text) is not None) == valid
    if valid:
        json.loads(valid_json(text) or "")


@pytest.mark.parametrize(
    "text", ["01", "1.", ".5", "+1", "tru", "nul ", "{a: 1}", "[1,]", '{"a":1,}', '"\\x"', "NaN", "'a'", "1 2", ""]
)
def test_what_is_no_json(text: str) -> None:
    assert valid_json(text) is None


def test_bare_control_characters_are_escaped() -> None:
    assert valid_json('{"a": "x\n\ty"}') == '{"a": "x\\n\\ty"}'


def test_depth_does_not_matter() -> None:
    text = "[" * 50_000 + "]" * 50_000
    assert valid_json(text) == text


@given(pieces=st.lists(st.text()))
@settings(deadline=None, derandomize=True)
def test_string_pieces_join(pieces: list[str]) -> None:
    assert json.loads(f'"{"".join(map(string_pieces, pieces))}"') == "".join(pieces)


def test_json_of_is_always_encodable() -> None:
    assert json_of({"a": "é\ud800"}) == '{"a": "\\u00e9\\ud800"}'
    assert json_of("é") == '"é"'
    with pytest.raises(ValueError, match="not JSON compliant"):
        json_of(float("inf"))
