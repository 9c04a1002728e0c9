"""The kernel that copies between host and device, against torch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from octavo.kernels.reference import copies as reference
from octavo.kernels.triton import copies

ON_GPU = torch.cuda.is_available()


def words(size: int, on_host: bool) -> Tensor:
    """-7 everywhere, to show what is written."""
    if on_host:
        return torch.full((size,), -7, dtype=torch.int32, pin_memory=ON_GPU)
    return torch.full((size,), -7, dtype=torch.int32, device="cuda" if ON_GPU else "cpu")


@pytest.mark.parametrize("size", [1, 15, 1024, 5000])
@pytest.mark.parametrize("from_host", [False, True])
@pytest.mark.parametrize("to_host", [False, True])
@pytest.mark.parametrize("offset", [0, 1])
def test_words_are_copied_and_no_others_written(size: int, from_host: bool, to_host: bool, offset: int) -> None:
    """offset: of the target, which is then not aligned."""
    source, found = words(size, from_host), words(size + 8, to_host)
    source.copy_(torch.arange(1, size + 1) * 65_537)
    expected = found.cpu().clone()
    copies.copy_words(source, found[offset : offset + size])
    if ON_GPU:
        torch.cuda.synchronize()
    reference.copy_words(source.cpu(), expected[offset : offset + size])
    assert torch.equal(found.cpu(), expected)
