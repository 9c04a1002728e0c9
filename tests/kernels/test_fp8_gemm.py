"""Products of FP8 tokens by FP8 weights against float64, and how they are cut up."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from octavo.kernels.reference import gemm as reference
from octavo.kernels.triton import fp8_gemm, skinny_gemm
from octavo.kernels.triton.fp8 import FP8_MAX_M, quantize_fp8
from octavo.kernels.triton.fp8_gemm import Fp8Plan, linear_fp8

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TOLERANCE = {torch.bfloat16: 2**-7, torch.float16: 2**-9}


def operands(m: int, n: int, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tokens and a weight whose rows differ in their scale by orders of magnitude, each with its scales."""
    generator = torch.Generator().manual_seed(m * 1000 + n + k)
    x, weight = (torch.randn(shape, generator=generator) for shape in ((m, k), (n, k)))
    scale = torch.rand(n, generator=generator).mul(3).exp().div(20)
    x, x_scale = quantize_fp8((x * torch.logspace(-2, 2, m)[:, None]).to(DEVICE, torch.bfloat16))
    return x, x_scale, weight.to(DEVICE, torch.float8_e4m3fn), scale.to(DEVICE)


def assert_close(got: Tensor, expected: Tensor, x_scale: Tensor) -> None:
    """Equal but for the last bits of the dtype, at the size of a token's results."""
    assert (got.dtype, got.shape) == (expected.dtype, expected.shape)
    error = (got.double() - expected.double()).abs()
    slack = TOLERANCE[got.dtype] * (expected.double().abs() + x_scale.double() * 20)
    assert (error <= slack).all(), f"off by up to {(error - slack).max().item()}"


@pytest.mark.parametrize(
    ("m", "n", "k", "plan"),
    [
        (1, 64, 256, Fp8Plan(64, 32, 0, 256, 1, 4, 4)),
        (20, 208, 528, Fp8Plan(128, 32, 0, 256, 1, 4, 4)),  # a row tile and a step of K that are not full
        (70, 80, 400, Fp8Plan(64, 64, 0, 128, 1, 4, 4)),  # two tiles of tokens
        (96, 144, 256, Fp8Plan(64, 64, 32, 128, 1, 4, 4)),
        (150, 128, 272, Fp8Plan(128, 128, 64, 128, 1, 8, 3)),
        (33, 64, 768, Fp8Plan(64, 64, 0, 128, 3, 4, 4)),  # K in three
        (90, 80, 640, Fp8Plan(64, 64, 32, 128, 4, 4, 4)),  # K in four, the last of which has nothing to do
    ],
)
@pytest.mark.parametrize(("bias", "dtype"), [(False, torch.bfloat16), (True, torch.bfloat16), (True, torch.float16)])
def test_linear_fp8(m: int, n: int, k: int, plan: Fp8Plan, bias: bool, dtype: torch.dtype) -> None:
    given = operands(m, n, k)
    added = torch.linspace(-2, 2, n, device=DEVICE).to(dtype) if bias else None
    expected = reference.linear_fp8(*given, added, dtype)
    got = linear_fp8(*given, added, dtype, plan=plan)
    assert_close(got, expected, given[1])
    # A second time: what parts of K leave behind is as it was.
    assert torch.equal(linear_fp8(*given, added, dtype, plan=plan), got)


def test_tokens_at_the_end_of_their_memory() -> None:
    """No memory behind them may be read; what there is elsewhere does not show in the product."""
    x, *scales = operands(20, 64, 256)
    plan = Fp8Plan(64, 32, 0, 256)
    assert x.untyped_storage().nbytes() >= FP8_MAX_M * 256
    x.as_strided((12, 256), (256, 1), 20 * 256).copy_(torch.full((12, 256), float("nan")))
    alone = x.clone()
    assert alone.untyped_storage().nbytes() == 20 * 256
    assert torch.equal(linear_fp8(alone, *scales, plan=plan), linear_fp8(x, *scales, plan=plan))


def test_scales_that_are_not_aligned() -> None:
    x, x_scale, weight, scale = operands(20, 64, 256)
    moved = torch.cat([scale[:1], scale])[1:]
    plan = Fp8Plan(64, 32, 0, 256)
    assert torch.equal(
        linear_fp8(x, x_scale, weight, moved, plan=plan), linear_fp8(x, x_scale, weight, scale, plan=plan)
    )


@pytest.mark.parametrize(("m", "n", "k"), [(20, 64, 40), (20, 72, 64)])
def test_sizes_that_are_no_multiple_of_16_are_refused(m: int, n: int, k: int) -> None:
    assert Fp8Plan.of(m, n, k, DEVICE) is None
    with pytest.raises(ValueError, match="multiples of 16"):
        linear_fp8(*operands(m, n, k), plan=Fp8Plan(64, 32))


def test_scales_of_another_number_are_refused() -> None:
    x, x_scale, weight, scale = operands(20, 64, 64)
    with pytest.raises(ValueError, match="scales of 19 tokens"):
        linear_fp8(x, x_scale[1:], weight, scale, plan=Fp8Plan(64, 32))
    with pytest.raises(ValueError, match="63 rows"):
        linear_fp8(x, x_scale, weight, scale[1:], plan=Fp8Plan(64, 32))
    with pytest.raises(ValueError, match="float8_e4m3fn"):
        linear_fp8(x.float(), x_scale, weight, scale, plan=Fp8Plan(64, 32))


@given(st.integers(1, 600), st.integers(1, 4000), st.integers(1, 2000))
def test_plans_fit_the_device(m: int, n16: int, k16: int) -> None:
    """Into its shared memory and registers, the workspace, and all programs at once, where there are few tiles."""
    n, k = n16 * 16, k16 * 16
    plan = Fp8Plan.of(m, n, k, DEVICE)
    if plan is None:
        return
    assert m <= FP8_MAX_M
    side = plan.tokens + plan.more
    token_tiles = -(-m // side)
    assert token_tiles * side <= FP8_MAX_M  # what is read of the tokens is there
    assert plan.num_stages * (plan.rows + side) * plan.block_k <= 227 << 10
    assert plan.rows * side // (plan.num_warps * 32) <= 128
    assert plan.num_stages >= 3
    if n <= 64 * skinny_gemm._NUM_SMS:
        assert -(-n // plan.rows) * token_tiles * plan.split_k <= skinny_gemm._NUM_SMS


def test_a_device_with_little_shared_memory_has_no_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Fp8Plan.of(32, 4096, 4096, DEVICE) is not None
    monkeypatch.setattr(fp8_gemm, "_suits", lambda device: False)  # noqa: ARG005
    assert Fp8Plan.of(32, 4096, 4096, DEVICE) is None
