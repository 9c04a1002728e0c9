"""How kernels are launched: at little cost to the host, and on the device before the kernel ahead has ended."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_FEW_PROGRAMS = tl.constexpr(16)
_FEW_BEFORE_FP8 = tl.constexpr(64)  # before `linear_fp8`, which has one program for a multiprocessor
# (kernel, device, dtypes, constants, warps) -> the compiled kernel. Written by `_launch` only.
_compiled: dict[tuple[Any, ...], Any] = {}


def _cdiv(number: int, by: int) -> int:
    """number / by, rounded up. Triton's own, made for kernels too, takes the host 2 us."""
    return -(-number // by)


def _power_of_two(number: int) -> int:
    """The least power of two that is no less."""
    return 1 << (number - 1).bit_length()


@cache
def _can_overlap(device: int) -> bool:
    return torch.cuda.get_device_capability(device) >= (9, 0)


def _overlap(tensor: Tensor) -> dict[str, bool]:
    """What a kernel that has a constant OVERLAP is launched with, by the device of its tensors: whether it may start
    while the one before it on the stream still runs (programmatic dependent launch, compute capability 9.0 on)."""
    if tensor.is_cuda and _can_overlap(tensor.get_device()):
        return {"OVERLAP": True, "launch_pdl": True}
    return {"OVERLAP": False}


@triton.jit
def _wait_for_previous(OVERLAP: tl.constexpr):
    """Until all kernels before this one on the stream have ended, and what they wrote can be read."""
    if OVERLAP:
        tl.extra.cuda.gdc_wait()


@triton.jit
def _after_previous(OVERLAP: tl.constexpr, FILLS: tl.constexpr = False, FEW: tl.constexpr = _FEW_PROGRAMS, beside=0):
    """Wait for all kernels before this one on the stream, then let the next one start.

    Every program of a kernel with OVERLAP calls this, and before it reads at most weights and what the step's first
    kernels wrote, and writes nothing: all but the kernel just ahead have ended by then. The next one is let in after
    the wait, never before: a third kernel would else run beside the first without knowing. FILLS: a kernel that keeps
    the device full, so that the next one's programs come in as its own leave, and is followed by a small one. Of the
    others only the smallest, of up to FEW programs, let the next one in: programs that wait beside many would be dealt
    out unevenly. beside: 1 where the kernel just ahead has OVERLAP and neither writes what this one reads nor touches
    what it writes: then nothing is waited for here, but every program calls `_wait_for_previous` as its last act, so
    that a kernel after this one waits for both.
    """
    if OVERLAP and beside == 0:
        tl.extra.cuda.gdc_wait()
        if FILLS or tl.num_programs(0) * tl.num_programs(1) <= FEW:
            tl.extra.cuda.gdc_launch_dependents()


def _launch(
    kernel: Any,
    programs: int,
    tensors: tuple[Tensor, ...],
    numbers: tuple[float, ...],
    constants: tuple[Any, ...],
    num_warps: int,
) -> None:
    """kernel[(programs,)](*tensors, *numbers, *constants, OVERLAP, num_warps=num_warps), by way of what was compiled
    before.

    The kernel's parameters come in this order. The first tensor's device says whether there is an overlap. numbers:
    floats, or integers that the kernel names in do_not_specialize, since Triton compiles anew for some of the others;
    constants: all constexpr. Tensors that do not start at a multiple of 16 bytes, which Triton compiles for as well,
    take its own way, and so does the interpreter.
    """
    addresses = 0
    for tensor in tensors:
        addresses |= tensor.data_ptr()
    if addresses % 16:
        kernel[(programs,)](*tensors, *numbers, *constants, num_warps=num_warps, **_overlap(tensors[0]))
        return
    dtypes = tuple([tensor.dtype for tensor in tensors])
    key = id(kernel), tensors[0].get_device(), dtypes, constants, num_warps  # kernels live as long as their module
    _launch_compiled(key, kernel, (programs, 1, 1), (*tensors, *numbers, *constants), tensors[0], num_warps=num_warps)


def _launch_compiled(
    key: tuple[Any, ...],
    kernel: Any,
    grid: tuple[int, int, int],
    arguments: tuple[Any, ...],
    tensor: Tensor,
    **options: int,
) -> None:
    """kernel[grid](*arguments, OVERLAP, **options), by way of what was compiled for the key, which names the kernel,
    the device of `tensor` and all that Triton compiles for."""
    found = _compiled.get(key)
    if found is not None:
        if grid[0]:
            compiled, overlaps = found
            compiled[grid](*arguments, overlaps)
        return
    overlap = _overlap(tensor)
    compiled = kernel[grid](*arguments, **options, **overlap)
    if compiled is not None:
        _compiled[key] = compiled, overlap["OVERLAP"]
