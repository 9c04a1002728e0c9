"""Checkpoints of bitsandbytes, packed here from the description of its formats, and weights packed while loading.

benchmarks/quantization/compare_bitsandbytes.py compares the encoders of this file with the package itself.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from bitsandbytes_encoders import double_quantized, four_bit, int8_rows, nf4_codes
from quantized_checkpoints import encoded, load, logits, plain_tensors, relative_error, write
from torch import Tensor

from octavo.config import DeviceFacts, EngineOptions, ModelFacts, resolve
from octavo.kernels.reference import grouped_gemm as grouped_reference
from octavo.loading.source import resolve_source
from octavo.quantization import four_bit as implementation
from octavo.quantization.bitsandbytes import StoredFourBit, bitsandbytes
from octavo.quantization.four_bit import NF4, FourBitScheme, OnlineNf4, quantize_nf4
from octavo.quantization.scheme import LinearLayer
from octavo.quantization.unquantized import UNQUANTIZED

K_PROJ = "model.layers.1.self_attn.k_proj"
NF4_CONFIG: dict[str, Any] = {
    "quant_method": "bitsandbytes",
    "_load_in_4bit": True,
    "_load_in_8bit": False,
    "load_in_4bit": True,
    "load_in_8bit": False,
    "bnb_4bit_compute_dtype": "bfloat16",
    "bnb_4bit_quant_storage": "uint8",
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": False,
    "llm_int8_enable_fp32_cpu_offload": False,
    "llm_int8_has_fp16_weight": False,
    "llm_int8_skip_modules": None,
    "llm_int8_threshold": 6.0,
}
DOUBLE_CONFIG = NF4_CONFIG | {"bnb_4bit_use_double_quant": True}
FP4_CONFIG = NF4_CONFIG | {"bnb_4bit_quant_type": "fp4"}
INT8_CONFIG = {"quant_method": "bitsandbytes", "load_in_8bit": True, "llm_int8_threshold": 6.0}
ENCODE_NF4 = partial(four_bit, table="nf4")
ENCODE_DOUBLE = partial(double_quantized, table="nf4")
CASES = {
    "nf4": (NF4_CONFIG, ENCODE_NF4),
    "nf4, blocks of 128": (NF4_CONFIG, partial(four_bit, table="nf4", block_size=128)),
    "nf4, blocks across rows": (NF4_CONFIG, partial(four_bit, table="nf4", block_size=4096)),
    "nf4, double": (DOUBLE_CONFIG, ENCODE_DOUBLE),
    "fp4": (FP4_CONFIG, partial(four_bit, table="fp4")),
    "int8": (INT8_CONFIG, int8_rows),
}


@pytest.mark.parametrize("case", CASES)
def test_a_checkpoint_is_what_it_stands_for(case: str, tmp_path: Path) -> None:
    config, encode = CASES[case]
    state, plain = encoded(encode)
    expected = logits(load(write(tmp_path / "plain", plain)))
    assert relative_error(logits(load(write(tmp_path / "packed", state, config))), expected) < 1e-5
    lossless = logits(load(write(tmp_path / "lossless", plain_tensors())))
    assert relative_error(expected, lossless) < 0.4, "the encoder of this test is wrong"
    half = logits(load(tmp_path / "packed", torch.bfloat16))
    assert relative_error(half, logits(load(tmp_path / "plain", torch.bfloat16))) < 1e-2


def test_modules_that_are_skipped(tmp_path: Path) -> None:
    state, plain = encoded(ENCODE_NF4, ("layers.0.mlp", "v_proj"))
    config = NF4_CONFIG | {"llm_int8_skip_modules": ["lm_head", "model.layers.0.mlp", "v_proj"]}
    expected = logits(load(write(tmp_path / "plain", plain)))
    assert relative_error(logits(load(write(tmp_path / "packed", state, config))), expected) < 1e-5


def test_codes_are_the_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(6, 96, generator=torch.Generator().manual_seed(5)).bfloat16()
    weight[0, :64] = 0
    codes, absmax = nf4_codes(weight)
    for chunk in (1 << 20, 64):
        monkeypatch.setattr(implementation, "_CHUNK_ELEMENTS", chunk)
        packed = quantize_nf4(weight, 64)
        assert torch.equal(torch.stack((packed.packed >> 4, packed.packed & 15), -1).flatten(), codes)
        assert torch.equal(packed.absmax, absmax)


def test_packed_while_loaded(tmp_path: Path) -> None:
    _, plain = encoded(ENCODE_NF4)
    expected = logits(load(write(tmp_path / "plain", plain)))
    got = logits(load(write(tmp_path / "given", plain_tensors()), option="bitsandbytes"))
    assert relative_error(got, expected) < 1e-5


def test_load_format_implies_the_method(tmp_path: Path) -> None:
    source = resolve_source(str(write(tmp_path, plain_tensors())), load_format="bitsandbytes")
    assert source.format == "safetensors"
    facts = ModelFacts(max_position_embeddings=64, vocab_size=64, num_layers=2, num_kv_heads=2, head_dim=32)

    def resolved(**options: Any) -> Any:
        return resolve(EngineOptions(**options), facts, DeviceFacts(kind="cpu", num_threads=1)).quantization

    assert resolved(load_format="bitsandbytes") == "bitsandbytes"
    assert resolved(load_format="bitsandbytes", quantization="bitsandbytes") == "bitsandbytes"
    assert resolved(quantization="fp8") == "fp8"
    assert resolved() is None
    with pytest.raises(ValueError, match="quantization=fp8 is refused with load_format=bitsandbytes"):
        resolved(load_format="bitsandbytes", quantization="fp8")
    (tmp_path / "x.gguf").touch()
    with pytest.raises(ValueError, match="is no folder of safetensors"):
        resolve_source(str(tmp_path / "x.gguf"), load_format="bitsandbytes")


def layer_of(in_features: int, rows: dict[int, Tensor]) -> LinearLayer:
    """Loaded as on a device that keeps codes."""
    scheme = FourBitScheme(StoredFourBit("nf4", False))
    layer = LinearLayer(scheme, in_features, sum(map(len, rows.values())), False, torch.float32, torch.device("cpu"))
    for row, weight in rows.items():
        scheme.load(layer, row, len(weight), four_bit(weight, table="nf4")[0])
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(implementation, "keeps_codes", lambda _: True)
        scheme.finish(layer)
    return layer


def test_on_a_gpu_it_stays_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(2)
    rows = {4: torch.randn(8, 128, generator=generator), 0: torch.randn(4, 128, generator=generator)}
    plain = torch.cat([four_bit(rows[row], table="nf4")[1] for row in (0, 4)])
    layer = layer_of(128, rows)
    assert layer.weight is None
    assert layer.scheme.num_bytes(layer) == 12 * 64 + 12 * 2 * 4 + 16 * 4
    kernels = SimpleNamespace(GROUPED_MAX_M=0, **vars(grouped_reference))
    monkeypatch.setattr("octavo.quantization.grouped.device_kernels", SimpleNamespace(get=lambda: kernels))
    x = torch.randn(3, 128, generator=generator)
    torch.testing.assert_close(layer.scheme.apply(layer, x), x @ plain.T)


def test_blocks_across_rows_are_dequantized() -> None:
    weight = torch.randn(4, 96, generator=torch.Generator().manual_seed(2))
    layer = layer_of(96, {0: weight})
    assert layer.held is None
    x = torch.eye(96)
    torch.testing.assert_close(UNQUANTIZED.apply(layer, x), four_bit(weight, table="nf4")[1].T)


def test_odd_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="3 x 5 elements has no 4-bit format"):
        NF4.tensors(5, 3)
    assert FourBitScheme(OnlineNf4()) == NF4


def state_bytes(**fields: Any) -> Tensor:
    full = {"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [64, 128]} | fields
    return torch.tensor(list(json.dumps(full).encode()), dtype=torch.uint8)


STATE = "weight.quant_state.bitsandbytes__nf4"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"weight.absmax": None}, f"missing: {K_PROJ}.weight.absmax"),
        ({STATE: None}, f"missing: {K_PROJ}.{STATE}"),
        ({"weight": torch.ones(5, 1, dtype=torch.uint8)}, rf"{K_PROJ}.weight has shape \[5, 1\], expected \[4096, 1\]"),
        ({"weight": torch.ones(4096, 1)}, f"{K_PROJ}.weight has dtype torch.float32, expected torch.uint8"),
        ({"weight.absmax": torch.ones(127)}, f"{K_PROJ}: absmax has 127 numbers, expected 128"),
        ({"weight.absmax": torch.full((128,), torch.nan)}, f"{K_PROJ}: absmax holds nan"),
        ({"weight.quant_map": torch.zeros(16)}, f"{K_PROJ}: quant_map is not the table of nf4"),
        ({STATE: state_bytes(blocksize=128)}, f"{K_PROJ}: absmax has 128 numbers, expected 64 of blocks of 128"),
        ({STATE: state_bytes(blocksize=100)}, f"{K_PROJ}: quant_state says blocksize=100; allowed: 32, 64"),
        ({STATE: state_bytes(shape=[128, 64])}, rf"{K_PROJ}: quant_state says shape=\[128, 64\], expected \[64, 128\]"),
        ({STATE: state_bytes(quant_type="fp4")}, f"{K_PROJ}: quant_state says quant_type='fp4', expected 'nf4'"),
        ({STATE: torch.zeros(9, dtype=torch.uint8)}, f"{K_PROJ}: quant_state is not readable: JSONDecodeError"),
        ({STATE: state_bytes()[:-30]}, f"{K_PROJ}: quant_state is not readable"),
        ({"weight.nested_absmax": torch.ones(1)}, f"not expected: {K_PROJ}.weight.nested_absmax"),
    ],
)
def test_what_cannot_be_is_named(change: dict[str, Tensor | None], said: str, tmp_path: Path) -> None:
    state, _ = encoded(ENCODE_NF4)
    state |= {f"{K_PROJ}.{end}": tensor for end, tensor in change.items()}
    folder = write(tmp_path, {name: tensor for name, tensor in state.items() if tensor is not None}, NF4_CONFIG)
    with pytest.raises(ValueError, match=said) as caught:
        load(folder)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"weight.nested_absmax": torch.ones(3)}, f"{K_PROJ}: nested_absmax has 3 numbers, expected 1"),
        ({"weight.nested_absmax": torch.full((1,), torch.inf)}, f"{K_PROJ}: absmax holds (nan|-?inf)"),
        ({"weight.absmax": torch.ones(128)}, f"{K_PROJ}.weight.absmax has dtype torch.float32, expected torch.uint8"),
        ({STATE: state_bytes()}, f"{K_PROJ}: quant_state is not readable: KeyError: 'nested_offset'"),
    ],
)
def test_nested_scales_that_cannot_be_are_named(change: dict[str, Tensor], said: str, tmp_path: Path) -> None:
    state, _ = encoded(ENCODE_DOUBLE)
    state |= {f"{K_PROJ}.{end}": tensor for end, tensor in change.items()}
    with pytest.raises(ValueError, match=said):
        load(write(tmp_path, state, DOUBLE_CONFIG))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"SCB": torch.full((64,), torch.nan)}, f"{K_PROJ}: SCB holds nan"),
        ({"SCB": torch.ones(63)}, rf"{K_PROJ}.SCB has shape \[63\], expected \[64\]"),
        ({"weight_format": torch.tensor(2, dtype=torch.uint8)}, f"{K_PROJ}: weight_format is 2, expected 0"),
        ({"weight": torch.ones(64, 128)}, f"{K_PROJ}.weight has dtype torch.float32, expected torch.int8"),
    ],
)
def test_integers_that_cannot_be_are_named(change: dict[str, Tensor], said: str, tmp_path: Path) -> None:
    state, _ = encoded(int8_rows)
    state |= {f"{K_PROJ}.{end}": tensor for end, tensor in change.items()}
    with pytest.raises(ValueError, match=said):
        load(write(tmp_path, state, INT8_CONFIG))


def test_a_truncated_file_is_named(tmp_path: Path) -> None:
    file = write(tmp_path, encoded(ENCODE_NF4)[0], NF4_CONFIG) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match=f"{file} is not a readable safetensors file"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"load_in_8bit": True}, "load_in_4bit=True is not supported; allowed: true, where load_in_8bit is not"),
        ({"bnb_4bit_quant_type": "int4"}, "bnb_4bit_quant_type='int4' is not supported; allowed: nf4, fp4"),
        ({"bnb_4bit_quant_storage": "bfloat16"}, "bnb_4bit_quant_storage='bfloat16' .*; allowed: uint8"),
        ({"bnb_4bit_use_double_quant": "yes"}, "bnb_4bit_use_double_quant='yes'"),
        ({"llm_int8_has_fp16_weight": True}, "llm_int8_has_fp16_weight=True is not supported; allowed: False"),
        ({"llm_int8_skip_modules": "lm_head"}, "llm_int8_skip_modules='lm_head' .*allowed: a list of strings"),
        ({"bits": 4}, "quantization_config.bits=4 is not supported"),
    ],
)
def test_fields_that_are_not_supported_are_named(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        bitsandbytes(NF4_CONFIG | fields)


@pytest.mark.parametrize("config", [NF4_CONFIG, DOUBLE_CONFIG, FP4_CONFIG, INT8_CONFIG])
def test_dummy_weights(config: dict[str, Any], tmp_path: Path) -> None:
    model = load(write(tmp_path, {"x": torch.ones(1)}, config), load_format="dummy")
    assert logits(model).isfinite().all()
    weight = model.model.layers[0].mlp.down_proj(torch.eye(320))
    assert 0.01 < weight.std() < 0.03
