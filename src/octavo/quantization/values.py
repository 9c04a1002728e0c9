"""What a checkpoint's numbers may be, and random ones for models without a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Dummy = Callable[[torch.Generator], Tensor]

TINY = torch.finfo(torch.float32).tiny
DUMMY_STD = 0.02  # of dummy weights, as TensorSpec has it


def check_scales(name: str, scale: Tensor, least: float = 0.0) -> None:
    """Raises ValueError unless all scales are finite, and at least so much."""
    wide = scale.float()
    good = wide.isfinite() & (wide >= least)
    if not bool(good.all()):
        raise ValueError(f"{name} holds {wide[~good].flatten()[0].item()}, expected finite numbers >= {least:g}")


def full(value: float, *shape: int, dtype: torch.dtype = torch.float32) -> Dummy:
    return lambda generator: torch.full(shape, value, dtype=dtype, device=generator.device)


def known(values: Sequence[float], dtype: torch.dtype = torch.float32) -> Dummy:
    return lambda generator: torch.tensor(values, dtype=dtype, device=generator.device)


def normal_fp8(*shape: int) -> Dummy:
    """Of standard deviation 1."""
    return lambda generator: torch.randn(shape, generator=generator, device=generator.device).to(torch.float8_e4m3fn)


def integers(low: int, high: int, dtype: torch.dtype, *shape: int) -> Dummy:
    """Uniform in [low, high)."""
    return lambda generator: torch.randint(low, high, shape, generator=generator, device=generator.device, dtype=dtype)
