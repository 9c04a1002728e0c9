"""GGUF files: the header, the config made of it, and every tensor type, against the gguf package."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import gguf
import gguf.quants
import numpy as np
import pytest
import torch

from octavo.loading.dequantize import dequantize, num_bytes
from octavo.loading.gguf_config import config_of, generation_config_of
from octavo.loading.gguf_file import GgufFile, GgufTensor, read_gguf
from octavo.loading.gguf_names import checkpoint_name
from octavo.loading.gguf_weights import gguf_weights, streamed_gguf_weights

Type = gguf.GGMLQuantizationType
SHAPE = (24, 512)
WRITTEN = [Type.F32, Type.F16, Type.BF16, Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q5_1, Type.Q8_0]
# Both ways that tensors come out of a file.
READERS = [
    lambda file: dict(gguf_weights(file, torch.float32)),
    lambda file: dict(streamed_gguf_weights(file, torch.float32, torch.device("cpu"), ())),
]
RAW = [Type.Q2_K, Type.Q3_K, Type.Q4_K, Type.Q5_K, Type.Q6_K, Type.IQ4_NL, Type.IQ4_XS]


def write(path: Path, tensors: dict[str, tuple[np.ndarray, Any]], arch: str = "qwen2", **values: Any) -> Path:
    """values: metadata by key, "__" for a dot, the architecture's prefix left out."""
    writer = gguf.GGUFWriter(path, arch)
    for key, value in values.items():
        name = f"{arch}.{key.replace('__', '.')}"
        add = writer.add_float32 if isinstance(value, float) else writer.add_uint32
        (writer.add_string if isinstance(value, str) else add)(name, value)
    writer.add_token_list(["a", "bc", "ü"])
    writer.add_token_types([1, 1, 3])
    for name, (data, kind) in tensors.items():
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def random_blocks(kind: Any) -> np.ndarray:
    """Random bytes, as many as SHAPE takes; its float16 scales are made finite by clearing an exponent bit."""
    size, block_bytes = num_bytes(SHAPE, kind), gguf.GGML_QUANT_SIZES[kind][1]
    raw = np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8).reshape(-1, block_bytes)
    return (raw & 0xBF).reshape(SHAPE[0], -1)


@pytest.mark.parametrize("kind", WRITTEN, ids=lambda kind: kind.name)
def test_written_types(kind: Any, tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)
    data = gguf.quants.quantize(values, kind)
    path = write(tmp_path / "m.gguf", {"output.weight": (data, kind), "other.weight": (values, Type.F32)})
    expected = torch.from_numpy(np.array(gguf.quants.dequantize(data, kind)))
    for dtype in (torch.float32, torch.bfloat16):
        read = dict(gguf_weights(read_gguf(path), dtype))
        assert list(read) == ["lm_head.weight", "other.weight"]
        assert torch.equal(read["lm_head.weight"], expected.to(dtype))
    assert (expected - torch.from_numpy(values)).abs().max() < 0.5


@pytest.mark.parametrize("kind", [*RAW, Type.Q4_0, Type.Q4_1, Type.Q8_0], ids=lambda kind: kind.name)
def test_random_blocks(kind: Any) -> None:
    data = random_blocks(kind)
    expected = torch.from_numpy(gguf.quants.dequantize(data, kind))
    assert expected.isfinite().all()
    read = dequantize(torch.from_numpy(data.reshape(-1)), SHAPE, kind.value, torch.float32)
    assert torch.equal(read, expected)


def test_long_tensors_are_unpacked_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("octavo.loading.dequantize._CHUNK", 7)
    test_random_blocks(Type.Q4_1)


def test_types_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="ggml type 999 is not known"):
        num_bytes((32,), 999)
    with pytest.raises(ValueError, match="rows of 33 are not whole blocks of 32"):
        num_bytes((2, 33), Type.Q4_0)
    with pytest.raises(ValueError, match="Q8_K cannot be dequantized"):
        dequantize(torch.zeros(num_bytes((256,), Type.Q8_K), dtype=torch.uint8), (256,), Type.Q8_K, torch.float32)


def test_header(tmp_path: Path) -> None:
    data = np.arange(6, dtype=np.float32).reshape(2, 3)
    path = write(tmp_path / "m.gguf", {"a": (data, Type.F32), "b": (data, Type.F32)}, block_count=3)
    file = read_gguf(path)
    assert file.metadata["general.architecture"] == "qwen2"
    assert file.metadata["qwen2.block_count"] == 3
    assert file.metadata["tokenizer.ggml.token_type"] == [1, 1, 3]
    assert "tokenizer.ggml.tokens" not in file.metadata
    reader = gguf.GGUFReader(path)
    assert {t.name: t.data_offset for t in reader.tensors} == {n: t.offset for n, t in file.tensors.items()}
    assert {t.shape for t in file.tensors.values()} == {(2, 3)}


