"""allowed_token_ids and bad_words: tokens that may not be drawn, ever or after certain others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from octavo.protocol.sampling import SamplingParams

Word = tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class TokenLists:
    """What a sequence may not draw.

    barred: bool [V], the tokens that it never may; None where there are none.
    words: two ids or more each; the last may not follow the others where all of them are output.
    """

    barred: NDArray[np.bool_] | None
    words: tuple[Word, ...]


def token_lists(sampling: SamplingParams, vocab_size: int) -> TokenLists | None:
    """None where every token may always be drawn. Raises ValueError for bad_words that are still text."""
    if sampling.bad_words:
        raise ValueError("bad_words cannot be sampled with; allowed: bad_words_token_ids, made by the front end")
    inside = [tuple(word) for word in sampling.bad_words_token_ids or () if max(word) < vocab_size]
    words = tuple(word for word in inside if len(word) > 1)
    never = [word[0] for word in inside if len(word) == 1]
    barred = None
    if sampling.allowed_token_ids is not None or never:
        barred = np.full(vocab_size, sampling.allowed_token_ids is not None)
        barred[[token_id for token_id in sampling.allowed_token_ids or () if token_id < vocab_size]] = False
        barred[never] = True
    return TokenLists(barred, words) if barred is not None or words else None


def bar_listed(row: Tensor, lists: TokenLists, output: Sequence[int]) -> None:
    """Set to -inf, in place, what may not follow `output`. row: float32 [V]."""
    if lists.barred is not None:
        row.masked_fill_(torch.from_numpy(lists.barred).to(row.device), -torch.inf)
    last = [word[-1] for word in lists.words if _ends_with(output, word[:-1])]
    if last:
        row[torch.tensor(last, device=row.device)] = -torch.inf


def _ends_with(output: Sequence[int], ids: Word) -> bool:
    return len(output) >= len(ids) and tuple(output[len(output) - len(ids) :]) == ids
