"""GGUF's blocks as codes, against the gguf package; and models that keep them, against the same ones dequantized."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import gguf
import gguf.quants
import numpy as np
import pytest
import torch
from torch import Tensor

from octavo.kernels.reference import grouped_gemm as reference
from octavo.loading.dequantize import dequantize as dequantize_tensor
from octavo.loading.dequantize import dequantize_by_codes
from octavo.loading.gguf_file import read_gguf
from octavo.loading.gguf_names import checkpoint_name
from octavo.loading.gguf_weights import gguf_weights, streamed_gguf_weights
from octavo.loading.source import resolve_source
from octavo.loading.weights import load_model
from octavo.models.base import CausalLM
from octavo.models.registry import build_model
from octavo.quantization.gguf import PACKED_TYPES, GgufFormat
from octavo.quantization.grouped import GroupedScheme, plain_weight
from octavo.quantization.registry import method_of
from octavo.quantization.scheme import LinearLayer
from octavo.quantization.unquantized import UNQUANTIZED

Type = gguf.GGMLQuantizationType
CPU = torch.device("cpu")
KINDS = [Type(kind) for kind in sorted(PACKED_TYPES)]
ROWS, COLUMNS = 8, 512


def random_rows(kind: Type, rows: int = ROWS, columns: int = COLUMNS, seed: int = 0) -> Tensor:
    """uint8 [rows, bytes of a row]: random, but for scales of which weights of about 0.02 come."""
    spec = GgufFormat(kind.value).tensors(columns, rows)["weight"]
    raw = spec.make_dummy(torch.Generator().manual_seed(seed))
    assert spec.problem("weight", raw) is None
    return raw


def by_package(raw: Tensor, kind: Type) -> Tensor:
    return torch.from_numpy(np.array(gguf.quants.dequantize(raw.numpy(), kind)))


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_codes_are_what_the_package_reads(kind: Type) -> None:
    raw, layout = random_rows(kind), GgufFormat(kind.value)
    expected = by_package(raw, kind)
    assert 0.015 < expected.std() < 0.025
    codes = layout.codes(COLUMNS, ROWS, {"weight": raw})
    assert int(codes.code.max()) < 1 << layout.bits
    plain = plain_weight(codes, layout.bits, layout.group_size)
    if kind in (Type.Q5_1, Type.Q5_K):  # their minimum is moved along with their codes, and rounded once more
        torch.testing.assert_close(plain, expected, rtol=0, atol=1e-7)
    else:
        assert torch.equal(plain, expected)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_what_is_kept_stands_for_the_same(kind: Type, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where parts of one type lie in one layer, in the order of their rows."""
    monkeypatch.setattr("octavo.quantization.grouped.keeps_codes", lambda _: True)
    scheme = GroupedScheme(GgufFormat(kind.value))
    layer = LinearLayer(scheme, COLUMNS, 2 * ROWS, False, torch.float32, CPU)
    first, second = random_rows(kind), random_rows(kind, seed=1)
    scheme.load(layer, ROWS, ROWS, {"weight": second})
    scheme.load(layer, 0, ROWS, {"weight": first})
    scheme.finish(layer)
    expected = torch.cat([by_package(first, kind), by_package(second, kind)])
    (held,) = layer.held
    got = reference.dequantize_grouped(*held[:5], torch.float32)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-7)
    bits_a_weight = 8 * scheme.num_bytes(layer) / expected.numel()
    assert bits_a_weight <= GgufFormat(kind.value).bits + 2


def test_a_number_that_is_none_is_refused() -> None:
    raw = random_rows(Type.Q4_K)
    raw[3, 2:4] = torch.tensor([math.inf], dtype=torch.float16).view(torch.uint8)
    with pytest.raises(ValueError, match="a scale of its Q4_K blocks is not finite"):
        GgufFormat(Type.Q4_K.value).codes(COLUMNS, ROWS, {"weight": raw})
    with pytest.raises(ValueError, match="rows of 320 are not whole blocks of 256"):
        GgufFormat(Type.Q4_K.value).tensors(320, 8)


@pytest.mark.parametrize("kind", [Type.Q4_1, Type.Q6_K, Type.IQ4_NL], ids=lambda kind: kind.name)
def test_tables_are_dequantized_on_a_gpu(kind: Type, monkeypatch: pytest.MonkeyPatch) -> None:
    """Piece by piece, to what a CPU makes of them."""
    monkeypatch.setattr("octavo.loading.dequantize._DEVICE_CHUNK", 3 * COLUMNS)
    raw = random_rows(kind) if kind.value in PACKED_TYPES else random_rows(Type.Q4_0)
    shape = ROWS, COLUMNS
    expected = dequantize_tensor(raw.view(-1), shape, kind.value, torch.bfloat16)
    assert torch.equal(dequantize_by_codes(raw.view(-1), shape, kind.value, torch.bfloat16), expected)


TYPES = {
    "attn_q": Type.Q4_K,
    "attn_k": Type.Q4_K,
    "attn_v": Type.Q6_K,
    "attn_output": Type.Q5_0,
    "ffn_gate": Type.Q4_0,
    "ffn_up": Type.Q4_1,
    "ffn_down": Type.Q8_0,
    "output": Type.Q6_K,
}


