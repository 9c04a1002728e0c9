"""logits_processors: the caller's own functions, in the process of the engine only."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

_log = logging.getLogger(__name__)

LogitsProcessor = Callable[..., Tensor]


def takes_prompt(processor: LogitsProcessor) -> bool:
    """Whether it is called with (prompt ids, output ids, logits) instead of (output ids, logits)."""
    try:
        parameters = inspect.signature(processor).parameters.values()
    except (TypeError, ValueError):  # a builtin without a signature
        return False
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(p.kind in positional and p.default is inspect.Parameter.empty for p in parameters) > 2


def apply_processors(row: Tensor, processors: Sequence[Any], prompt: list[int], output: list[int]) -> None:
    """Call each with what the last one returned, and write the result to `row`, float32 [V].

    One that raises, or returns no such tensor, turns the row to NaN, which ends its request alone; the log says why.
    """
    logits = row.clone()
    try:
        for processor in processors:
            ids = (list(prompt), list(output)) if takes_prompt(processor) else (list(output),)
            logits = processor(*ids, logits)
            if not isinstance(logits, Tensor) or logits.shape != row.shape:
                found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
                raise ValueError(f"it returned {found}; allowed: a tensor of shape {tuple(row.shape)}")
        row.copy_(logits)
    except Exception:
        _log.exception("logits_processors: one of them failed, and its request ends")
        row.fill_(torch.nan)
