"""Checkpoints of grouped integers, in every format: the models that they stand for, dummies, and corrupt files."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from integer_encoders import awq, gptq, pack_quantized, padded, stream
from quantized_checkpoints import Encoder, encoded, load, logits, plain_tensors, relative_error, write
from torch import Tensor

from octavo.kernels.reference import grouped_gemm as reference
from octavo.layers.linear import Linear
from octavo.models.base import CausalLM
from octavo.quantization.gptq import Gptq
from octavo.quantization.packed_integers import unpack_bits, unpack_padded
from octavo.quantization.scheme import LinearLayer

Q_PROJ, K_PROJ = (f"model.layers.0.self_attn.{part}_proj" for part in "qk")


def of_awq(group_size: int, **fields: Any) -> dict[str, Any]:
    return {"quant_method": "awq", "bits": 4, "group_size": group_size, "version": "gemm", "zero_point": True} | fields


def of_gptq(bits: int, group_size: int, sym: bool, **fields: Any) -> dict[str, Any]:
    base = {"quant_method": "gptq", "bits": bits, "group_size": group_size, "sym": sym, "desc_act": False}
    return base | {"damp_percent": 0.1, "true_sequential": True} | fields


def of_pack_quantized(bits: int, group_size: int = -1, symmetric: bool = True, **fields: Any) -> dict[str, Any]:
    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, "dynamic": False, "observer": "minmax"}
    weights |= {"strategy": "channel" if group_size == -1 else "group", "group_size": group_size} | fields
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}},
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
    }


CASES: dict[str, tuple[Encoder, dict[str, Any]]] = {
    "awq": (partial(awq, group_size=32), of_awq(32)),
    "awq, the last group short": (partial(awq, group_size=128), of_awq(128)),
    "awq, a group a row": (partial(awq, group_size=-1), of_awq(-1)),
    "awq, symmetric": (partial(awq, group_size=64, symmetric=True), of_awq(64, zero_point=False)),
    "gptq, 2 bits": (partial(gptq, bits=2, group_size=32, symmetric=False), of_gptq(2, 32, False)),
    "gptq, 3 bits": (partial(gptq, bits=3, group_size=64, symmetric=False), of_gptq(3, 64, False)),
    "gptq, 3 bits, symmetric": (partial(gptq, bits=3, group_size=32, symmetric=True), of_gptq(3, 32, True)),
    "gptq, 4 bits": (partial(gptq, bits=4, group_size=32, symmetric=False), of_gptq(4, 32, False)),
    "gptq, 4 bits, symmetric": (
        partial(gptq, bits=4, group_size=128, symmetric=True),
        of_gptq(4, 128, True, checkpoint_format="gptq"),
    ),
    "gptq, 8 bits": (partial(gptq, bits=8, group_size=-1, symmetric=False), of_gptq(8, -1, False)),
    "gptq v2": (
        partial(gptq, bits=4, group_size=64, symmetric=False, version=2),
        of_gptq(4, 64, False, checkpoint_format="gptq_v2"),
    ),
    "gptq v2, 8 bits, symmetric": (
        partial(gptq, bits=8, group_size=32, symmetric=True, version=2),
        of_gptq(8, 32, True, checkpoint_format="gptq_v2"),
    ),
    "gptq, desc_act": (
        partial(gptq, bits=4, group_size=32, symmetric=True, desc_act=True),
        of_gptq(4, 32, True, desc_act=True),
    ),
    "gptq, 3 bits, desc_act, the last group short": (
        partial(gptq, bits=3, group_size=128, symmetric=False, desc_act=True),
        of_gptq(3, 128, False, desc_act=True),
    ),
    **{
        f"pack-quantized, {bits} bits": (partial(pack_quantized, bits=bits, group_size=32), of_pack_quantized(bits, 32))
        for bits in (2, 4, 8)
    },
    **{
        f"pack-quantized, {bits} bits, a group a row": (partial(pack_quantized, bits=bits), of_pack_quantized(bits))
        for bits in (3, 5, 6, 7)
    },
    "pack-quantized, 3 bits, padded": (partial(pack_quantized, bits=3, dense=False), of_pack_quantized(3)),
    "pack-quantized, 7 bits, padded": (partial(pack_quantized, bits=7, dense=False), of_pack_quantized(7)),
    "pack-quantized, 4 bits, asymmetric": (
        partial(pack_quantized, bits=4, group_size=64, symmetric=False),
        of_pack_quantized(4, 64, False),
    ),
    "pack-quantized, 3 bits, asymmetric": (
        partial(pack_quantized, bits=3, group_size=32, symmetric=False),
        of_pack_quantized(3, 32, False),
    ),
    "pack-quantized, 8 bits, asymmetric": (
        partial(pack_quantized, bits=8, symmetric=False),
        of_pack_quantized(8, -1, False),
    ),
    "pack-quantized, actorder": (
        partial(pack_quantized, bits=4, group_size=32, desc_act=True),
        of_pack_quantized(4, 32, actorder="group"),
    ),
}


def written(folder: Path, case: str, changes: dict[str, Tensor | None] | None = None) -> Path:
    """The quantized checkpoint of a case. changes: tensors that stand in for its own, None to leave one out."""
    state, _ = encoded(CASES[case][0])
    state |= {name: tensor for name, tensor in (changes or {}).items() if tensor is not None}
    left_out = {name for name, tensor in (changes or {}).items() if tensor is None}
    return write(folder, {name: tensor for name, tensor in state.items() if name not in left_out}, CASES[case][1])


def all_layers(model: CausalLM) -> list[LinearLayer]:
    return [layer for module in model.modules() if isinstance(module, Linear) for layer in module.layers]


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_the_dequantized_model(case: str, tmp_path: Path) -> None:
    _, plain = encoded(CASES[case][0])
    got = logits(load(written(tmp_path / "packed", case)))
    expected = logits(load(write(tmp_path / "plain", plain)))
    assert relative_error(got, expected) < 1e-5


def use_reference_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = SimpleNamespace(GROUPED_MAX_M=0, **vars(reference))
    monkeypatch.setattr("octavo.quantization.grouped.device_kernels", SimpleNamespace(get=lambda: kernels))
    monkeypatch.setattr("octavo.quantization.grouped.keeps_codes", lambda _: True)


@pytest.mark.parametrize("case", CASES)
def test_packed_as_on_a_gpu(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Codes are kept, and multiplied by the kernels' references."""
    _, plain = encoded(CASES[case][0])
    expected = logits(load(write(tmp_path / "plain", plain)))
    use_reference_kernels(monkeypatch)
    model = load(written(tmp_path / "packed", case))
    assert relative_error(logits(model), expected) < 1e-5
    packed = [
        layer for module in model.modules() if isinstance(module, Linear) for layer in module.layers if layer.held
    ]
    num_bytes = [(layer, sum(weight.packed.nbytes for weight in layer.held)) for layer in packed]
    num_bits = max(8 * size / (layer.in_features * layer.out_features) for layer, size in num_bytes)
    assert num_bits == packed[0].scheme.format.bits
    kept = sum(weight.num_bytes for layer in packed for weight in layer.held)
    assert model.weight_bytes > kept > 0
    rest = sum(4 * layer.in_features * layer.out_features for layer in all_layers(model) if layer.held is None)
    size = sum(layer.in_features * layer.out_features for layer in all_layers(model))
    assert model.linear_bits == pytest.approx(8 * (kept + rest) / size)


