"""Norm, activation, quantisation and RoPE kernels against plain torch, on the GPU or in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from octavo.kernels.reference import activation as activation_reference
from octavo.kernels.reference import fp8 as fp8_reference
from octavo.kernels.reference import norm as norm_reference
from octavo.kernels.reference import rope as rope_reference
from octavo.kernels.triton import activation, fp8, launch, norm, rope
from octavo.layers.norm import QueryKeyNorm
from octavo.layers.rotary import RopeParameters, RotaryEmbedding, rotate

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
EPS = 1e-5
DTYPES = [torch.bfloat16, torch.float32]
FP8 = torch.float8_e4m3fn


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def randn(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape, device=DEVICE).to(dtype)


def assert_close(found: Tensor, expected: Tensor, ulps: float = 1.0) -> None:
    """Equal but for `ulps` roundings of the dtype; float32 sums may differ by a few more."""
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    relative = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 1e-6, FP8: 2**-3}[found.dtype] * ulps
    torch.testing.assert_close(found.float(), expected.float(), rtol=relative, atol=relative * 1e-2)


def assert_quantized(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    """The scales agree, and so do the values, but for a few that lie between two of float8."""
    # The largest value was rounded to bfloat16 before: it may be its neighbour. Ties may fall either way.
    torch.testing.assert_close(found[1], expected[1], rtol=2**-8, atol=0)
    assert_close(found[0], expected[0])
    assert (found[0].float() == expected[0].float()).float().mean() > 0.9


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [64, 576, 1030])
@pytest.mark.parametrize("with_delta", [False, True])
def test_rms_norm(dtype: torch.dtype, size: int, with_delta: bool) -> None:
    residual, weight = randn(3, size, dtype=dtype), randn(size, dtype=dtype)
    delta = randn(3, size, dtype=dtype) if with_delta else None
    total, expected = norm_reference.rms_norm(residual.clone(), delta, weight, EPS)
    found = norm.rms_norm(residual, delta, weight, EPS)
    assert_close(found, expected, ulps=2)
    torch.testing.assert_close(residual, total, rtol=0, atol=0)


@pytest.mark.parametrize("with_delta", [False, True])
def test_rms_norm_fp8(with_delta: bool) -> None:
    residual, weight = randn(3, 576), randn(576)
    delta = randn(3, 576) if with_delta else None
    total, *expected = norm_reference.rms_norm_fp8(residual.clone(), delta, weight, EPS)
    assert_quantized(norm.rms_norm_fp8(residual, delta, weight, EPS), (expected[0], expected[1]))
    torch.testing.assert_close(residual, total, rtol=0, atol=0)


def test_rms_norm_keeps_nan_to_its_row() -> None:
    residual = randn(3, 64)
    residual[1, 7] = float("nan")
    found = norm.rms_norm(residual, None, randn(64), EPS)
    assert found.isnan().all(-1).tolist() == [False, True, False]
    assert not found[[0, 2]].isnan().any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [48, 1536])
def test_silu_and_mul(dtype: torch.dtype, size: int) -> None:
    gate_up = randn(3, 2 * size, dtype=dtype) * 4
    # The exponential of a large gate loses units of float32.
    ulps = 1 if dtype == torch.bfloat16 else 10
    assert_close(activation.silu_and_mul(gate_up), activation_reference.silu_and_mul(gate_up), ulps=ulps)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # of numpy, in the interpreter
def test_silu_of_large_gates_is_finite() -> None:
    gate_up = torch.tensor([[-3e4, -100.0, 100.0, 3e4, 2.0, 2.0, 2.0, 2.0]], device=DEVICE)
    torch.testing.assert_close(activation.silu_and_mul(gate_up).cpu(), torch.tensor([[0.0, 0.0, 200.0, 6e4]]))


@pytest.mark.parametrize("size", [48, 1536])
def test_silu_and_mul_fp8(size: int) -> None:
    gate_up = randn(3, 2 * size)
    assert_quantized(activation.silu_and_mul_fp8(gate_up), activation_reference.silu_and_mul_fp8(gate_up))


@pytest.mark.parametrize("dtype", DTYPES)
def test_quantize_fp8(dtype: torch.dtype) -> None:
    x = randn(4, 1000, dtype=dtype) * 100
    x[2] = 0
    found = fp8.quantize_fp8(x)
    assert_quantized(found, fp8_reference.quantize_fp8(x))
    assert found[0].float().abs().amax(-1).tolist() == [448, 448, 0, 448]
    torch.testing.assert_close(found[0].float() * found[1], x.float(), rtol=2**-4, atol=1)


def test_to_fp8_saturates() -> None:
    values = torch.tensor([1e5, -1e5, 448, 1.0])
    assert fp8_reference.to_fp8(values).tolist() == [448, -448, 448, 1]


# num_heads, num_kv_heads, head_dim: of Llama cut down, of SmolLM2 (groups of 3), and dims without a power of two.
SHAPES = [(4, 2, 64), (9, 3, 64), (2, 1, 96), (2, 2, 80), (8, 2, 128)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("with_norm", [False, True])
@pytest.mark.parametrize("heads", [4, 16])
@pytest.mark.parametrize("cache_dtype", [torch.bfloat16, FP8])
def test_qk_norm_rope_write_kv(
    shape: tuple[int, int, int],
    with_norm: bool,
    heads: int,
    cache_dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    num_heads, num_kv_heads, head_dim = shape
    monkeypatch.setattr(rope, "_heads_per_program", lambda _num_tokens: heads)
    qkv = randn(3, (num_heads + 2 * num_kv_heads) * head_dim)
    weight = randn(num_heads + num_kv_heads, head_dim) if with_norm else None
    angles = torch.randn(3, head_dim // 2, device=DEVICE).repeat(1, 2)
    sign = torch.where(torch.arange(head_dim, device=DEVICE) < head_dim // 2, -1, 1)
    cos, sin = angles.cos().bfloat16(), (angles.sin() * sign).bfloat16()
    slots = torch.tensor([17, 0, 63], device=DEVICE)
    cache = randn(4, 2, num_kv_heads, 16, head_dim).to(cache_dtype)
    expected_cache, before = cache.clone(), qkv.clone()
    expected = rope_reference.qk_norm_rope_write_kv(
        before, (cos, sin), None if weight is None else (weight, EPS), slots, expected_cache, num_heads, (0.5, 3.0)
    )
    query = rope.qk_norm_rope_write_kv(qkv, cos, sin, weight, EPS, slots, cache, num_heads, num_kv_heads, (0.5, 3.0))
    # Roundings inside may turn by one unit: measured against the size of the rotated pair, not of the element.
    torch.testing.assert_close(query.float(), expected.float(), rtol=2**-7, atol=2**-6)
    error = (cache.float() - expected_cache.float()).abs()
    assert (error <= expected_cache.float().abs() * (2**-3 if cache_dtype == FP8 else 2**-7) + 2**-6).all()
    assert (error > 0).float().mean() < 0.01
    assert query.data_ptr() == qkv.data_ptr()
    torch.testing.assert_close(qkv[:, num_heads * head_dim :], before[:, num_heads * head_dim :], rtol=0, atol=0)


@pytest.mark.parametrize("with_norm", [False, True])
def test_the_rotation_is_the_layers(with_norm: bool) -> None:
    num_heads, num_kv_heads, head_dim, cpu = 4, 2, 64, torch.device("cpu")
    embedding = RotaryEmbedding(RopeParameters(theta=10_000.0), head_dim, 512, torch.float32, cpu)
    layer = QueryKeyNorm(num_heads, num_kv_heads, head_dim, EPS, torch.float32, cpu)
    layer.weight.copy_(torch.randn(num_heads + num_kv_heads, head_dim))
    qkv = torch.randn(2, (num_heads + 2 * num_kv_heads) * head_dim)
    cos, sin = embedding(torch.tensor([3, 411]))
    heads = qkv.view(2, -1, head_dim)
    queries_keys = heads[:, : num_heads + num_kv_heads]
    rotated = rotate(layer(queries_keys) if with_norm else queries_keys, cos, sin)
    weight = layer.weight.to(DEVICE) if with_norm else None
    cache = torch.zeros(1, 2, num_kv_heads, 16, head_dim, device=DEVICE)
    slots = torch.tensor([5, 11], device=DEVICE)
    on_device = qkv.to(DEVICE), cos.to(DEVICE), sin.to(DEVICE)
    query = rope.qk_norm_rope_write_kv(*on_device, weight, EPS, slots, cache, num_heads, num_kv_heads)
    torch.testing.assert_close(query.cpu(), rotated[:, :num_heads], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        cache[0, 0, :, slots].cpu().transpose(0, 1), rotated[:, num_heads:], rtol=1e-5, atol=1e-5
    )
    torch.testing.assert_close(cache[0, 1, :, slots].cpu().transpose(0, 1), heads[:, num_heads + num_kv_heads :])


def test_a_pool_may_have_more_than_2_31_elements() -> None:
    """The offset of a late block passes 32 bits; memory of the pool that is not touched costs nothing on a CPU."""
    if DEVICE.type == "cuda":
        pytest.skip("the pool is virtual memory")
    num_blocks = (1 << 31) // (2 * 2 * 16 * 64) + 2
    cache = torch.empty(num_blocks, 2, 2, 16, 64, dtype=FP8)
    qkv, ones = randn(1, 6 * 64), torch.ones(1, 64, dtype=torch.bfloat16)
    slots = torch.tensor([(num_blocks - 1) * 16 + 3])
    rope.qk_norm_rope_write_kv(qkv, ones, ones * 0, None, EPS, slots, cache, 2, 2)
    assert_close(cache[-1, 0, :, 3], fp8_reference.to_fp8(qkv.view(6, 64)[2:4]))
    assert_close(cache[-1, 1, :, 3], fp8_reference.to_fp8(qkv.view(6, 64)[4:]))


class FakeKernel:
    """Compiles on its first launch, as a kernel of Triton does, and notes the launches that follow."""

    def __init__(self) -> None:
        self.looked_up: list[Any] = []
        self.launched: list[Any] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        def run(*arguments: Any, num_warps: int | None = None, OVERLAP: bool | None = None) -> FakeKernel:
            assert (num_warps is None) == (OVERLAP is None)
            (self.launched if num_warps is None else self.looked_up).append((grid, arguments[1:3]))
            return self

        return run


def test_a_launch_looks_up_the_kernel_once_for_each_kind_of_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_compiled", {})
    kernel, x = FakeKernel(), torch.zeros(32, device=DEVICE)
    for programs in (3, 4, 0):
        launch._launch(kernel, programs, (x,), (), (1, 2), 4)
    assert (kernel.looked_up, kernel.launched) == ([((3, 1, 1), (1, 2))], [((4, 1, 1), (1, 2))])
    launch._launch(kernel, 1, (x,), (), (1, 3), 4)  # other constants
    launch._launch(kernel, 1, (x.bfloat16(),), (), (1, 2), 4)  # another dtype
    launch._launch(kernel, 1, (x,), (), (1, 2), 8)  # other warps
    for _ in range(2):
        launch._launch(kernel, 1, (x[1:],), (), (1, 2), 4)  # not aligned: always looked up
    assert (len(kernel.looked_up), len(kernel.launched)) == (6, 1)
