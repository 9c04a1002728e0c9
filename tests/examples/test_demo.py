"""The demo's terminal output: every answer in whole lines, nothing lost, nothing endless."""

from __future__ import annotations

import pytest
from demo import LINE_WIDTH, Chat


@pytest.mark.parametrize("size", [1, 7, 5000])
def test_answers_are_printed_in_lines_that_fit(size: int, capsys: pytest.CaptureFixture[str]) -> None:
    text = "one two three four five " * 20 + "\n\n" + "x" * 3 * LINE_WIDTH + " six\nseven"
    chat = Chat(3)
    for begin in range(0, len(text), size):
        chat.write(text[begin : begin + size])
    chat.write("", last=True)
    lines = capsys.readouterr().out.splitlines()
    assert all(line.startswith("[ 3] ") and len(line) <= LINE_WIDTH + len("[ 3] ") for line in lines)
    assert "".join(line.removeprefix("[ 3] ") for line in lines).replace(" ", "") == "".join(text.split())
    assert lines[-1] == "[ 3] seven"