def test_a_file_cut_anywhere_is_named(tmp_path: Path) -> None:
    data = np.ones((2, 3), dtype=np.float32)
    written = write(tmp_path / "m.gguf", {"a": (data, Type.F32)}, block_count=3)
    whole, path = written.read_bytes(), tmp_path / "cut.gguf"
    for size in range(0, read_gguf(written).tensors["a"].offset + data.nbytes, 7):  # padding follows
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=re.escape(str(path))):
            dict(gguf_weights(read_gguf(path), torch.float32))
    path.write_bytes(whole)
    assert len(dict(gguf_weights(read_gguf(path), torch.float32))) == 1


@pytest.mark.parametrize("read", READERS)
def test_a_cut_tensor_is_named(read: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", {"a": (np.ones((64, 64), np.float32), Type.F32)})
    path.write_bytes(path.read_bytes()[:-64])
    with pytest.raises(ValueError, match=r"m\.gguf: tensor a: the file ends at byte \d+, inside it"):
        read(read_gguf(path))


@pytest.mark.parametrize("read", READERS)
def test_rows_that_are_not_heads(read: Any, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    write(path, {"blk.0.attn_q.weight": (np.ones((6, 4), np.float32), Type.F32)}, "llama", attention__head_count=2)
    with pytest.raises(ValueError, match=r"blk.0.attn_q.weight: its 6 rows are not 2 heads of pairs"):
        read(read_gguf(path))


@pytest.mark.parametrize("read", READERS)
def test_an_unaligned_tensor_is_named(read: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", {"a": (np.ones((8, 8), np.float32), Type.F32)})
    file = read_gguf(path)
    moved = GgufFile(path, file.metadata, {"a": GgufTensor((7, 8), 0, file.tensors["a"].offset + 3)})
    with pytest.raises(ValueError, match=r"tensor a: its offset .* is no multiple of 8"):
        read(moved)


@pytest.mark.parametrize("start", [b"GGML", b"GGUF\x09\0\0\0"])
def test_another_format_or_version(start: bytes, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(start + bytes(100))
    with pytest.raises(ValueError, match=r"letters GGUF|version is 9"):
        read_gguf(path)


def described(arch: str = "llama", tensors: tuple[str, ...] = (), **values: Any) -> GgufFile:
    metadata = {
        "general.architecture": arch,
        f"{arch}.block_count": 2,
        f"{arch}.context_length": 64,
        f"{arch}.embedding_length": 16,
        f"{arch}.feed_forward_length": 24,
        f"{arch}.attention.head_count": 4,
        f"{arch}.attention.layer_norm_rms_epsilon": 1e-5,
    }
    metadata |= {key.replace("__", "."): value for key, value in values.items()}
    names = ("token_embd.weight", *tensors)
    return GgufFile(Path("m.gguf"), metadata, {name: GgufTensor((32, 16), 0, 0) for name in names})


def test_config() -> None:
    config = config_of(described())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert (config["vocab_size"], config["head_dim"], config["num_key_value_heads"]) == (32, 4, 4)
    assert config["rope_parameters"] == {"rope_type": "default", "rope_theta": 10000.0}
    assert config["tie_word_embeddings"] is True
    assert config_of(described(tensors=("output.weight",)))["tie_word_embeddings"] is False
    windowed = config_of(described(llama__attention__sliding_window=8))
    assert (windowed["architectures"], windowed["sliding_window"]) == (["MistralForCausalLM"], 8)
    yarn = described(llama__rope__scaling__type="yarn", llama__rope__scaling__factor=4.0)
    assert config_of(yarn)["rope_parameters"] == {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0}
    assert config_of(described("qwen3", qwen3__attention__key_length=128))["head_dim"] == 128


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"general__architecture": "mamba"}, "m.gguf: general.architecture='mamba'.*llama, qwen2, qwen3"),
        ({"llama__rope__dimension_count": 2}, "llama.rope.dimension_count=2.*4"),
        ({"llama__embedding_length": None}, "llama.embedding_length is missing"),
        ({"split__count": 3}, "split.count=3"),
        ({"llama__attention__head_count": [4, 2]}, r"llama.attention.head_count=\[4, 2\].*an integer"),
    ],
)
def test_config_refused(values: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        config_of(described(**values))


def test_generation_config() -> None:
    ids = {f"tokenizer__ggml__{name}_token_id": i for i, name in enumerate(("bos", "eos", "eot"))}
    assert generation_config_of(described(**ids)) == {"bos_token_id": 0, "eos_token_id": [1, 2]}
    assert generation_config_of(described()) == {}


def test_names() -> None:
    assert checkpoint_name("blk.12.ffn_down.weight") == "model.layers.12.mlp.down_proj.weight"
    assert checkpoint_name("blk.0.attn_q.bias") == "model.layers.0.self_attn.q_proj.bias"
    assert checkpoint_name("output.weight") == "lm_head.weight"
    assert checkpoint_name("blk.0.ssm_a") == "blk.0.ssm_a"
    assert checkpoint_name("blk.0.ssm_a.weight") == "blk.0.ssm_a.weight"
