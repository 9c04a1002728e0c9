"""Copies of a step's few words between the device and pinned host memory, which kernels address as their own.

By a kernel, since the device idles for microseconds at each change between kernels and its copy engines.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from octavo.kernels.triton.launch import _after_previous, _cdiv, _launch

_WORDS = 1024  # that a program copies


@triton.jit(do_not_specialize=["num_words"])
def _copy_words_kernel(source_ptr, target_ptr, num_words, BLOCK: tl.constexpr, OVERLAP: tl.constexpr):
    """Four words at a time; what is left of the last four, one by one."""
    _after_previous(OVERLAP)
    word = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    in_four = word // 4 < num_words // 4
    single = (word < num_words) & ~in_four
    fours = tl.load(source_ptr + word, mask=in_four)
    singles = tl.load(source_ptr + word, mask=single)
    tl.store(target_ptr + word, fours, mask=in_four)
    tl.store(target_ptr + word, singles, mask=single)


def copy_words(source: Tensor, target: Tensor) -> None:
    """Copy source to target: int32, contiguous, of one size, which compiles nothing anew.

    Either may be pinned host memory. It must then not be freed, or written by the host, before the device has come to
    the end of the copy: torch does not know that a kernel uses it.
    """
    num_words = source.numel()
    _launch(_copy_words_kernel, _cdiv(num_words, _WORDS), (source, target), (num_words,), (_WORDS,), 4)
