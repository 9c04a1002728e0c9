"""Kernels as a GPU ran them: recorded by torch's profiler, and what can be read from their times."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile


class Kernel(NamedTuple):
    """One kernel, copy or fill on the GPU. Times in microseconds on the profiler's clock."""

    name: str
    start: float
    end: float


def record(work: Callable[[], None]) -> list[Kernel]:
    """The kernels that `work` ran, in order of their start; those inside CUDA graphs too.

    Raises RuntimeError if the profiler saw none: it cannot record on this machine, or there is no GPU.
    """
    if not torch.cuda.is_available():
        raise RuntimeError("there is no GPU to record")
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        work()
        torch.cuda.synchronize()
    kernels = [
        Kernel(event.name, event.time_range.start, event.time_range.end)
        for event in recorded.events() or ()
        if event.device_type == DeviceType.CUDA and not getattr(event, "is_user_annotation", False)
    ]
    if not kernels:
        raise RuntimeError("the profiler recorded no kernel")
    return sorted(kernels, key=lambda kernel: kernel.start)


def gaps(kernels: Sequence[Kernel]) -> list[float]:
    """Microseconds in which nothing ran, between one stretch of work and the next. `kernels` in order of start."""
    found, busy_until = [], kernels[0].end
    for kernel in kernels[1:]:
        if kernel.start > busy_until:
            found.append(kernel.start - busy_until)
        busy_until = max(busy_until, kernel.end)
    return found


def added(kernels: Sequence[Kernel]) -> list[float]:
    """By how many microseconds each kernel makes the work longer: from the end of all before it, or from its start, to
    its end; 0 if it ends sooner. One that is let in early waits for those ahead of it, which is no time of its own.
    `kernels` in order of start."""
    found, until = [], kernels[0].start
    for kernel in kernels:
        found.append(max(0.0, kernel.end - max(until, kernel.start)))
        until = max(until, kernel.end)
    return found


class Idle(NamedTuple):
    """How long a GPU idled, in microseconds. Gaps of 1 us and less are the launch of the next kernel of a graph."""

    total: float  # from the first kernel's start to the last one's end
    idle: float  # all gaps above 1 us
    between_steps: float  # the largest of them, one for each boundary between steps


def idle_of(kernels: Sequence[Kernel], num_steps: int) -> Idle:
    """The idle time within a recording of `num_steps` steps."""
    long = sorted((gap for gap in gaps(kernels) if gap > 1), reverse=True)
    total = max(kernel.end for kernel in kernels) - kernels[0].start
    return Idle(total, sum(long), sum(long[: max(0, num_steps - 1)]))
