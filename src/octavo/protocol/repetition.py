"""RepetitionDetectionParams: when an output that repeats itself has said enough."""

from __future__ import annotations

import msgspec

from octavo.protocol.checks import integer

MAX_PATTERN_SIZE = 256
MAX_COUNT = 2**31 - 1


class RepetitionDetectionParams(
    msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True
):
    """An output ends, with finish_reason "repetition", once its last tokens are min_count copies, one right after the
    other, of a pattern of min_pattern_size..max_pattern_size tokens.

    max_pattern_size: 0..256; 0 looks for nothing. min_pattern_size: 0..max_pattern_size; 0 counts as 1.
    min_count: >= 2, unless max_pattern_size is 0.
    Raises ValueError naming the field, the value and the allowed range.
    """

    max_pattern_size: int = 0
    min_pattern_size: int = 0
    min_count: int = 0

    def __post_init__(self) -> None:
        integer("repetition_detection.max_pattern_size", self.max_pattern_size, 0, MAX_PATTERN_SIZE)
        integer("repetition_detection.min_pattern_size", self.min_pattern_size, 0, self.max_pattern_size)
        integer("repetition_detection.min_count", self.min_count, 2 if self.max_pattern_size else 0, MAX_COUNT)