def write_mixed(path: Path, arch: str = "llama", **changed: Type) -> Path:
    """A model of two blocks, whose tensors are of many types."""
    writer, hidden, inner, vocab = gguf.GGUFWriter(path, arch), 256, 512, 64
    for key, value in {
        "block_count": 2,
        "context_length": 64,
        "embedding_length": hidden,
        "feed_forward_length": inner,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
    }.items():
        writer.add_uint32(f"{arch}.{key}", value)
    writer.add_layer_norm_rms_eps(1e-5)
    shapes = {"token_embd": (vocab, hidden), "output_norm": (hidden,), "output": (vocab, hidden)}
    for block in range(2):
        rows = {"attn_q": hidden, "attn_k": 128, "attn_v": 128, "attn_output": hidden}
        shapes |= {f"blk.{block}.{part}": (count, hidden) for part, count in rows.items()}
        shapes |= {f"blk.{block}.{part}": (inner, hidden) for part in ("ffn_gate", "ffn_up")}
        shapes |= {f"blk.{block}.ffn_down": (hidden, inner)}
        shapes |= {f"blk.{block}.{norm}": (hidden,) for norm in ("attn_norm", "ffn_norm")}
        shapes |= {f"blk.{block}.attn_q.bias": (hidden,)} if arch == "qwen2" else {}
        shapes |= {f"blk.{block}.attn_{part}.bias": (128,) for part in "kv"} if arch == "qwen2" else {}
    for seed, (name, shape) in enumerate(shapes.items()):
        kind = (TYPES | changed).get(name.rpartition(".")[2], Type.F32)
        suffix = "" if name.endswith("bias") else ".weight"
        if kind.value in PACKED_TYPES:
            data = random_rows(kind, *shape, seed=seed).numpy()
        else:
            values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * (0.02 if len(shape) > 1 else 1)
            data = gguf.quants.quantize(values.numpy(), kind)
        writer.add_tensor(name + suffix, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


class Nothing:
    """Attention that hands back its values, and what it was asked."""

    def forward(self, _layer: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return query + torch.cat([key + value] * (query.shape[1] // key.shape[1]), 1)


@torch.inference_mode()
def logits(model: CausalLM) -> Tensor:
    ids = torch.arange(10)
    return model.compute_logits(model(ids, ids, Nothing()))


def packed(path: Path) -> CausalLM:
    """As a GPU loads it."""
    source = resolve_source(str(path))
    model = build_model(source.config, torch.float32, CPU, "gguf")
    names = {name for name, slot in model.weight_slots().items() if torch.uint8 in slot.spec.dtypes}
    model.load_weights(streamed_gguf_weights(read_gguf(path), torch.float32, CPU, names))
    return model


@pytest.mark.parametrize("arch", ["llama", "qwen2"])
def test_a_model_of_many_types(arch: str, tmp_path: Path) -> None:
    path = write_mixed(tmp_path / "m.gguf", arch)
    kept, plain = packed(path), load_model(resolve_source(str(path)), torch.float32, CPU, seed=0)
    schemes = [layer.scheme for layer in kept.model.layers[0].self_attn.qkv_proj.layers]
    assert schemes == [GroupedScheme(GgufFormat(kind)) for kind in (Type.Q4_K, Type.Q6_K)]  # q and k in one
    torch.testing.assert_close(logits(kept), logits(plain), rtol=1e-5, atol=1e-5)


def test_types_that_are_not_kept_are_dequantized(tmp_path: Path) -> None:
    path = write_mixed(tmp_path / "m.gguf", attn_output=Type.F16, ffn_up=Type.BF16)
    kept = packed(path)
    assert [layer.scheme for layer in kept.model.layers[0].self_attn.o_proj.layers] == [UNQUANTIZED]
    torch.testing.assert_close(
        logits(kept), logits(load_model(resolve_source(str(path)), torch.float32, CPU, seed=0)), rtol=1e-5, atol=1e-5
    )


def test_streamed_tensors_are_the_same_ones(tmp_path: Path) -> None:
    file = read_gguf(write_mixed(tmp_path / "m.gguf"))
    mapped = dict(gguf_weights(file, torch.bfloat16))
    streamed = dict(streamed_gguf_weights(file, torch.bfloat16, CPU, ()))
    assert streamed.keys() == mapped.keys() == {checkpoint_name(name) for name in file.tensors}
    assert all(torch.equal(streamed[name], mapped[name]) for name in mapped)


def test_dummy_weights_of_a_gguf_file(tmp_path: Path) -> None:
    source = resolve_source(str(write_mixed(tmp_path / "m.gguf")), load_format="dummy")
    assert logits(load_model(source, torch.float32, CPU, seed=0)).isfinite().all()


def test_a_bad_block_is_named(tmp_path: Path) -> None:
    path = write_mixed(tmp_path / "m.gguf")
    tensor = read_gguf(path).tensors["blk.1.ffn_gate.weight"]
    raw = bytearray(path.read_bytes())
    raw[tensor.offset : tensor.offset + 2] = b"\x00\x7e"  # NaN
    path.write_bytes(raw)
    with pytest.raises(ValueError, match=r"layers.1.mlp.gate_proj: a scale of its Q4_0 blocks is not finite"):
        packed(path)


def test_the_option_and_the_file_agree(tmp_path: Path) -> None:
    source = resolve_source(str(write_mixed(tmp_path / "m.gguf")))
    for option in (None, "gguf", "fp8"):  # fp8: made of dequantized weights
        load_model(source, torch.float32, CPU, 0, option)
    with pytest.raises(ValueError, match="quantization='gguf', and the checkpoint has no quantization_config"):
        method_of("gguf", None)
    with pytest.raises(ValueError, match=r"quant_method='gguf' is not supported outside a \.gguf file"):
        method_of(None, {"quant_method": "gguf"})
