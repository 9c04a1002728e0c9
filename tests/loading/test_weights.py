"""Filling a model: what fits, and what is refused by the names of file and tensor."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import CONFIG, SHAPES, tensors, write, write_sharded
from safetensors.torch import save_file

from octavo.loading.source import resolve_source
from octavo.loading.weights import load_model
from octavo.models.base import CausalLM

CPU = torch.device("cpu")


class Nothing:
    """Attention that adds nothing."""

    def forward(self, _layer: Any, query: torch.Tensor, _key: torch.Tensor, _value: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(query)


def load(path: Path, dtype: torch.dtype = torch.float32, load_format: Any = "auto", seed: int = 0) -> CausalLM:
    return load_model(resolve_source(str(path), load_format=load_format), dtype, CPU, seed)


@torch.inference_mode()
def logits(model: CausalLM) -> torch.Tensor:
    ids = torch.arange(10)
    return model.compute_logits(model(ids, ids, Nothing()))


def test_shards_are_one_checkpoint(tmp_path: Path) -> None:
    whole, sharded = load(write(tmp_path / "a")), load(write_sharded(tmp_path / "b"))
    assert torch.equal(logits(whole), logits(sharded))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_checkpoint_dtypes_are_cast(dtype: torch.dtype, tmp_path: Path) -> None:
    stored = {name: tensor.to(dtype) for name, tensor in tensors().items()}
    cast = {name: tensor.float() for name, tensor in stored.items()}
    assert torch.equal(logits(load(write(tmp_path / "a", stored))), logits(load(write(tmp_path / "b", cast))))


def test_a_loaded_model_owns_its_weights(tmp_path: Path) -> None:
    model = load(write(tmp_path))
    before = logits(model)
    path = tmp_path / "model.safetensors"
    path.write_bytes(bytes(path.stat().st_size))
    assert torch.equal(logits(model), before)


def test_known_tensors_that_are_not_needed(tmp_path: Path) -> None:
    extra = tensors() | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)}
    load(write(tmp_path, extra, tie_word_embeddings=True))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"lm_head.weight": None}, "missing: lm_head.weight"),
        ({"model.layers.0.self_attn.k_proj.weight": None}, "missing: model.layers.0.self_attn.k_proj.weight"),
        ({"model.layers.1.mlp.up_proj.weight": torch.ones(1)}, "not expected: model.layers.1.mlp.up_proj.weight"),
        ({"model.norm.weight": torch.ones(17)}, r"wrong: model.norm.weight has shape \[17\], expected \[16\]"),
        ({"model.norm.weight": torch.ones(16, dtype=torch.int8)}, "model.norm.weight has dtype torch.int8"),
        ({"lm_head.weight": None, "x": torch.ones(1)}, "missing: lm_head.weight; not expected: x"),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, torch.Tensor | None], said: str, tmp_path: Path) -> None:
    state = {name: tensor for name, tensor in (tensors() | change).items() if tensor is not None}
    with pytest.raises(ValueError, match=said) as caught:
        load(write(tmp_path, state))
    assert str(tmp_path) in str(caught.value)


def test_many_missing_tensors_are_counted(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="and 3 more"):
        load(write(tmp_path, {"lm_head.weight": tensors()["lm_head.weight"]}))


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_a_truncated_file_is_named(keep: int, tmp_path: Path) -> None:
    path = write(tmp_path) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=re.escape(f"{path} is not a readable safetensors file")):
        load(tmp_path)


def test_a_corrupt_header_is_named(tmp_path: Path) -> None:
    path = write(tmp_path) / "model.safetensors"
    raw = bytearray(path.read_bytes())
    raw[8:40] = b"\xff" * 32
    path.write_bytes(raw)
    with pytest.raises(ValueError, match=re.escape(f"{path} is not a readable safetensors file")):
        load(tmp_path)


def test_offsets_beyond_the_file_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    write(tmp_path)
    header = json.dumps({"lm_head.weight": {"dtype": "F32", "shape": [32, 16], "data_offsets": [0, 2048]}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(1000))
    with pytest.raises(ValueError, match=re.escape(str(path))):
        load(tmp_path)


def test_a_tensor_that_its_shard_lacks_is_named(tmp_path: Path) -> None:
    folder = write_sharded(tmp_path)
    shard = folder / "model-00002-of-00002.safetensors"
    save_file({"model.norm.weight": torch.ones(16)}, shard)
    with pytest.raises(ValueError, match=re.escape(f"{shard}: tensor model.layers.0.input_layernorm.weight")):
        load(folder)


def test_an_unsupported_config_names_the_model(tmp_path: Path) -> None:
    folder = write(tmp_path, hidden_act="relu")
    with pytest.raises(ValueError, match=f"{folder}.*hidden_act='relu'"):
        load(folder)


def test_dummy_weights_need_a_config_alone(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    first, second, other = (load(tmp_path, load_format="dummy", seed=seed) for seed in (1, 1, 2))
    assert torch.equal(logits(first), logits(second))
    assert not torch.equal(logits(first), logits(other))
    assert logits(first).isfinite().all()
    assert logits(load(tmp_path, torch.bfloat16, "dummy", seed=1)).sub(logits(first)).abs().max() < 0.05


def test_what_a_model_wants(tmp_path: Path) -> None:
    model = load(write(tmp_path))
    wanted = {name: slot.spec.shape for name, slot in model.weight_slots().items() if slot.spec.required}
    assert wanted == SHAPES
