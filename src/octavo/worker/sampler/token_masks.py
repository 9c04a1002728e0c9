"""Token masks: bits, packed, of the tokens that a row may sample."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

# Its square is infinity in float32. On a CPU a sum is 8 times as fast as masked_fill, which branches at each element.
_HUGE = 1e30


def apply_masks(logits: Tensor, masks: Sequence[bytes | None]) -> None:
    """Set, in place, the tokens that a row's mask leaves out to -inf (those that are +inf to NaN). logits: float32
    [R, V].

    masks: one a row, None for a row that may sample all; bit i % 8 of byte i // 8 is token i. Tokens beyond its end
    are left out.
    """
    masked = [(row, mask) for row, mask in enumerate(masks) if mask is not None]
    if not masked:
        return
    vocab_size = logits.shape[-1]
    packed = np.zeros((len(masked), -(-vocab_size // 8)), dtype=np.uint8)
    for at, (_, mask) in enumerate(masked):
        given = np.frombuffer(mask, dtype=np.uint8)[: packed.shape[1]]
        packed[at, : given.size] = given
    bias = _bits(packed, vocab_size, logits.device).to(torch.float32).sub_(1).mul_(_HUGE).mul_(_HUGE)  # 0 or -inf
    if len(masked) == logits.shape[0]:
        logits += bias
    else:
        rows = _to_device(np.array([row for row, _ in masked]), logits.device)
        logits[rows] += bias


def _bits(packed: np.ndarray, vocab_size: int, device: torch.device) -> Tensor:
    """uint8 [R, V], 1 for what may be sampled."""
    if device.type == "cpu":
        return torch.from_numpy(np.unpackbits(packed, axis=1, count=vocab_size, bitorder="little"))
    bits = (_to_device(packed, device)[:, :, None] >> torch.arange(8, dtype=torch.uint8, device=device)) & 1
    return bits.reshape(len(packed), -1)[:, :vocab_size]


def _to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """A copy that does not wait for the device."""
    host = torch.from_numpy(array)
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host