def num_weights(model: CausalLM) -> list[int]:
    """Of every layer that keeps codes: into how many weights its parts were put."""
    return [len(layer.held) for layer in all_layers(model) if layer.held is not None]


def test_scales_of_one_matrix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of 16 bits go together, and lose nothing; those of 32 bits lie beside them."""
    name = "model.layers.1.self_attn.k_proj.scales"
    scales = encoded(CASES["awq"][0])[0][name].float()
    folders = [
        written(tmp_path / str(number), "awq", {name: changed})
        for number, changed in enumerate(((scales * 0.7).bfloat16(), scales * 0.7123))
    ]
    expected = [logits(load(folder)) for folder in folders]
    use_reference_kernels(monkeypatch)
    models = [load(folder) for folder in folders]
    assert [relative_error(logits(model), of) < 1e-5 for model, of in zip(models, expected)] == [True, True]
    assert [max(num_weights(model)) for model in models] == [1, 3]


@pytest.mark.parametrize(("seed", "expected_weights"), [(0, 1), (1, 3)])
def test_parts_of_one_order_share_a_product(
    seed: int, expected_weights: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, case = "model.layers.1.self_attn.k_proj", "gptq, desc_act"
    tensors, _ = gptq(plain_tensors()[f"{name}.weight"], 4, 32, True, desc_act=True, seed=seed)
    folder = written(tmp_path, case, {f"{name}.{end}": tensor for end, tensor in tensors.items()})
    expected = logits(load(folder))
    use_reference_kernels(monkeypatch)
    model = load(folder)
    assert relative_error(logits(model), expected) < 1e-5
    assert max(num_weights(model)) == expected_weights
    assert min(num_weights(model)) == 1


@pytest.mark.parametrize("case", ["awq", "gptq, desc_act", "pack-quantized, 8 bits, asymmetric"])
def test_in_bfloat16(case: str, tmp_path: Path) -> None:
    _, plain = encoded(CASES[case][0])
    model = load(written(tmp_path / "packed", case), torch.bfloat16)
    got = logits(model)
    assert model.linear_bits == 16
    assert relative_error(got, logits(load(write(tmp_path / "plain", plain), torch.bfloat16))) < 1e-2


@pytest.mark.parametrize("case", CASES)
def test_dummies_have_weights_of_a_model(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("octavo.quantization.unquantized.can_pack", lambda *_: False)
    model = load(write(tmp_path, {}, CASES[case][1]), load_format="dummy")
    quantized = [layer.weight for layer in all_layers(model) if layer.out_features != model.config.vocab_size]
    for weight in quantized:
        assert weight is not None
        assert 0.017 < float(weight.std()) < 0.023
        assert abs(float(weight.mean())) < 0.01  # symmetric codes lie half a step below zero
    assert logits(model).isfinite().all()


@pytest.mark.parametrize("case", CASES)
def test_parts_share_a_layer(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_reference_kernels(monkeypatch)
    model = load(write(tmp_path, {}, CASES[case][1]), load_format="dummy")
    parts = [len(module.layers) for name, module in model.named_modules() if name.endswith("qkv_proj")]
    assert set(parts) == {1}
    assert set(num_weights(model)) <= {1}


def test_groups_in_order_need_no_order() -> None:
    """A g_idx that says k // group_size costs nothing, under desc_act too."""
    tensors, _ = gptq(torch.randn(32, 64), 4, 32, symmetric=True)
    assert Gptq(4, 32, True, True, 1).codes(64, 32, tensors).order is None
    tensors, _ = gptq(torch.randn(32, 64), 4, 32, symmetric=True, desc_act=True)
    assert Gptq(4, 32, True, True, 1).codes(64, 32, tensors).order is not None


