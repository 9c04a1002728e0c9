"""FP8 weights: how they are made, and the product of what they stand for."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from octavo.kernels import triton as device_kernels
from octavo.kernels.reference import activation as activation_reference
from octavo.kernels.reference import fp8 as fp8_reference
from octavo.kernels.reference import norm as norm_reference
from octavo.layers.activation import silu_and_mul
from octavo.layers.linear import Linear
from octavo.layers.norm import RMSNorm
from octavo.quantization import fp8, values
from octavo.quantization.fp8 import FP8, quantize_channels
from octavo.quantization.scheme import Fp8Tokens
from octavo.quantization.unquantized import PLAIN, EveryLayer

CPU = torch.device("cpu")


def weight(rows: int, size: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, size, generator=torch.Generator().manual_seed(seed)).bfloat16()


def filled(bias: bool = True) -> tuple[Linear, dict[str, Tensor]]:
    """A layer of two parts, and its checkpoint tensors."""
    layer = Linear(16, {"a": 8, "b": 24}, bias, torch.bfloat16, CPU)
    layer.create_weights("ab", EveryLayer(FP8))
    state = {"a.weight": weight(8, 16), "b.weight": 100 * weight(24, 16, 1)}
    if bias:
        state |= {"a.bias": torch.ones(8), "b.bias": -torch.ones(24)}
    slots = layer.weight_slots("ab")
    assert set(slots) == set(state)
    for name, tensor in state.items():
        slots[name].load(tensor)
    return layer, state


def test_channels_keep_three_bits_of_mantissa() -> None:
    wide = weight(5, 64).float() * torch.logspace(-6, 6, 5)[:, None]
    quantized, scale = quantize_channels(wide.bfloat16())
    assert (quantized.dtype, scale.dtype, scale.shape) == (torch.float8_e4m3fn, torch.float32, (5,))
    assert torch.equal(scale, wide.bfloat16().float().abs().amax(1) / 448)
    assert quantized.float().abs().amax(1).eq(448).all()
    error = (quantized.float() * scale[:, None] - wide.bfloat16().float()).abs()
    # Half a unit of the mantissa, or of the smallest number where that is larger.
    assert (error <= wide.abs() * 2**-4 * 1.01 + scale[:, None] * 2**-10 * 1.01).all()


def test_a_channel_of_zeros() -> None:
    quantized, scale = quantize_channels(torch.zeros(2, 4))
    assert not quantized.float().any()
    assert (scale > 0).all()


@pytest.mark.parametrize("bias", [True, False])
def test_the_product_is_that_of_the_dequantised_weight(bias: bool) -> None:
    layer, state = filled(bias)
    x = weight(3, 16, 2)
    parts = [quantize_channels(state[f"{part}.weight"]) for part in "ab"]
    dequantised = torch.cat([quantized.double() * scale.double()[:, None] for quantized, scale in parts])
    expected = x.double() @ dequantised.T
    if bias:
        expected += torch.cat((state["a.bias"], state["b.bias"])).double()
    assert layer(x).dtype == torch.bfloat16
    torch.testing.assert_close(layer(x).double(), expected, rtol=2**-8, atol=1e-3)


def test_parts_are_quantised_piece_by_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, _ = filled()
    monkeypatch.setattr(values, "_CHUNK_ELEMENTS", 50)  # three rows of 16
    pieces, _ = filled()
    first, second = whole.layers[0], pieces.layers[0]
    assert torch.equal(first.weight.float(), second.weight.float())
    assert torch.equal(first.weight_scale, second.weight_scale)


def test_only_fp8_stays() -> None:
    layer, _ = filled()
    assert sum(parameter.nbytes for parameter in layer.parameters()) == 32 * 16 + 32 * 4 + 32 * 2


class OnGpu(Tensor):
    """A tensor that says it lies on a GPU."""

    is_cuda = True


def test_kernels_by_the_number_of_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[Any] = []

    def skinny(x: Tensor, weight: Tensor, _scale: Tensor, _bias: Tensor | None, *, gated: bool = False) -> Tensor:
        called.append("gated" if gated else "skinny")
        return x.new_empty(len(x), len(weight))

    def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
        called.append("quantize")
        return x.as_subclass(Tensor).to(torch.float8_e4m3fn), torch.ones(len(x), 1)

    def scaled(x: Tensor, _weight: Tensor, *, scale_a: Tensor, scale_b: Tensor, **_other: Any) -> Tensor:
        called.append((tuple(x.shape), tuple(scale_a.shape), tuple(scale_b.shape)))
        return torch.empty(len(x), 32)

    def own(x: Tensor, *_others: Any, plan: str) -> Tensor:
        called.append(plan)
        return torch.empty(len(x), 32)

    plans = SimpleNamespace(of=lambda m, n, k, _device: f"{m}, {n}, {k}" if m == 6 else None)
    kernels = SimpleNamespace(
        SKINNY_MAX_M=6, skinny_linear_fp8=skinny, quantize_fp8=quantize, Fp8Plan=plans, linear_fp8=own
    )
    monkeypatch.setattr(fp8, "_FULL_MAX_M", 3)
    monkeypatch.setattr(device_kernels, "get", lambda: kernels)
    monkeypatch.setattr(torch, "_scaled_mm", scaled)
    layer, _ = filled()
    FP8.apply(layer.layers[0], weight(4, 16).as_subclass(OnGpu))
    assert called == ["skinny"]
    FP8.apply(layer.layers[0], weight(7, 16).as_subclass(OnGpu))
    FP8.apply(layer.layers[0], weight(6, 16).as_subclass(OnGpu))
    assert called[1:] == ["quantize", ((7, 16), (7, 1), (1, 32)), "quantize", "6, 32, 16"]
    del called[:]
    assert layer.gated(weight(7, 16).as_subclass(OnGpu)) is None
    assert layer.gated(weight(6, 16).as_subclass(OnGpu)) is None
    assert layer.gated(weight(4, 16).as_subclass(OnGpu)) is not None
    assert called == ["gated"]
    layer.adapters = SimpleNamespace(are_active=True)
    assert layer.gated(weight(4, 16).as_subclass(OnGpu)) is None  # they add to the product itself


def test_what_makes_the_activations_quantises_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a layer takes FP8, norm and activation give it; the product is that of the layer's own quantising."""
    products: list[Fp8Tokens] = []

    def scaled(x: Tensor, _weight: Tensor, *, scale_a: Tensor, **_other: Any) -> Tensor:
        products.append(Fp8Tokens(x, scale_a))
        return torch.empty(len(x), 32)

    def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
        return fp8_reference.quantize_fp8(x.as_subclass(Tensor))

    kernels = SimpleNamespace(
        SKINNY_MAX_M=4,
        Fp8Plan=SimpleNamespace(of=lambda *_: None),
        quantize_fp8=quantize,
        rms_norm_fp8=lambda *args: norm_reference.rms_norm_fp8(*args)[1:],
        silu_and_mul_fp8=activation_reference.silu_and_mul_fp8,
    )
    monkeypatch.setattr(device_kernels, "get", lambda: kernels)
    monkeypatch.setattr(torch, "_scaled_mm", scaled)
    monkeypatch.setattr(fp8, "_FULL_MAX_M", 4)
    layer, _ = filled(bias=False)
    few, many = (weight(count, 16).as_subclass(OnGpu) for count in (4, 5))
    assert [layer.takes_fp8(x) for x in (few, many, many.float(), many.as_subclass(Tensor))] == [
        False,
        True,
        False,
        False,
    ]
    plain = Linear(16, {"a": 8}, False, torch.bfloat16, CPU)
    plain.create_weights("ab", PLAIN)
    assert not plain.takes_fp8(many)

    residual, delta = weight(5, 16, 3), weight(5, 16, 4)
    norm = RMSNorm(16, 1e-5, torch.bfloat16, CPU)
    norm.weight.data.fill_(0.5)
    norm._native = None
    plain = norm(residual.clone(), delta)
    norm._fused = kernels
    layer(norm(residual.clone(), delta, fp8=True))
    layer(plain.as_subclass(OnGpu))
    gate_up = weight(5, 32, 5)
    layer(silu_and_mul(gate_up, fp8=True))
    layer(silu_and_mul(gate_up).as_subclass(OnGpu))
    for fused, own in (products[:2], products[2:]):
        torch.testing.assert_close(fused.scale, own.scale, rtol=2**-7, atol=0)
        torch.testing.assert_close(
            fused.values.float() * fused.scale, own.values.float() * own.scale, rtol=2**-3, atol=1e-3
        )
