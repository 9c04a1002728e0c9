"""Checkpoints of FP8 weights: a scale a tensor, a row, a block; and what is refused of them."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from quantized_checkpoints import Encoder, encoded, load, logits, plain_tensors, relative_error, write
from torch import Tensor
from transformers import FineGrainedFP8Config
from transformers.integrations.finegrained_fp8 import Fp8Quantize

from octavo.kernels import triton as device_kernels
from octavo.kernels.reference import block_fp8 as block_reference
from octavo.quantization import fp8, values
from octavo.quantization.fp8 import Fp8Scheme, StoredFp8, quantize_channels
from octavo.quantization.fp8_block import FP8_PER_BLOCK, Fp8BlockScheme, dequantize_blocks, quantize_blocks
from octavo.quantization.registry import method_of
from octavo.quantization.scheme import LinearLayer
from octavo.quantization.unquantized import UNQUANTIZED

FP8 = torch.float8_e4m3fn
Q_PROJ = "model.layers.0.self_attn.q_proj"
STATIC = {"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ["lm_head"]}
DYNAMIC = {"quant_method": "fp8", "activation_scheme": "dynamic"}
BLOCKS = DYNAMIC | {"fmt": "e4m3", "weight_block_size": [128, 128]}


def per_tensor(weight: Tensor, shape: tuple[int, ...] = (), static: bool = False) -> tuple[dict[str, Tensor], Tensor]:
    scale = weight.abs().max() / 448
    packed = (weight / scale).to(FP8)
    tensors = {"weight": packed, "weight_scale": scale.view(shape)}
    if static:
        tensors["input_scale"] = torch.tensor(0.01)
    return tensors, packed.float() * scale


def per_row(weight: Tensor, columns: bool) -> tuple[dict[str, Tensor], Tensor]:
    scale = (weight.abs().amax(1, keepdim=True) / 448).bfloat16()
    packed = (weight / scale.float()).clamp(-448, 448).to(FP8)
    return {"weight": packed, "weight_scale": scale if columns else scale[:, 0]}, packed.float() * scale.float()


def per_block(weight: Tensor, dtype: torch.dtype = torch.float32) -> tuple[dict[str, Tensor], Tensor]:
    """Block by block, by the format's definition. Scales of float8_e8m0fnu are powers of two."""
    packed, plain = torch.empty(weight.shape, dtype=FP8), torch.empty_like(weight)
    scales = torch.empty(-(-weight.shape[0] // 128), -(-weight.shape[1] // 128))
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            at = slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128)
            scale = weight[at].abs().max() / 448
            if dtype == torch.float8_e8m0fnu:
                scale = scale.log2().ceil().exp2()
            scales[i, j] = scale
            packed[at] = (weight[at] / scale).to(FP8)
            plain[at] = packed[at].float() * scale
    return {"weight": packed, "weight_scale_inv": scales.to(dtype)}, plain


def by_transformers(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    quantizer = SimpleNamespace(quantization_config=FineGrainedFP8Config(weight_block_size=None))
    made = Fp8Quantize(quantizer).convert({"weight": weight})
    return made, made["weight"].float() * made["weight_scale_inv"]


CASES: dict[str, tuple[dict[str, Any], Encoder]] = {
    "tensor, dynamic": (DYNAMIC, per_tensor),
    "tensor, [1]": (DYNAMIC, partial(per_tensor, shape=(1,))),
    "tensor, static": (STATIC, partial(per_tensor, static=True)),
    "tensor, transformers": (DYNAMIC | {"dequantize": False, "scale_fmt": "float"}, by_transformers),
    "row": (DYNAMIC, partial(per_row, columns=False)),
    "row, [N, 1]": (DYNAMIC, partial(per_row, columns=True)),
    "block": (BLOCKS, per_block),
    "block, ue8m0": (BLOCKS | {"scale_fmt": "ue8m0"}, partial(per_block, dtype=torch.float8_e8m0fnu)),
}


@pytest.mark.parametrize("case", CASES)
def test_a_checkpoint_is_what_it_stands_for(case: str, tmp_path: Path) -> None:
    config, encode = CASES[case]
    state, plain = encoded(encode)
    expected = logits(load(write(tmp_path / "plain", plain)))
    assert relative_error(logits(load(write(tmp_path / "fp8", state, config))), expected) < 1e-5
    lossless = logits(load(write(tmp_path / "lossless", plain_tensors())))
    assert relative_error(expected, lossless) < 0.2, "the encoder of this test is wrong"
    half = logits(load(tmp_path / "fp8", torch.bfloat16))
    assert relative_error(half, logits(load(tmp_path / "plain", torch.bfloat16))) < 1e-2


def test_the_block_encoder_packs_as_transformers_does() -> None:
    """To one step of FP8: transformers multiplies by the scale's reciprocal."""
    weight = torch.randn(256, 384, generator=torch.Generator().manual_seed(3))
    config = FineGrainedFP8Config(weight_block_size=(128, 128))
    theirs = Fp8Quantize(SimpleNamespace(quantization_config=config)).convert({"weight": weight})
    ours, _ = per_block(weight)
    torch.testing.assert_close(ours["weight_scale_inv"], theirs["weight_scale_inv"], rtol=1e-6, atol=0)
    same = ours["weight"].view(torch.uint8) == theirs["weight"].view(torch.uint8)
    assert same.float().mean() > 0.999


@pytest.mark.parametrize("field", ["ignored_layers", "modules_to_not_convert"])
@pytest.mark.parametrize("skipped", ["model.layers.1.mlp", "down_proj", Q_PROJ])
def test_layers_that_are_not_converted(field: str, skipped: str, tmp_path: Path) -> None:
    state, plain = encoded(per_tensor, (skipped,))
    expected = logits(load(write(tmp_path / "plain", plain)))
    got = logits(load(write(tmp_path / "fp8", state, DYNAMIC | {field: [skipped, "lm_head"]})))
    assert relative_error(got, expected) < 1e-5
    with pytest.raises(ValueError, match=r"torch.float32, expected torch.float8_e4m3fn"):
        load(write(tmp_path / "other", state, DYNAMIC | {field: ["own_proj", "layers.11"]}))


def test_option_and_config_agree(tmp_path: Path) -> None:
    folder = write(tmp_path, encoded(per_tensor)[0], DYNAMIC)
    assert torch.equal(logits(load(folder, option="fp8")), logits(load(folder)))
    with pytest.raises(ValueError, match=r"quantization='fp8_per_block' and .* do not agree"):
        load(folder, option="fp8_per_block")


@pytest.mark.parametrize("option", ["fp8", "fp8_per_channel", "fp8_per_tensor", "fp8_per_block"])
def test_quantized_while_loaded(option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the plain checkpoint becomes is what an encoder of the same scales makes of it."""
    monkeypatch.setattr(values, "_CHUNK_ELEMENTS", 130 * 128)  # several pieces a matrix
    encode = {"fp8_per_tensor": per_tensor, "fp8_per_block": per_block}.get(option, channels)
    _, plain = encoded(encode)
    expected = logits(load(write(tmp_path / "plain", plain)))
    got = logits(load(write(tmp_path / "given", plain_tensors()), option=option))
    assert relative_error(got, expected) < 1e-5


def channels(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    scale = weight.abs().amax(1, keepdim=True) / 448
    return {}, (weight / scale).to(FP8).float() * scale


def test_blocks_of_zeros_and_of_any_size() -> None:
    weight = torch.randn(130, 257)
    weight[:128, :128] = 0
    packed, scale = quantize_blocks(weight)
    assert (packed.shape, scale.shape) == ((130, 257), (2, 3))
    plain = dequantize_blocks(packed, scale, torch.float32)
    assert not plain[:128, :128].any()
    assert relative_error(plain, weight) < 0.04


@pytest.mark.parametrize(
    ("config", "change", "said"),
    [
        (DYNAMIC, {"weight_scale": None}, f"{Q_PROJ}: weight_scale is missing"),
        (DYNAMIC, {"weight_scale_inv": torch.ones(())}, "weight_scale and weight_scale_inv say the same"),
        (DYNAMIC, {"weight": None}, f"missing: {Q_PROJ}.weight"),
        (DYNAMIC, {"weight": torch.ones(128, 128)}, f"{Q_PROJ}.weight has dtype torch.float32, expected torch.float8"),
        (DYNAMIC, {"weight": torch.ones(128, 64).to(FP8)}, rf"{Q_PROJ}.weight has shape \[128, 64\]"),
        (DYNAMIC, {"weight_scale": torch.ones(5)}, rf"{Q_PROJ}.weight_scale has shape \[5\], expected \[\] or \[1\]"),
        (DYNAMIC, {"weight_scale": torch.tensor(float("nan"))}, f"{Q_PROJ}: weight_scale holds nan"),
        (DYNAMIC, {"weight_scale": torch.tensor(-1.0)}, "weight_scale holds -1.0, expected finite numbers >= 0"),
        (DYNAMIC, {"weight_scale": torch.tensor(1, dtype=torch.int8)}, "weight_scale has dtype torch.int8"),
        (STATIC, {"input_scale": None}, f"{Q_PROJ}: input_scale is missing, and activation_scheme is static"),
        (STATIC, {"input_scale": torch.zeros(())}, f"{Q_PROJ}: input_scale holds 0.0, expected finite numbers >= 1.17"),
        (DYNAMIC, {"g_idx": torch.zeros(1)}, f"not expected: {Q_PROJ}.g_idx"),
    ],
)
def test_what_cannot_be_is_named(
    config: dict[str, Any], change: dict[str, Tensor | None], said: str, tmp_path: Path
) -> None:
    state, _ = encoded(partial(per_tensor, static=config == STATIC))
    state |= {f"{Q_PROJ}.{end}": tensor for end, tensor in change.items()}
    folder = write(tmp_path, {name: tensor for name, tensor in state.items() if tensor is not None}, config)
    with pytest.raises(ValueError, match=said) as caught:
        load(folder)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    ("scales", "said"),
    [
        (None, f"missing: {Q_PROJ}.weight_scale_inv"),
        (torch.ones(1, 2), rf"{Q_PROJ}.weight_scale_inv has shape \[1, 2\], expected \[1, 1\]"),
        (torch.full((1, 1), float("inf")), f"{Q_PROJ}: weight_scale_inv holds inf"),
    ],
)
def test_block_scales_that_cannot_be_are_named(scales: Tensor | None, said: str, tmp_path: Path) -> None:
    state, _ = encoded(per_block)
    del state[f"{Q_PROJ}.weight_scale_inv"]
    if scales is not None:
        state[f"{Q_PROJ}.weight_scale_inv"] = scales
    with pytest.raises(ValueError, match=said):
        load(write(tmp_path, state, BLOCKS))


@pytest.mark.parametrize("config", [DYNAMIC, BLOCKS])
def test_a_truncated_file_is_named(config: dict[str, Any], tmp_path: Path) -> None:
    file = write(tmp_path, encoded(per_tensor)[0], config) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match=f"{file} is not a readable safetensors file"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"activation_scheme": "lazy"}, "activation_scheme='lazy' is not supported; allowed: dynamic, static"),
        ({"weight_block_size": [64, 64]}, r"weight_block_size=\[64, 64\] .*allowed: \[128, 128\], or null"),
        ({"weight_block_size": [128, 128], "activation_scheme": "static"}, "activation_scheme='static'.*'dynamic'"),
        ({"fmt": "e5m2"}, "fmt='e5m2' is not supported; allowed: e4m3"),
        ({"scale_fmt": "int"}, "scale_fmt='int' is not supported"),
        ({"ignored_layers": "lm_head"}, "ignored_layers='lm_head' .*allowed: a list of strings"),
        ({"kv_cache_scheme": {"num_bits": 4}}, "quantization_config.kv_cache_scheme.num_bits=4 .*allowed: 8"),
        ({"kv_cache_scheme": 8}, "kv_cache_scheme=8 is not supported; allowed: an object"),
        ({"weight_scheme": "x"}, "quantization_config.weight_scheme='x' is not supported; allowed: activation_scheme"),
    ],
)
def test_fields_that_are_not_supported_are_named(fields: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=said):
        load(write(tmp_path, {"x": torch.ones(1)}, DYNAMIC | fields))


@pytest.mark.parametrize("config", [DYNAMIC, STATIC, BLOCKS])
def test_dummy_weights(config: dict[str, Any], tmp_path: Path) -> None:
    folder = write(tmp_path, {"x": torch.ones(1)}, config | {"kv_cache_scheme": None})
    model = load(folder, load_format="dummy")
    assert logits(model).isfinite().all()
    weight = Fp8Scheme(StoredFp8()).tensors(128, 64)["weight"].make_dummy(torch.Generator())
    assert 0.9 < weight.float().std() < 1.1


def test_scales_of_a_kv_cache(tmp_path: Path) -> None:
    """They reach the attention; on a CPU, whose cache is not of float8, they change nothing."""
    state, _ = encoded(per_tensor)
    expected = logits(load(write(tmp_path / "without", state, DYNAMIC)))
    attention = "model.layers.1.self_attn"
    state |= {f"{attention}.k_scale": torch.tensor(0.5), f"{attention}.v_proj.output_scale": torch.tensor([3.0])}
    state |= {f"{attention}.q_scale": torch.tensor(1.0), "model.layers.0.self_attn.kv_scale": torch.tensor(2.0)}
    model = load(write(tmp_path / "with", state, DYNAMIC | {"kv_cache_scheme": "static"}))
    scales = [(layer.self_attn.attn.key_scale, layer.self_attn.attn.value_scale) for layer in model.model.layers]
    assert scales == [(2.0, 2.0), (0.5, 3.0)]
    assert torch.equal(logits(model), expected)


def test_the_config_that_transformers_writes() -> None:
    declared = json.loads(FineGrainedFP8Config(modules_to_not_convert=["q_proj"]).to_json_string())
    method = method_of(None, declared)
    assert method.scheme_of(f"{Q_PROJ}") is UNQUANTIZED
    assert method.scheme_of("model.layers.0.mlp.up_proj") == Fp8BlockScheme("weight_scale_inv")


class OnGpu(Tensor):
    """A tensor that says it lies on a GPU."""

    is_cuda = True


def test_blocks_are_multiplied_by_the_number_of_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []

    def kernel(name: str) -> Any:
        def call(*args: Any) -> Any:
            called.append(name)
            plain = [arg.as_subclass(Tensor) if isinstance(arg, Tensor) else arg for arg in args]
            return getattr(block_reference, name)(*plain)

        return call

    names = ("skinny_linear_block_fp8", "quantize_fp8_groups", "block_fp8_linear")
    kernels = SimpleNamespace(SKINNY_MAX_M=4, **{name: kernel(name) for name in names})
    monkeypatch.setattr(device_kernels, "get", lambda: kernels)
    layer = LinearLayer(FP8_PER_BLOCK, 192, 160, True, torch.bfloat16, torch.device("cpu"))
    weight = torch.randn(160, 192, generator=torch.Generator().manual_seed(0))
    layer.scheme.load(layer, 0, 160, {"weight": weight})
    layer.bias.data.fill_(2)
    layer.scheme.finish(layer)
    for count, kernel_names in ((4, names[:1]), (5, names[1:])):
        x = torch.randn(count, 192, generator=torch.Generator().manual_seed(1)).bfloat16()
        got = layer.scheme.apply(layer, x.as_subclass(OnGpu))
        assert called == list(kernel_names)
        assert relative_error(got.float(), x.float() @ weight.T + 2) < 0.06
        assert relative_error(layer.scheme.apply(layer, x).float(), x.float() @ weight.T + 2) < 0.04
        called.clear()
    full = LinearLayer(Fp8BlockScheme(None, quantizes_tokens=False), 192, 160, True, torch.bfloat16, layer.device)
    full.weight, full.weight_scale, full.bias = layer.weight, layer.weight_scale, layer.bias
    full.scheme.apply(full, x.as_subclass(OnGpu))
    assert called == []


def test_activations_in_full_are_not_quantized(monkeypatch: pytest.MonkeyPatch) -> None:
    """As W8A16 has them, whatever their number."""
    monkeypatch.setattr(device_kernels, "get", lambda: SimpleNamespace(SKINNY_MAX_M=4))
    scheme = Fp8Scheme(fp8.OnlineFp8("channel"), quantizes_tokens=False)
    layer = LinearLayer(scheme, 32, 16, False, torch.bfloat16, torch.device("cpu"))
    weight = torch.randn(16, 32, generator=torch.Generator().manual_seed(0))
    scheme.load(layer, 0, 16, {"weight": weight})
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(1)).bfloat16()
    assert not scheme.takes_fp8(layer, x.as_subclass(OnGpu))
    packed, scale = quantize_channels(weight)
    expected = x.float() @ (packed.float() * scale[:, None]).T
    assert relative_error(scheme.apply(layer, x.as_subclass(OnGpu)).float(), expected) < 0.01
