"""What a checkpoint's numbers may be, and random ones for models without a checkpoint."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Dummy = Callable[[torch.Generator], Tensor]

DUMMY_STD = 0.02  # of dummy weights, as TensorSpec has it


def check_scales(name: str, scale: Tensor, above: bool = False) -> None:
    """Raises ValueError unless all scales are finite, and not negative; above: and not 0 either."""
    wide = scale.float()
    good = wide.isfinite() & (wide > 0 if above else wide >= 0)
    if not bool(good.all()):
        bad = wide[~good].flatten()[0].item()
        raise ValueError(f"{name} holds {bad}, expected finite numbers {'above 0' if above else 'of at least 0'}")


def full(value: float, *shape: int, dtype: torch.dtype = torch.float32) -> Dummy:
    return lambda generator: torch.full(shape, value, dtype=dtype, device=generator.device)


def normal_fp8(*shape: int) -> Dummy:
    """Of standard deviation 1."""
    return lambda generator: torch.randn(shape, generator=generator, device=generator.device).to(torch.float8_e4m3fn)


def integers(low: int, high: int, dtype: torch.dtype, *shape: int) -> Dummy:
    """Uniform in [low, high)."""
    return lambda generator: torch.randint(low, high, shape, generator=generator, device=generator.device, dtype=dtype)