@pytest.mark.parametrize(
    ("case", "name", "change", "message"),
    [
        ("awq", f"{Q_PROJ}.qzeros", None, r"missing: model.layers.0.self_attn.q_proj.qzeros"),
        ("awq", f"{Q_PROJ}.scales", torch.ones(5, 128), r"q_proj.scales has shape \[5, 128\], expected \[4, 128\]"),
        (
            "awq",
            f"{Q_PROJ}.qweight",
            torch.ones(128, 16),
            r"q_proj.qweight has dtype torch.float32, expected torch.int",
        ),
        ("awq, symmetric", f"{K_PROJ}.qzeros", torch.zeros(2, 8).int(), r"k_proj: qzeros holds a zero of 0.* 8"),
        ("gptq, 4 bits", f"{Q_PROJ}.qzeros", None, r"missing: model.layers.0.self_attn.q_proj.qzeros"),
        ("gptq, 4 bits", f"{Q_PROJ}.qzeros", torch.ones(5, 16).int(), r"q_proj.qzeros has shape \[5, 16\], expected"),
        ("gptq, 3 bits", f"{Q_PROJ}.qweight", torch.ones(16, 128).int(), r"\[16, 128\], expected \[12, 128\]"),
        ("gptq, 4 bits, symmetric", f"{K_PROJ}.qzeros", torch.zeros(1, 8).int(), r"k_proj: qzeros holds a zero of 1,"),
        ("gptq, 4 bits", f"{Q_PROJ}.g_idx", torch.arange(128).int() // 64, r"q_proj: g_idx puts column 32 into gr.* 0"),
        ("gptq, 4 bits", f"{Q_PROJ}.g_idx", torch.arange(127, -1, -1).int() // 32, r"q_proj: g_idx is not in order"),
        ("gptq, desc_act", f"{Q_PROJ}.g_idx", torch.full((128,), 9).int(), r"q_proj: g_idx puts column 0 into group 9"),
        ("gptq, desc_act", f"{Q_PROJ}.g_idx", None, r"missing: model.layers.0.self_attn.q_proj.g_idx"),
        ("gptq, 8 bits", f"{Q_PROJ}.bias", torch.ones(128), r"q_proj: bias is not zero"),
        ("pack-quantized, 3 bits, padded", f"{Q_PROJ}.weight_shape", torch.tensor([128, 127]), r"weight_shape is \[12"),
        ("pack-quantized, 4 bits", f"{Q_PROJ}.weight_scale", torch.ones(128, 2), r"weight_scale has shape \[128, 2\]"),
        ("pack-quantized, 4 bits, asymmetric", f"{Q_PROJ}.weight_zero_point", None, r"missing: .*weight_zero_point"),
        ("pack-quantized, actorder", f"{Q_PROJ}.weight_g_idx", torch.zeros(128).int(), r"q_proj: g_idx puts column 32"),
        ("pack-quantized, 4 bits", f"{Q_PROJ}.weight_packed", torch.ones(128, 17).int(), r"shape \[128, 17\], expec"),
    ],
)
def test_corrupt_tensors(case: str, name: str, change: Tensor | None, message: str, tmp_path: Path) -> None:
    folder = written(tmp_path, case, {name: change})
    with pytest.raises(ValueError, match=message) as caught:
        load(folder)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    ("case", "config", "tensor"),
    [
        ("awq", of_awq(64), "qzeros"),
        ("gptq, 4 bits", of_gptq(4, 64, False), "qzeros"),
        ("pack-quantized, 4 bits", of_pack_quantized(4, 64), "weight_scale"),
    ],
)
def test_another_group_size_in_the_config(case: str, config: dict[str, Any], tensor: str, tmp_path: Path) -> None:
    write(tmp_path, encoded(CASES[case][0])[0], config)
    with pytest.raises(ValueError, match=rf"wrong: .*{tensor} has shape \["):
        load(tmp_path)


@pytest.mark.parametrize("case", ["awq", "gptq, 4 bits", "pack-quantized, 4 bits"])
def test_a_truncated_file(case: str, tmp_path: Path) -> None:
    file = written(tmp_path, case) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        load(tmp_path)


def test_a_bias_of_zeros_is_that_of_a_layer_without_one(tmp_path: Path) -> None:
    case = "gptq, 4 bits"
    names = [name for name in encoded(CASES[case][0])[0] if name.endswith("qweight")]
    biases: dict[str, Tensor | None] = {
        name.replace("qweight", "bias"): torch.zeros(encoded(CASES[case][0])[0][name].shape[1]) for name in names
    }
    with_biases = logits(load(written(tmp_path / "biases", case, biases)))
    assert torch.equal(with_biases, logits(load(written(tmp_path / "none", case))))


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("size", [1, 31, 32, 100])
def test_streams_of_every_width(bits: int, size: int) -> None:
    values = torch.randint(0, 1 << bits, (3, size), generator=torch.Generator().manual_seed(bits), dtype=torch.uint8)
    assert torch.equal(unpack_bits(stream(values, bits), bits, size), values)
    assert torch.equal(unpack_bits(stream(values, bits).T.contiguous().T, bits, size), values)
    assert torch.equal(unpack_padded(padded(values, bits), bits, size), values)
