"""Products by FP8 weights with a scale a block, and the tokens' own groups, against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from octavo.kernels.reference import block_fp8 as reference
from octavo.kernels.triton import block_fp8, skinny_gemm
from octavo.kernels.triton.block_fp8 import block_fp8_linear, quantize_fp8_groups, skinny_linear_block_fp8

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = [torch.bfloat16, torch.float16]
TOLERANCE = {torch.bfloat16: 2**-7, torch.float16: 2**-10}


def operands(m: int, n: int, k: int, dtype: torch.dtype = DTYPES[0]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, and a weight whose blocks differ in their scale by orders of magnitude; its scales, a bias."""
    generator = torch.Generator().manual_seed(m * 1000 + n + k)
    x, weight, bias = (torch.randn(shape, generator=generator) for shape in ((m, k), (n, k), (n,)))
    scale = torch.rand(-(-n // 128), -(-k // 128), generator=generator).mul(3).exp().div(20)
    return x.to(DEVICE, dtype), weight.to(DEVICE, torch.float8_e4m3fn), scale.to(DEVICE), bias.to(DEVICE, dtype)


def assert_close(got: Tensor, expected: Tensor) -> None:
    """Equal but for the last bit of the dtype, at the size of the largest results: sums differ in their order."""
    assert got.dtype == expected.dtype
    error = (got.double() - expected.double()).abs()
    slack = TOLERANCE[got.dtype] * (expected.double().abs() + 0.1)
    assert (error <= slack).all(), f"off by up to {error.max().item()}"


@pytest.mark.parametrize("size", [128, 40, 1300])
@pytest.mark.parametrize("dtype", DTYPES)
def test_quantize_fp8_groups(size: int, dtype: torch.dtype) -> None:
    x = torch.randn(3, size, generator=torch.Generator().manual_seed(size)).to(DEVICE, dtype)
    x[0, :128] = 0
    x[1] *= torch.logspace(-3, 3, size, device=DEVICE).to(dtype)
    (values, scale), (expected, expected_scale) = quantize_fp8_groups(x), reference.quantize_fp8_groups(x)
    assert (values.dtype, values.shape, scale.shape) == (torch.float8_e4m3fn, x.shape, (3, -(-size // 128)))
    torch.testing.assert_close(scale, expected_scale, rtol=1e-6, atol=0)
    # A value at the middle of two may go either way.
    assert (values.float() != expected.float()).float().mean() < 0.01
    wide = scale.repeat_interleave(128, 1)[:, :size]
    torch.testing.assert_close(values.float() * wide, x.float(), rtol=2**-4 * 1.01, atol=float(wide.max()) * 2**-10)


@pytest.mark.parametrize(
    ("m", "n", "k", "bias", "dtype"),
    [
        (1, 128, 128, True, DTYPES[0]),
        (20, 200, 256, False, DTYPES[1]),
        (70, 64, 320, True, DTYPES[1]),
        (130, 136, 144, False, DTYPES[0]),
    ],
)
def test_block_fp8_linear(m: int, n: int, k: int, bias: bool, dtype: torch.dtype) -> None:
    x, weight, scale, added = operands(m, n, k)
    given = (*quantize_fp8_groups(x), weight, scale, added if bias else None, dtype)
    assert_close(block_fp8_linear(*given), reference.block_fp8_linear(*given))


def test_tiles_of_tokens_in_bands(monkeypatch: pytest.MonkeyPatch) -> None:
    """More of them than go down the same columns together, and not a multiple."""
    monkeypatch.setattr(block_fp8, "_ROWS", 2)
    x, weight, scale, _ = operands(2 * 128 + 1, 136, 128)
    quantized = quantize_fp8_groups(x)
    assert_close(block_fp8_linear(*quantized, weight, scale), reference.block_fp8_linear(*quantized, weight, scale))


@pytest.mark.parametrize(
    ("m", "n", "k", "split_k"), [(1, 128, 128, 1), (5, 200, 320, None), (16, 64, 640, 3), (33, 65, 144, 2)]
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_skinny_linear_block_fp8(m: int, n: int, k: int, split_k: int | None, dtype: torch.dtype) -> None:
    x, weight, scale, bias = operands(m, n, k, dtype)
    got = skinny_linear_block_fp8(x, weight, scale, bias, split_k=split_k)
    assert_close(got, reference.skinny_linear_block_fp8(x, weight, scale, bias))
    again = skinny_linear_block_fp8(x, weight, scale, bias, split_k=split_k)
    assert torch.equal(got, again)
    assert not any(counters.any() for _, counters in skinny_gemm._workspaces.values())


def test_rows_may_lie_apart() -> None:
    x, weight, scale, _ = operands(6, 128, 128)
    assert_close(
        skinny_linear_block_fp8(x[::2], weight, scale), reference.skinny_linear_block_fp8(x[::2], weight, scale)
    )


def test_what_does_not_fit_is_refused() -> None:
    x, weight, scale, _ = operands(2, 128, 256)
    with pytest.raises(ValueError, match=r"expected a contiguous float8_e4m3fn \[N, 256\]"):
        skinny_linear_block_fp8(x, weight.float(), scale)
    with pytest.raises(ValueError, match=r"expected float32 \[1, 2\]"):
        skinny_linear_block_fp8(x, weight, scale.double())
    with pytest.raises(ValueError, match=r"bfloat16 or float16 and 1..64 tokens"):
        skinny_linear_block_fp8(x.float(), weight, scale)
    with pytest.raises(ValueError, match=r"1..64 tokens"):
        skinny_linear_block_fp8(x.new_empty(65, 256), weight, scale)
    with pytest.raises(ValueError, match="expected FP8 and its scales"):
        block_fp8_linear(x, scale, weight, scale)
