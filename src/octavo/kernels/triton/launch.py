"""Launches that cost the host little: Triton's own lookup of the compiled kernel takes longer than many kernels run."""

from __future__ import annotations

from typing import Any

from torch import Tensor

# (kernel, device, dtypes, constants, warps) -> the compiled kernel. Written by `_launch` only.
_compiled: dict[tuple[Any, ...], Any] = {}


def _launch(
    kernel: Any,
    programs: int,
    tensors: tuple[Tensor, ...],
    numbers: tuple[float, ...],
    constants: tuple[Any, ...],
    num_warps: int,
) -> None:
    """kernel[(programs,)](*tensors, *numbers, *constants, num_warps=num_warps), by way of what was compiled before.

    The kernel's parameters come in this order. numbers: floats alone, since Triton compiles anew for some integers;
    constants: all constexpr. Tensors that do not start at a multiple of 16 bytes, which Triton compiles for as well,
    take its own way, and so does the interpreter.
    """
    addresses = 0
    for tensor in tensors:
        addresses |= tensor.data_ptr()
    if addresses % 16:
        kernel[(programs,)](*tensors, *numbers, *constants, num_warps=num_warps)
        return
    dtypes = tuple([tensor.dtype for tensor in tensors])
    key = id(kernel), tensors[0].get_device(), dtypes, constants, num_warps  # kernels live as long as their module
    compiled = _compiled.get(key)
    if compiled is not None:
        if programs:
            compiled[(programs, 1, 1)](*tensors, *numbers, *constants)
        return
    compiled = kernel[(programs,)](*tensors, *numbers, *constants, num_warps=num_warps)
    if compiled is not None:
        _compiled[key] = compiled
