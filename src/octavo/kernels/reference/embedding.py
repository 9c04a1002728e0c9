"""The embedding of tokens and the angles of their positions in plain torch."""

from __future__ import annotations

from torch import Tensor


def embed_and_rotate(
    input_ids: Tensor,
    positions: Tensor,
    table: Tensor,
    frequencies: Tensor,
    signed_amplitude: Tensor,
    amplitude: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The tokens' rows, [T, H], and cosines and signed sines, [T, 1, head_dim] each, all of the table's dtype; the
    angles are products in float32.

    input_ids: int32 or int64 [T]; positions: int64 [T]; table: [V, H]; frequencies, signed_amplitude: float32
    [head_dim].
    """
    angles = (positions[:, None, None] * frequencies).double()
    cos, sin = angles.cos() * amplitude, angles.sin() * signed_amplitude.double()
    return table[input_ids.long()], cos.to(table.dtype), sin.to(table.dtype)
