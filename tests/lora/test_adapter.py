"""Adapters that PEFT saved are read back as PEFT computes them."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft_folders import HIDDEN, TARGETS, VOCABULARY, adapted, llama, saved
from safetensors.torch import load_file, save_file

from octavo.lora.adapter import Adapter, read_adapter

Q = "model.layers.0.self_attn.q_proj"
UNSLOTH = (
    r"(?:.*?(?:language|text).*?(?:self_attn|attention|mlp|feed_forward|ffn|dense).*?(?:q_proj|v_proj).*?)|"
    r"(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|attention|mlp)\.(?:(?:q_proj|v_proj)))"
)


def updates(model: PeftModel) -> dict[str, torch.Tensor]:
    """What PEFT adds to each weight."""
    modules = model.get_base_model().named_modules()
    return {
        name: module.get_delta_weight("default")
        for name, module in modules
        if isinstance(module, LoraLayer) and "default" in module.scaling
    }


def read(folder: Path, dtype: torch.dtype = torch.float32, max_rank: int = 16) -> Adapter:
    return read_adapter(folder, TARGETS, max_rank, dtype)


def assert_same_updates(adapter: Adapter, model: PeftModel, prefix: str = "") -> None:
    expected = {prefix + name: update.detach() for name, update in updates(model).items()}
    assert adapter.deltas.keys() == expected.keys()
    assert expected
    for name, delta in adapter.deltas.items():
        product = delta.b @ delta.a
        torch.testing.assert_close(product.T if TARGETS[name].kind == "embedding" else product, expected[name])


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": "all-linear", "r": 4, "lora_alpha": 32},
        {"target_modules": ["q_proj", "v_proj"], "r": 3, "lora_alpha": 16, "use_rslora": True},
        {"target_modules": r".*layers\.1\..*_proj", "r": 2},
        {"target_modules": UNSLOTH, "r": 2},
        {"target_modules": "all-linear", "exclude_modules": ["down_proj", "layers.0.self_attn.q_proj"], "r": 2},
        {"target_modules": ["q_proj", "k_proj"], "exclude_modules": r".*\.1\..*k_proj", "r": 2},
        {"target_modules": ["gate_proj", "up_proj"], "layers_to_transform": 1, "r": 2},
        {"target_modules": ["q_proj", Q], "layers_to_transform": [1], "layers_pattern": "layers", "r": 2},
        {"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": ["h", "model.layers"], "r": 2},
        {
            "target_modules": "all-linear",
            "r": 4,
            "rank_pattern": {"q_proj": 8, "^model.layers.1.mlp.*": 2, "down_proj": 16, "proj": 1},
            "alpha_pattern": {r"layers\.0\..*": 5, "o_proj": 7.5},
            "lora_alpha": 3,
        },
        {"target_modules": ["q_proj"], "rank_pattern": {"layers.0.self_attn.q_proj": 6}, "use_rslora": True, "r": 4},
        {"target_modules": ["q_proj", "embed_tokens"], "r": 4, "lora_alpha": 6},
        {"target_modules": ["q_proj", "lm_head"], "r": 4},
        {"target_modules": ["embed_tokens", "lm_head"], "ensure_weight_tying": True, "r": 4},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
        {"target_modules": ["q_proj", "lm_head"], "modules_to_save": ["lm_head", "embed_tokens"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        {"target_modules": ["q_proj"], "init_lora_weights": "gaussian"},
        {"target_modules": ["q_proj"], "init_lora_weights": "orthogonal", "lora_dropout": 0.5},
        {"target_modules": ["q_proj"], "init_lora_weights": "mica", "task_type": None},
    ],
    ids=lambda fields: ",".join(fields),
)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_updates_are_those_of_peft(tmp_path: Path, fields: dict[str, Any], tied: bool) -> None:
    model = adapted(llama(tied=tied), **fields)
    adapter = read(saved(tmp_path, model))
    assert_same_updates(adapter, model)
    assert adapter.rank == max(delta.a.shape[0] for delta in adapter.deltas.values())
    state = model.get_base_model().state_dict()
    for name, table in adapter.replaced.items():
        keys = (f"{name}.{middle}weight" for middle in ("modules_to_save.default.", "base_layer."))
        assert torch.equal(table, next(state[key] for key in keys if key in state))
    listed = {name for entry in fields.get("modules_to_save", []) for name in TARGETS if name.endswith(entry)}
    assert listed <= adapter.replaced.keys()


@pytest.mark.parametrize("word", ["all-linear", "ALL-LINEAR"])
def test_all_linear_leaves_the_head_out(tmp_path: Path, word: str) -> None:
    """PEFT writes what it stands for; a trainer of its own may write the word."""
    model = adapted(target_modules="all-linear", exclude_modules=["down_proj"])
    config = saved(tmp_path, model) / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"target_modules": word}))
    assert_same_updates(read(tmp_path), model)


def test_it_adds_up(tmp_path: Path) -> None:
    """The factors, the tables and the adapter's size are what they say they are."""
    folder = saved(tmp_path, target_modules=["q_proj", "embed_tokens"], modules_to_save=["lm_head"], r=4, lora_alpha=12)
    adapter = read(folder, torch.bfloat16)
    embedding, query = adapter.deltas["model.embed_tokens"], adapter.deltas[Q]
    assert (embedding.a.shape, embedding.b.shape) == ((4, VOCABULARY), (HIDDEN, 4))
    assert (query.a.shape, query.b.shape) == ((4, HIDDEN), (HIDDEN, 4))
    tensors = load_file(folder / "adapter_model.safetensors")
    b = tensors[f"base_model.model.{Q}.lora_B.weight"]
    assert torch.equal(query.b, (b * 3).bfloat16())
    assert {name: table.shape for name, table in adapter.replaced.items()} == {
        "model.embed_tokens": (VOCABULARY, HIDDEN),
        "lm_head": (VOCABULARY, HIDDEN),
    }
    numbers = 2 * 4 * 2 * HIDDEN + 4 * (VOCABULARY + HIDDEN) + 2 * VOCABULARY * HIDDEN
    assert adapter.num_bytes == 2 * numbers


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16])
def test_the_scale_is_applied_before_rounding(tmp_path: Path, stored: torch.dtype) -> None:
    folder = saved(tmp_path, target_modules=["q_proj"], r=3, lora_alpha=10)
    path = folder / "adapter_model.safetensors"
    tensors = {key: tensor.to(stored) for key, tensor in load_file(path).items()}
    save_file(tensors, path)
    adapter = read(folder, torch.bfloat16)
    b = tensors[f"base_model.model.{Q}.lora_B.weight"]
    assert torch.equal(adapter.deltas[Q].b, (b.float() * (10 / 3)).bfloat16())


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("base_model.model.", ""),
        (".lora_A.weight", ".lora_A.default.weight"),
        ("embed_tokens.weight", "embed_tokens.modules_to_save.weight"),
        ("embed_tokens.weight", "embed_tokens.modules_to_save.default.weight"),
    ],
)
def test_names_that_other_versions_and_trainers_write(tmp_path: Path, old: str, new: str) -> None:
    model = adapted(target_modules=["q_proj", "lm_head"], modules_to_save=["embed_tokens"])
    folder = saved(tmp_path, model)
    before = read(folder)
    path = folder / "adapter_model.safetensors"
    tensors = {key.replace(old, new): tensor for key, tensor in load_file(path).items()}
    assert any(new in key for key in tensors)
    save_file(tensors, path)
    after = read(folder)
    assert_same_updates(after, model)
    assert after.replaced.keys() == before.replaced.keys() == {"model.embed_tokens", "lm_head"}
    assert after.digest != before.digest


