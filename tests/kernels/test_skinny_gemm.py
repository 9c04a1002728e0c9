"""Products of few tokens: both kernels, K split or not, against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from octavo.kernels.reference import gemm as reference
from octavo.kernels.triton import skinny_gemm
from octavo.kernels.triton.activation import silu_and_mul
from octavo.kernels.triton.skinny_gemm import GemmPlan, skinny_linear, skinny_linear_fp8

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = [torch.bfloat16, torch.float16]
TOLERANCE = {torch.bfloat16: 2**-8, torch.float16: 2**-10}
PLANS = [
    GemmPlan("dot", 64, 32),
    GemmPlan("dot", 32, 32, swap=False),
    GemmPlan("dot", 64, 32, split_k=2),
    GemmPlan("dot", 32, 64, split_k=5, swap=False),  # fewer steps than splits
]


def operands(m: int, n: int, k: int, dtype: torch.dtype = DTYPES[0]) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(m * 1000 + n + k)
    made = (torch.randn(shape, generator=generator) for shape in ((m, k), (n, k), (n,)))
    x, weight, bias = (tensor.to(DEVICE, dtype) for tensor in made)
    return x, weight, bias


def quantized(weight: Tensor) -> tuple[Tensor, Tensor]:
    scale = weight.float().abs().amax(1) / 448
    return (weight.float() / scale[:, None]).to(torch.float8_e4m3fn), scale


def assert_close(got: Tensor, expected: Tensor) -> None:
    """Equal but for the last bit of the dtype, at the size of the largest results: sums differ in their order."""
    assert got.dtype == expected.dtype
    assert got.isfinite().all()
    error = (got.double() - expected.double()).abs()
    slack = TOLERANCE[got.dtype] * (expected.double().abs() + 0.1)
    assert (error <= slack).all(), f"off by up to {error.max().item()}"


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("m", [1, 3, 16])
def test_tensor_core_plans(plan: GemmPlan, m: int) -> None:
    x, weight, bias = operands(m, 80, 96)
    out = torch.full((m, 80), float("nan"), dtype=x.dtype, device=DEVICE)
    assert skinny_linear(x, weight, bias, out, plan=plan) is out
    assert_close(out, reference.skinny_linear(x, weight, bias))


@pytest.mark.parametrize("m", [1, 2])
@pytest.mark.parametrize("split_k", [1, 3])
@pytest.mark.parametrize("k", [128, 80])
def test_plans_without_tensor_cores(m: int, split_k: int, k: int) -> None:
    x, weight, bias = operands(m, 20, k)
    plan = GemmPlan("fma", 8, 32, split_k)
    assert_close(skinny_linear(x, weight, bias, plan=plan), reference.skinny_linear(x, weight, bias))


@pytest.mark.parametrize(("m", "n", "k"), [(1, 64, 128), (4, 65, 144), (16, 70, 48), (33, 64, 64)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_default_plans(m: int, n: int, k: int, dtype: torch.dtype) -> None:
    x, weight, _ = operands(m, n, k, dtype)
    assert_close(skinny_linear(x, weight), reference.skinny_linear(x, weight))


@pytest.mark.parametrize("plan", [*PLANS, GemmPlan("fma", 8, 32, 3)])
def test_gated_is_the_activation_of_the_product(plan: GemmPlan) -> None:
    x, weight, bias = operands(2, 84, 96)  # 42 gates: no whole number of tiles
    got = skinny_linear(x, weight, bias, plan=plan, gated=True)
    assert torch.equal(got, silu_and_mul(skinny_linear(x, weight, bias, plan=plan)))
    assert_close(got, reference.skinny_linear(x, weight, bias, gated=True))


def test_gated_fp8() -> None:
    x, weight, bias = operands(5, 132, 96)
    packed, scale = quantized(weight)
    got = skinny_linear_fp8(x, packed, scale, bias, gated=True)
    assert torch.equal(got, silu_and_mul(skinny_linear_fp8(x, packed, scale, bias)))
    assert_close(got, reference.skinny_linear_fp8(x, packed, scale, bias, gated=True))


def test_rows_may_lie_apart() -> None:
    x, weight, _ = operands(6, 64, 64)
    assert_close(skinny_linear(x[::2], weight), reference.skinny_linear(x[::2], weight))


def test_counters_are_left_at_zero() -> None:
    x, weight, bias = operands(2, 64, 128)
    plan = GemmPlan("dot", 64, 32, split_k=4)
    first = skinny_linear(x, weight, bias, plan=plan)
    assert torch.equal(skinny_linear(x, weight, bias, plan=plan), first)
    assert not any(counters.any() for _, counters in skinny_gemm._workspaces.values())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("plan", [None, *PLANS[:3], GemmPlan("fma", 8, 64)])
def test_fp8_weights(plan: GemmPlan | None, dtype: torch.dtype) -> None:
    x, weight, bias = operands(2, 72, 96, dtype)
    packed, scale = quantized(weight)
    got = skinny_linear_fp8(x, packed, scale[:, None], bias, plan=plan)
    assert_close(got, reference.skinny_linear_fp8(x, packed, scale, bias))


def test_every_fp8_value_is_converted_exactly() -> None:
    weight = torch.arange(256, dtype=torch.uint8, device=DEVICE).view(torch.float8_e4m3fn).view(16, 16)
    weight = torch.where(weight.float().isnan(), torch.zeros_like(weight, dtype=torch.float32), weight.float())
    packed = weight.to(torch.float8_e4m3fn)
    x = torch.eye(16, dtype=DTYPES[0], device=DEVICE)
    ones = torch.ones(16, device=DEVICE)
    assert torch.equal(skinny_linear_fp8(x, packed, ones).float(), weight.T)


def test_what_does_not_fit_is_refused() -> None:
    x, weight, _ = operands(2, 32, 32)
    with pytest.raises(ValueError, match="they must be the same"):
        skinny_linear(x.float(), weight)
    with pytest.raises(ValueError, match=r"expected torch.bfloat16 or torch.float16"):
        skinny_linear(x.float(), weight.float())
    with pytest.raises(ValueError, match="do not fit"):
        skinny_linear(x[:, :16], weight)
    with pytest.raises(ValueError, match=r"M must be 1..64"):
        skinny_linear(x.new_empty(65, 32), weight)
    with pytest.raises(ValueError, match="contiguous"):
        skinny_linear(x, weight, out=x.new_empty(2, 64)[:, ::2])
    with pytest.raises(ValueError, match="even number"):
        skinny_linear(x, weight[:31], gated=True)
    with pytest.raises(ValueError, match=r"contiguous \[2, 16\]"):
        skinny_linear(x, weight, out=x.new_empty(2, 32), gated=True)
    with pytest.raises(ValueError, match=r"expected torch.float8_e4m3fn"):
        skinny_linear_fp8(x, weight, torch.ones(32))
    with pytest.raises(ValueError, match="one or two tokens"):
        skinny_linear(operands(3, 32, 32)[0], weight, plan=GemmPlan("fma", 8, 32))
