"""compressed-tensors' formats of 8 bits, packed here from the format's description: FP8 and int8, activations quantized
or in full. benchmarks/quantization/compare_w8a8.py compares logits with those of the package."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from quantized_checkpoints import Encoder, encoded, load, logits, plain_tensors, relative_error, write
from torch import Tensor

from octavo.layers.linear import Linear
from octavo.models.base import CausalLM
from octavo.quantization import int8, values
from octavo.quantization.compressed_tensors import compressed_tensors
from octavo.quantization.int8 import Int8Scheme
from octavo.quantization.unquantized import EveryLayer

CPU = torch.device("cpu")
UP_PROJ = "model.layers.1.mlp.up_proj"
FP8 = torch.float8_e4m3fn
# Of every input in these tests that has a static scale.
INPUT_SCALE, INPUT_ZERO = 0.05, 3


def config(kind: str, strategy: str, inputs: dict[str, Any] | None, **weights: Any) -> dict[str, Any]:
    """quantization_config as llm-compressor writes it."""
    bits = {"num_bits": 8, "type": kind}
    made = {"symmetric": True, "dynamic": False, "strategy": strategy, "group_size": None, "actorder": None}
    group = {
        "targets": ["Linear"],
        "weights": bits | made | {"observer": "minmax", "observer_kwargs": {}} | weights,
        "input_activations": None if inputs is None else bits | {"symmetric": True, "observer": None} | inputs,
        "output_activations": None,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": f"{kind}-quantized",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "quantization_status": "compressed",
        "global_compression_ratio": 1.5,
    }


TOKEN = {"dynamic": True, "strategy": "token"}
STATIC = {"dynamic": False, "strategy": "tensor"}
GROUPS = {"dynamic": True, "strategy": "group", "group_size": 128}


def fp8(weight: Tensor, axis: tuple[int, ...], static: bool = False) -> tuple[dict[str, Tensor], Tensor]:
    """axis: along which elements share a scale."""
    scale = weight.abs().amax(axis, keepdim=True) / 448
    packed = (weight / scale).to(FP8)
    tensors = {"weight": packed, "weight_scale": scale if len(axis) == 1 else scale.flatten()}
    if static:
        tensors["input_scale"] = torch.tensor([0.01])
    return tensors, packed.float() * scale


def fp8_blocks(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    scale = torch.stack(
        [torch.stack([block.abs().max() for block in rows.split(128, 1)]) for rows in weight.split(128)]
    ).div(448)
    wide = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)[: weight.shape[0], : weight.shape[1]]
    packed = (weight / wide).to(FP8)
    return {"weight": packed, "weight_scale": scale}, packed.float() * wide


def integers(
    weight: Tensor, group: int | None = -1, static: bool = False, zero: bool = False
) -> tuple[dict[str, Tensor], Tensor]:
    """group: columns that share a scale; -1 for all of a row, None for all of the tensor."""
    if group is None:
        scale = weight.abs().max().view(1, 1) / 127.5
    else:
        scale = weight.view(len(weight), -1, weight.shape[1] if group == -1 else group).abs().amax(2) / 127.5
    wide = scale.repeat_interleave(weight.shape[1] // scale.shape[1], 1)
    packed = (weight / wide).round().clamp(-128, 127)
    tensors = {"weight": packed.to(torch.int8), "weight_scale": scale.view(1) if group is None else scale}
    if static:
        tensors["input_scale"] = torch.tensor([INPUT_SCALE])
    if zero:
        tensors["input_zero_point"] = torch.tensor([INPUT_ZERO], dtype=torch.int8)
    return tensors, packed * wide


def rounded(x: Tensor, scale: Tensor | float, zero: Tensor | float) -> Tensor:
    """What is left of x as integers of 8 bits."""
    return ((x / scale + zero).round().clamp(-128, 127) - zero) * scale


def by_token(x: Tensor) -> Tensor:
    return rounded(x, x.abs().amax(1, keepdim=True) / 127.5, 0)


def by_token_with_zero(x: Tensor) -> Tensor:
    low, high = x.amin(1, keepdim=True).clamp(max=0), x.amax(1, keepdim=True).clamp(min=0)
    scale = (high - low) / 255
    return rounded(x, scale, (-128 - low / scale).round())


def statically(x: Tensor, zero: float) -> Tensor:
    return rounded(x, torch.tensor(INPUT_SCALE), zero)


def in_full(x: Tensor) -> Tensor:
    return x


# quantization_config, encoder of weights, what becomes of activations on a CPU.
CASES: dict[str, tuple[dict[str, Any], Encoder, Callable[[Tensor], Tensor]]] = {
    "fp8 tensor, static": (config("float", "tensor", STATIC), partial(fp8, axis=(0, 1), static=True), in_full),
    "fp8 channel": (config("float", "channel", TOKEN), partial(fp8, axis=(1,)), in_full),
    "fp8 channel, W8A16": (config("float", "channel", None), partial(fp8, axis=(1,)), in_full),
    "fp8 block": (config("float", "block", GROUPS, block_structure=[128, 128]), fp8_blocks, in_full),
    "fp8 block, W8A16": (config("float", "block", None, block_structure="128x128"), fp8_blocks, in_full),
    "int8 channel": (config("int", "channel", TOKEN), integers, by_token),
    "int8 tensor": (config("int", "tensor", TOKEN), partial(integers, group=None), by_token),
    "int8, zeros": (config("int", "channel", TOKEN | {"symmetric": False}), integers, by_token_with_zero),
    "int8, static": (config("int", "channel", STATIC), partial(integers, static=True), partial(statically, zero=0)),
    "int8, static, zeros": (
        config("int", "channel", STATIC | {"symmetric": False}),
        partial(integers, static=True, zero=True),
        partial(statically, zero=INPUT_ZERO),
    ),
    "int8 channel, W8A16": (config("int", "channel", None), integers, in_full),
    "int8 tensor, W8A16": (config("int", "tensor", None), partial(integers, group=None), in_full),
    "int8 group, W8A16": (config("int", "group", None, group_size=64), partial(integers, group=64), in_full),
}
CHANNEL, STATIC_INT8, STATIC_ZEROS = (
    CASES[name][0] for name in ("int8 channel", "int8, static", "int8, static, zeros")
)


def with_inputs(model: CausalLM, change: Callable[[Tensor], Tensor]) -> CausalLM:
    """The model with the inputs of its projections changed."""
    for path, module in model.named_modules():
        if isinstance(module, Linear) and path != "lm_head":
            module.register_forward_pre_hook(lambda _module, inputs: (change(inputs[0]),))
    return model


@pytest.mark.parametrize("case", CASES)
def test_a_checkpoint_is_what_it_stands_for(case: str, tmp_path: Path) -> None:
    declared, encode, change = CASES[case]
    state, plain = encoded(encode)
    expected = logits(with_inputs(load(write(tmp_path / "plain", plain)), change))
    got = logits(load(write(tmp_path / "packed", state, declared)))
    # An activation between two integers may go either way, as the largest of a token always is (at 127.5).
    assert relative_error(got, expected) < (1e-5 if change is in_full else 2e-2)
    lossless = logits(load(write(tmp_path / "lossless", plain_tensors())))
    assert relative_error(expected, lossless) < 0.2, "the encoder of this test is wrong"
    naive = declared | {"format": "naive-quantized"}
    assert torch.equal(got, logits(load(write(tmp_path / "naive", state, naive))))


@pytest.mark.parametrize("case", [name for name, (*_, change) in CASES.items() if change is not in_full])
def test_products_are_those_of_rounded_activations(case: str, tmp_path: Path) -> None:
    declared, encode, change = CASES[case]
    state, plain = encoded(encode)
    module = load(write(tmp_path, state, declared)).get_submodule("model.layers.1.mlp.gate_up_proj")
    x = torch.randn(7, 128, generator=torch.Generator().manual_seed(4))
    weight = torch.cat([plain[f"model.layers.1.mlp.{name}_proj.weight"] for name in ("gate", "up")])
    torch.testing.assert_close(module(x), change(x) @ weight.T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("zero", [False, True])
def test_parts_keep_their_own_input_scale(zero: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """And products are exact, whatever pieces they are made in: all is small whole numbers."""
    monkeypatch.setattr(values, "_CHUNK_ELEMENTS", 50)
    layer = Linear(32, {"a": 8, "b": 16}, True, dtype, CPU)
    layer.create_weights("ab", EveryLayer(Int8Scheme(static=True, symmetric=not zero)))
    assert [len(part.weight) for part in layer.layers] == [8, 16]
    generator, state, expected = torch.Generator().manual_seed(0), {}, []
    x = torch.randint(-3, 4, (5, 32), generator=generator).to(dtype)
    for name, rows, scale in (("a", 8, 0.5), ("b", 16, 2.0)):
        weight = torch.randint(-2, 3, (rows, 32), generator=generator).to(torch.int8)
        tensors = {"weight": weight, "weight_scale": torch.full((rows, 1), 0.25), "bias": torch.ones(rows)}
        tensors |= {"input_scale": torch.tensor([scale])}
        if zero:
            tensors["input_zero_point"] = torch.tensor([-100], dtype=torch.int8)
        state |= {f"{name}.{end}": tensor for end, tensor in tensors.items()}
        low, high = (-28 * scale, 227 * scale) if zero else (-128 * scale, 127 * scale)
        seen = ((x.double() / scale).round() * scale).clamp(low, high)
        expected.append(seen @ weight.double().T / 4 + 1)
    for name, slot in layer.weight_slots("ab").items():
        slot.load(state[name])
    assert torch.equal(layer(x), torch.cat(expected, 1).to(dtype))


def test_tokens_of_zeros_and_the_ends_of_the_range() -> None:
    x = torch.zeros(2, 4)
    for symmetric in (True, False):
        codes, scale, zero = int8.quantize_tokens(x, None, symmetric)
        assert torch.equal((codes.float() - zero) * scale, x)
    x = torch.tensor([[0.0, 1.0, 2.0, 255.0]])
    codes, scale, zero = int8.quantize_tokens(x, None, False)
    assert (codes.tolist(), scale.item(), zero.item()) == ([[-128, -127, -126, 127]], 1.0, -128.0)
    codes, scale, _ = int8.quantize_tokens(x - 127.5, None, True)
    assert (codes.tolist(), scale.item()) == ([[-128, -126, -126, 127]], 1.0)


class OnGpu(Tensor):
    """A tensor that says it lies on a GPU."""

    is_cuda = True


def test_few_tokens_are_filled_up_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = (torch.randint(-128, 128, (rows, 16)).to(torch.int8) for rows in (3, 8))
    seen: list[int] = []
    given = torch._int_mm

    def product(left: Tensor, right: Tensor) -> Tensor:
        seen.append(len(left))
        return given(left.as_subclass(Tensor), right)

    monkeypatch.setattr(torch, "_int_mm", product)
    assert torch.equal(int8.multiply(x.as_subclass(OnGpu), weight).long(), x.long() @ weight.long().T)
    assert torch.equal(int8.multiply(x, weight).long(), x.long() @ weight.long().T)
    assert seen == [32, 3]


def test_sizes_that_a_gpu_cannot_multiply() -> None:
    layer = Linear(12, {"a": 8}, True, torch.float32, CPU)
    layer.create_weights("a", EveryLayer(Int8Scheme(static=False, symmetric=True)))
    weight, x = torch.arange(96).view(8, 12).to(torch.int8), torch.randn(3, 12)
    state = {"a.weight": weight, "a.weight_scale": torch.full((8, 1), 0.5), "a.bias": torch.ones(8)}
    for name, slot in layer.weight_slots("a").items():
        slot.load(state[name])
    part = layer.layers[0]
    torch.testing.assert_close(
        part.scheme.apply(part, x.as_subclass(OnGpu)).as_subclass(Tensor), x @ weight.float().T / 2 + 1
    )


@pytest.mark.parametrize(
    ("declared", "change", "said"),
    [
        (CHANNEL, {"weight_scale": None}, f"missing: {UP_PROJ}.weight_scale"),
        (CHANNEL, {"weight": torch.ones(320, 128)}, f"{UP_PROJ}.weight has dtype torch.float32, expected torch.int8"),
        (CHANNEL, {"weight_scale": torch.ones(320, 2)}, rf"{UP_PROJ}.weight_scale has shape \[320, 2\]"),
        (CHANNEL, {"weight_scale": torch.full((320, 1), torch.nan)}, f"{UP_PROJ}: weight_scale holds nan"),
        (CHANNEL, {"input_scale": torch.ones(1)}, f"not expected: {UP_PROJ}.input_scale"),
        (STATIC_INT8, {"input_scale": None}, f"missing: {UP_PROJ}.input_scale"),
        (STATIC_INT8, {"input_scale": torch.zeros(1)}, f"{UP_PROJ}: input_scale holds 0.0"),
        (STATIC_ZEROS, {"input_zero_point": None}, f"missing: {UP_PROJ}.input_zero_point"),
        (STATIC_ZEROS, {"input_zero_point": torch.zeros(1)}, f"{UP_PROJ}.input_zero_point has dtype torch.float32"),
    ],
)
def test_what_cannot_be_is_named(
    declared: dict[str, Any], change: dict[str, Tensor | None], said: str, tmp_path: Path
) -> None:
    encode = next(encode for one, encode, _ in CASES.values() if one == declared)
    state, _ = encoded(encode)
    state |= {f"{UP_PROJ}.{end}": tensor for end, tensor in change.items()}
    folder = write(tmp_path, {name: tensor for name, tensor in state.items() if tensor is not None}, declared)
    with pytest.raises(ValueError, match=said) as caught:
        load(folder)
    assert str(tmp_path) in str(caught.value)


def test_a_truncated_file_is_named(tmp_path: Path) -> None:
    file = write(tmp_path, encoded(integers)[0], CHANNEL) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match=f"{file} is not a readable safetensors file"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("declared", "said"),
    [
        (config("int", "channel", TOKEN, num_bits=4), "weights.num_bits=4 is not supported; allowed: 8"),
        (config("int", "channel", TOKEN, symmetric=False), "weights.symmetric=False is not supported; allowed: True"),
        (config("int", "group", TOKEN, group_size=64), "weights.strategy='group' .*allowed: tensor, channel"),
        (config("int", "channel", STATIC | {"strategy": "token"}), "input_activations.strategy='token' .*: tensor"),
        (config("int", "channel", TOKEN | {"type": "float"}), "input_activations.type='float' .*allowed: int"),
        (config("float", "channel", TOKEN | {"dynamic": "local"}), "input_activations.dynamic='local'"),
        (config("float", "tensor", TOKEN, num_bits=4), "weights.num_bits=4 is not supported; allowed: 8"),
        (
            config("float", "block", GROUPS, block_structure=[64, 64]),
            r"weights.block_structure=\(64, 64\) .*\(128, 128\)",
        ),
        (config("float", "block", GROUPS | {"group_size": 64}, block_structure=[128, 128]), "group_size=64 .*: 128"),
        (config("float", "channel", TOKEN) | {"kv_cache_scheme": {"type": "int"}}, "kv_cache_scheme.type='int'"),
    ],
)
def test_fields_that_are_not_supported_are_named(declared: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        compressed_tensors(declared)


def test_a_kv_cache_scheme_of_fp8_is_read() -> None:
    scheme = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
    declared = config("float", "channel", TOKEN) | {
        "kv_cache_scheme": scheme | {"observer": "minmax", "group_size": None}
    }
    assert compressed_tensors(declared).scheme_of("x") == compressed_tensors(CASES["fp8 channel"][0]).scheme_of("x")


@pytest.mark.parametrize("case", CASES)
def test_dummy_weights(case: str, tmp_path: Path) -> None:
    model = load(write(tmp_path, {"x": torch.ones(1)}, CASES[case][0]), load_format="dummy")
    assert logits(model).isfinite().all()
    weight = model.model.layers[0].mlp.down_proj(torch.eye(320))
    assert 0.01 < weight.std() < 0.03
