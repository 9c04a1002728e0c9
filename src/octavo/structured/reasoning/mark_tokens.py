"""MarkTokens: the marks of reasoning in the tokens of one vocabulary."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from octavo.protocol.reasoning import ReasoningMarks


class MarkTokens:
    """What gates of the same marks share. The marks are looked for in the bytes of the tokens, since a model may spell
    one in several ways; what is forced or offered is the tokenizer's own spelling.

    tokens: the bytes of each id. openings: of each opening its bytes and its ids. forced: the ids of the first closing.
    stages: what is looked for, one after another; the last one's end is the end of the reasoning.
    """

    def __init__(self, marks: ReasoningMarks, tokens: Sequence[bytes], encode: Callable[[str], list[int]]) -> None:
        """Raises ValueError for a mark that the vocabulary cannot spell."""
        self.tokens = tokens
        self.openings = [(text.encode(), self._spelled(text, encode)) for text in marks.openings]
        self.forced = self._spelled(marks.closings[0], encode)
        ends = [text.encode() for text in marks.closings]
        self.stages = [_Literals(ends), *([_Literals([marks.header_end.encode()])] if marks.header_end else [])]
        self._overflowing = _overflowing(self.stages[-1].literals, tokens)

    def overflowing(self, stage: int, tail: bytes) -> set[int]:
        """Tokens that would end the reasoning of an output which ends with `tail`, and go on beyond white space: what
        follows the mark would escape its grammar."""
        if stage != len(self.stages) - 1:
            return set()
        return {i for begin, ids in self._overflowing.items() if tail.endswith(begin) for i in ids}

    def _spelled(self, text: str, encode: Callable[[str], list[int]]) -> list[int]:
        ids = encode(text)
        if not b"".join(self.tokens[i] for i in ids).endswith(text.encode()):
            raise ValueError(f"the tokens of the model do not spell {text!r}, which marks its reasoning")
        return ids


class _Literals:
    """Texts of which any is looked for in a stream of bytes. num_kept: how many bytes may be the beginning of one."""

    def __init__(self, literals: list[bytes]) -> None:
        self.literals = literals
        self.pattern = re.compile(b"|".join(map(re.escape, literals)))
        self.num_kept = max(map(len, literals)) - 1


def _overflowing(literals: list[bytes], tokens: Sequence[bytes]) -> dict[bytes, list[int]]:
    """By the beginning of a mark, the tokens that hold its rest and more than white space after it."""
    found: dict[bytes, list[int]] = {}
    for literal in literals:
        firsts = frozenset(literal)
        for token_id, token in enumerate(tokens):
            if len(token) < 2:
                continue
            _, whole, after = token.partition(literal)
            if whole and after.strip():
                found.setdefault(b"", []).append(token_id)
            if token[0] not in firsts:
                continue
            for size in range(1, len(literal)):
                rest = literal[size:]
                if token.startswith(rest) and token[len(rest) :].strip():
                    found.setdefault(literal[:size], []).append(token_id)
    return found
