"""What formats share: large matrices in pieces, what scales may be, random numbers for models without a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

Dummy = Callable[[torch.Generator], Tensor]

_CHUNK_ELEMENTS = 16 << 20  # converted at once: 64 MiB a float32 temporary
TINY = torch.finfo(torch.float32).tiny
DUMMY_STD = 0.02  # of dummy weights, as TensorSpec has it


def pieces(weight: Tensor, multiple: int = 1) -> Iterator[slice]:
    """The rows of a matrix, some at a time: so many that float32 temporaries of them stay small, a multiple of
    `multiple` but at the end."""
    num_at_once = max(1, _CHUNK_ELEMENTS // weight.shape[1] // multiple) * multiple
    for begin in range(0, len(weight), num_at_once):
        yield slice(begin, min(begin + num_at_once, len(weight)))


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
