"""Token masks: bits, packed, of the tokens that a row may sample."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def apply_masks(logits: Tensor, masks: Sequence[bytes | None]) -> None:
    """Set, in place, the tokens that a row's mask leaves out to -inf. logits: float32 [R, V].

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
    on_device = _to_device(packed, logits.device)
    bits = (on_device[:, :, None] >> torch.arange(8, dtype=torch.uint8, device=logits.device)) & 1
    barred = bits.reshape(len(masked), -1)[:, :vocab_size] == 0
    if len(masked) == logits.shape[0]:
        logits.masked_fill_(barred, -torch.inf)
    else:
        rows = _to_device(np.array([row for row, _ in masked]), logits.device)
        logits[rows] = logits[rows].masked_fill(barred, -torch.inf)


def _to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """A copy that does not wait for the device."""
    host = torch.from_numpy(array)
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host
