"""The embedding of tokens with the angles of their positions, on the GPU or in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from octavo.kernels import triton
from octavo.kernels.reference import embedding as reference
from octavo.kernels.triton import embedding
from octavo.layers.embedding import Embedding
from octavo.layers.rotary import RopeParameters, RotaryEmbedding

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
POSITIONS = [0, 1, 77, 130_000, 5]


def rotary_of(head_dim: int, dtype: torch.dtype) -> RotaryEmbedding:
    return RotaryEmbedding(RopeParameters(theta=500_000.0), head_dim, 512, dtype, DEVICE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("id_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(("size", "head_dim"), [(64, 64), (577, 96), (1024, 128), (2056, 80)])
def test_embed_and_rotate(dtype: torch.dtype, id_dtype: torch.dtype, size: int, head_dim: int) -> None:
    """More tokens than one, so that each part of a row must find its own; ids repeat, the last of the table is one."""
    torch.manual_seed(0)
    table, rotary = torch.randn(11, size, device=DEVICE).to(dtype), rotary_of(head_dim, dtype)
    input_ids = torch.tensor([3, 10, 0, 3, 7], dtype=id_dtype, device=DEVICE)
    positions = torch.tensor(POSITIONS, device=DEVICE)
    arguments = input_ids, positions, table, rotary.frequencies, rotary.signed_amplitude, 0.75
    embedded, *angles = embedding.embed_and_rotate(*arguments)
    expected, *expected_angles = reference.embed_and_rotate(*arguments)
    assert embedded.dtype == dtype
    assert torch.equal(embedded, expected)
    for found, wanted in zip(angles, expected_angles, strict=True):
        assert (found.dtype, found.shape) == (dtype, (len(POSITIONS), 1, head_dim))
        torch.testing.assert_close(found, wanted, rtol=2**-8, atol=1e-5)


def test_a_row_may_lie_beyond_2_31_elements() -> None:
    """Memory of the table that is not touched costs nothing on a CPU."""
    if DEVICE.type == "cuda":
        pytest.skip("the table is virtual memory")
    rows, rotary = (1 << 31) // 1024 + 2, rotary_of(64, torch.bfloat16)
    table = torch.empty(rows, 1024, dtype=torch.bfloat16)
    table[-1] = torch.arange(1024)
    factors = rotary.frequencies, rotary.signed_amplitude, 1.0
    embedded, _, _ = embedding.embed_and_rotate(torch.tensor([rows - 1]), torch.tensor([0]), table, *factors)
    assert torch.equal(embedded[0], table[-1])


def test_the_layer_gives_with_the_kernel_what_it_gives_without(monkeypatch: pytest.MonkeyPatch) -> None:
    """Adapters add to either."""

    class Doubling:
        def add(self, y: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
            return y + y * (input_ids == 3)[:, None]

    triton.load()
    layer, rotary = Embedding(11, 48, torch.float32, DEVICE), rotary_of(16, torch.float32)
    layer.weight.copy_(torch.randn(11, 48))
    positions = torch.tensor(POSITIONS, device=DEVICE)
    input_ids = torch.tensor([3, 10, 0, 3, 7], device=DEVICE)
    for adapters in (None, Doubling()):
        monkeypatch.setattr(layer, "adapters", adapters)
        made = []
        for kernels in (None, triton.get()):
            monkeypatch.setattr(layer, "_fused", kernels)
            embedded, angles = layer(input_ids, positions, rotary)
            made.append((embedded, *angles))
        for plain, fused in zip(*made, strict=True):
            torch.testing.assert_close(fused, plain, rtol=1e-5, atol=1e-5)
        assert torch.equal(made[1][0][0], layer.weight[3] * (1 if adapters is None else 2))