def test_resaved_embeddings_need_not_be_named_in_the_config(tmp_path: Path) -> None:
    model = adapted(llama(tied=False), target_modules=["q_proj"])
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    assert read(tmp_path).replaced.keys() == {"model.embed_tokens", "lm_head"}


def test_an_adapter_of_a_model_without_a_head(tmp_path: Path) -> None:
    """AutoModel's paths have no "model." in front; patterns go by its paths."""
    model = adapted(
        llama().model,
        task_type="FEATURE_EXTRACTION",
        target_modules=r"layers\.\d\.mlp\.down_proj",
        r=4,
        alpha_pattern={"^layers.1.*": 24},
    )
    assert_same_updates(read(saved(tmp_path, model)), model, "model.")


def test_the_digest_is_of_both_files(tmp_path: Path) -> None:
    first = saved(tmp_path / "first", target_modules=["q_proj"], lora_alpha=8)
    assert read(first).digest == read(Path(shutil.copytree(first, tmp_path / "copy"))).digest
    digests = {read(first).digest}
    config = first / "adapter_config.json"
    config.write_text(config.read_text().replace('"lora_alpha": 8', '"lora_alpha": 9'))
    digests.add(read(first).digest)
    weights = first / "adapter_model.safetensors"
    save_file({key: -tensor for key, tensor in load_file(weights).items()}, weights)
    digests.add(read(first).digest)
    assert len(digests) == 3
    assert all(len(digest) == hashlib.sha256().digest_size * 2 for digest in digests)


def test_an_adapter_outlives_its_files(tmp_path: Path) -> None:
    folder = saved(tmp_path / "adapter", target_modules=["q_proj"])
    adapter, again = read(folder), read(folder)
    with (folder / "adapter_model.safetensors").open("r+b") as stream:
        stream.truncate(0)
    shutil.rmtree(folder)
    assert torch.equal(adapter.deltas[Q].a.clone(), again.deltas[Q].a)
