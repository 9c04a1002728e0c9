"""Scales of a float8 KV cache: read from a checkpoint by any of their names, and applied by both backends of a GPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from octavo.attention.backend import DeviceBatch, FusedAttentionBackend
from octavo.attention.long_prefill import NoLongPrefill
from octavo.attention.torch_operators import TorchAttention
from octavo.attention.triton import TritonAttention
from octavo.kernels import triton
from octavo.layers.attention import Attention

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HEADS, KV_HEADS, DIM = 4, 2, 32


@dataclass(frozen=True)
class Layer:
    key_scale: float
    value_scale: float
    layer_index: int = 0
    num_heads: int = HEADS
    num_kv_heads: int = KV_HEADS
    head_dim: int = DIM
    scale: float = DIM**-0.5
    sliding_window: int | None = None


@dataclass(frozen=True)
class Row:
    slot: int
    start: int
    length: int


def step(backend: FusedAttentionBackend, layer: Layer, qkv: Tensor, start: int) -> Tensor:
    """One row of new tokens at block 1, 2 and so on."""
    rows, tables = [Row(0, start, len(qkv))], torch.arange(1, 4, dtype=torch.int32, device=DEVICE)[None]
    decode, prefill = (torch.from_numpy(items).to(DEVICE) for items in backend.plan(rows, tables, False))
    places = 16 + torch.arange(start, start + len(qkv), device=DEVICE)
    slot, begin, ends = (
        torch.tensor(numbers, dtype=torch.int32, device=DEVICE) for numbers in ([0], [start], [0, len(qkv)])
    )
    backend.prepare(DeviceBatch(slot, begin, ends, places, tables, decode, prefill, rows))
    ones = torch.ones(len(qkv), 1, DIM, dtype=qkv.dtype, device=DEVICE)
    return backend.forward_fused(layer, qkv.clone(), (ones, ones * 0), None)


@pytest.mark.parametrize("attention", ["triton", "torch"])
@pytest.mark.parametrize("cache_dtype", [torch.float8_e4m3fn, torch.bfloat16])
def test_keys_and_values_are_scaled(attention: str, cache_dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys that are too small for float8, values that are too large. A cache of another dtype needs no scales."""
    monkeypatch.setattr(triton, "_loaded", None)
    triton.load()
    cache = torch.zeros(1, 4, 2, KV_HEADS, 16, DIM, dtype=cache_dtype, device=DEVICE)
    backend: FusedAttentionBackend = (
        TritonAttention(cache, HEADS, 4, 4, NoLongPrefill()) if attention == "triton" else TorchAttention(cache, HEADS)
    )
    layer = Layer(key_scale=2e-5, value_scale=20.0)
    qkv = torch.randn(21, HEADS + 2 * KV_HEADS, DIM, generator=torch.Generator().manual_seed(0))
    qkv[:, :HEADS] *= 1000
    qkv[:, HEADS : HEADS + KV_HEADS] *= 1e-3
    qkv[:, HEADS + KV_HEADS :] *= 1000
    flat = qkv.bfloat16().view(21, -1).to(DEVICE)
    got = torch.cat((step(backend, layer, flat[:20], 0), step(backend, layer, flat[20:], 20)))

    query, key, value = (
        part.transpose(0, 1) for part in flat.view(21, -1, DIM).float().split((HEADS, KV_HEADS, KV_HEADS), 1)
    )
    if cache_dtype == torch.float8_e4m3fn:
        key, value = (part.div(scale).to(cache_dtype).float() * scale for part, scale in ((key, 2e-5), (value, 20.0)))
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(got.float(), expected.transpose(0, 1), rtol=2**-5, atol=20)


NAMES = {
    "k_scale": (2.0, 1.0),
    "v_scale": (1.0, 2.0),
    "kv_scale": (2.0, 2.0),
    "k_proj.output_scale": (2.0, 1.0),
    "v_proj.output_scale": (1.0, 2.0),
    "k_proj.k_scale": (2.0, 1.0),
    "v_proj.v_scale": (1.0, 2.0),
    "attn.k_scale": (2.0, 1.0),
    "attn.v_scale": (1.0, 2.0),
    "attn.kv_scale": (2.0, 2.0),
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(), (1,)])
def test_names_of_scales(name: str, shape: tuple[int, ...]) -> None:
    layer = Attention(0, HEADS, KV_HEADS, DIM, None)
    slots = layer.weight_slots("model.layers.3.self_attn.attn")
    assert set(slots) == {f"model.layers.3.self_attn.{name}" for name in NAMES}
    slot = slots[f"model.layers.3.self_attn.{name}"]
    slot.load(None)
    assert (layer.key_scale, layer.value_scale) == (1.0, 1.0)
    scale = torch.full(shape, 2.0)
    assert slot.spec.problem(name, scale) is None
    assert not slot.spec.required
    slot.load(scale)
    assert (layer.key_scale, layer.value_scale) == NAMES[name]
    assert slot.spec.problem(name, torch.ones(2)) is not None


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_scales_that_cannot_be_are_named(value: Any) -> None:
    slot = Attention(0, HEADS, KV_HEADS, DIM, None).weight_slots("a.attn")["a.k_proj.output_scale"]
    with pytest.raises(ValueError, match=f"a.k_proj.output_scale holds {value}, expected a finite number above 0"):
        slot.load(torch.tensor(value))
