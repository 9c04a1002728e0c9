"""Temperature, and the draw where no top_k or top_p truncates it."""

from __future__ import annotations

from torch import Tensor

from octavo.worker.sampler.inverse_cdf import invert_cdf
from octavo.worker.sampler.min_p import drop_unlikely
from octavo.worker.sampler.rows import Rows


def probabilities(rows: Rows) -> Tensor:
    """softmax(logits / temperature), without the tokens that min_p drops, not normalized again; float32 [R, V]."""
    # The maximum goes first: no temperature can then overflow.
    weights = (rows.logits.float() - rows.row_max).div_(rows.temperature).softmax(-1)
    return drop_unlikely(weights, rows.min_p) if rows.uses_min_p else weights


def draw(rows: Rows) -> Tensor:
    """Draw from the whole vocabulary, in the order of ids; int64 [R, 1]."""
    return invert_cdf(probabilities(rows), rows.uniforms)
