"""Layers against their formulas, and how checkpoint tensors fill them."""

from __future__ import annotations

import math

import pytest
import torch

from octavo.layers.activation import silu_and_mul
from octavo.layers.attention import Attention
from octavo.layers.linear import Linear
from octavo.layers.norm import QueryKeyNorm, RMSNorm
from octavo.layers.rotary import RopeParameters, RotaryEmbedding, rotate
from octavo.quantization.unquantized import PLAIN, can_pack

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("num_tokens", [1, 5])
def test_fused_linear(dtype: torch.dtype, bias: bool, num_tokens: int) -> None:
    torch.manual_seed(0)
    layer = Linear(32, {"a": 8, "b": 24}, bias, dtype, CPU)
    layer.create_weights("x.y", PLAIN)
    parts = {name: torch.randn(slot.spec.shape) for name, slot in layer.weight_slots("x.y").items()}
    assert set(parts) == {"x.a.weight", "x.b.weight"} | ({"x.a.bias", "x.b.bias"} if bias else set())
    for name in reversed(parts):  # any order
        layer.weight_slots("x.y")[name].load(parts[name])
    x = torch.randn(num_tokens, 32).to(dtype)
    expected = [x.float() @ parts[f"x.{p}.weight"].to(dtype).float().T for p in "ab"]
    if bias:
        expected = [y + parts[f"x.{p}.bias"].to(dtype).float() for p, y in zip("ab", expected)]
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(layer(x).float(), torch.cat(expected, -1), atol=tolerance, rtol=tolerance)


def test_a_packed_weight_is_no_parameter() -> None:
    linear = Linear(16, {"a": 8}, True, torch.float32, CPU)
    linear.create_weights("a", PLAIN)
    (layer,) = linear.layers
    assert layer.packed_weight is None
    for name, slot in linear.weight_slots("a").items():
        slot.load(torch.ones(slot.spec.shape))
        assert (layer.packed_weight is None) == (name == "a.weight" or not can_pack(torch.float32, CPU))
    if layer.packed_weight is not None:
        assert layer.weight is None
        assert list(layer.state_dict()) == ["bias"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    norm = RMSNorm(48, 0.1, dtype, CPU)
    weight = torch.randn(48)
    norm.weight_slots("n")["n.weight"].load(weight)
    x = (torch.randn(7, 48) * 20).to(dtype)
    exact = x.double() * (x.double().square().mean(-1, keepdim=True) + 0.1).rsqrt() * weight.to(dtype).double()
    torch.testing.assert_close(norm(x).double(), exact, atol=1e-6, rtol=1e-6 if dtype == torch.float32 else 2**-8)


def test_query_key_norm_weighs_each_head_by_its_kind() -> None:
    torch.manual_seed(0)
    norm = QueryKeyNorm(3, 2, 8, 1e-6, torch.float32, CPU)
    slots = norm.weight_slots("attn.qk_norm")
    slots["attn.q_norm.weight"].load(torch.full((8,), 2.0))
    slots["attn.k_norm.weight"].load(torch.full((8,), 5.0))
    heads = norm(torch.randn(4, 5, 8))
    rms = heads.square().mean(-1).sqrt()
    torch.testing.assert_close(rms, torch.tensor([2.0, 2, 2, 5, 5]).expand(4, 5), atol=1e-4, rtol=0)


def test_rotation_is_by_position_times_frequency() -> None:
    rotary = RotaryEmbedding(RopeParameters(theta=100.0), 4, 64, torch.float32, CPU)
    heads = torch.tensor([[[1.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0]]]).repeat(3, 1, 1)
    turned = rotate(heads, *rotary(torch.tensor([0, 3, 50_000])))
    for token, position in enumerate((0, 3, 50_000)):
        for head, frequency in enumerate((1.0, 0.1)):  # theta ** (-2i / 4)
            expected = torch.zeros(4)
            expected[head], expected[head + 2] = math.cos(position * frequency), math.sin(position * frequency)
            torch.testing.assert_close(turned[token, head], expected, atol=2e-3 if token == 2 else 1e-6, rtol=0)


def test_rotation_leaves_products_to_depend_on_distance_alone() -> None:
    torch.manual_seed(0)
    rotary = RotaryEmbedding(RopeParameters(theta=10000.0), 16, 64, torch.float32, CPU)
    query, key = torch.randn(16), torch.randn(16)
    products = []
    for query_position, key_position in ((5, 2), (45, 42), (63, 60)):
        cos, sin = rotary(torch.tensor([query_position, key_position]))
        turned = rotate(torch.stack((query, key))[:, None], cos, sin)
        products.append(turned[0, 0] @ turned[1, 0])
    torch.testing.assert_close(torch.stack(products), products[0].expand(3), atol=1e-4, rtol=0)


def test_silu_and_mul() -> None:
    gate_up = torch.tensor([[0.0, 1.0, 3.0, -2.0]])
    torch.testing.assert_close(silu_and_mul(gate_up), torch.tensor([[0.0, -2 / (1 + math.exp(-1))]]))
    assert gate_up.tolist() == [[0.0, 1.0, 3.0, -2.0]]


def test_attention_hands_itself_to_the_context() -> None:
    class Context:
        def forward(
            self, layer: Attention, query: torch.Tensor, _key: torch.Tensor, _value: torch.Tensor
        ) -> torch.Tensor:
            assert (layer.layer_index, layer.num_heads, layer.num_kv_heads, layer.head_dim) == (3, 4, 2, 16)
            assert (layer.scale, layer.sliding_window) == (0.25, 9)
            return query + 1

    qkv = torch.randn(5, (4 + 2 + 2) * 16)
    still = torch.ones(5, 1, 16), torch.zeros(5, 1, 16)
    out = Attention(3, 4, 2, 16, 9)(qkv, still, None, Context())
    assert torch.equal(out, qkv[:, :64] + 1)
