"""ReasoningMarks: where the reasoning of an output begins and ends."""

from __future__ import annotations

import msgspec


class ReasoningMarks(msgspec.Struct, frozen=True, array_like=True):
    """Texts between which a model reasons, ahead of its answer.

    openings: any of these at the beginning of the output opens the reasoning. is_open: the prompt has, or the model
    needs no mark for it.
    closings: any of these ends it; the first is the one to force. header_end: what ends a closing that goes on with
    text of its own; empty for one that does not.
    may_end: the output may end in its reasoning, also where it is to follow a grammar.
    """

    openings: tuple[str, ...]
    closings: tuple[str, ...]
    is_open: bool
    header_end: str = ""
    may_end: bool = False
