"""What is wrong with an adapter is said in one line, which names the file, what is at fault, and what is allowed."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft_folders import TARGETS, saved
from safetensors.torch import load_file, save_file

from octavo.lora.adapter import read_adapter

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
Q = "base_model.model.model.layers.0.self_attn.q_proj"
V = "base_model.model.model.layers.0.self_attn.v_proj"
EMBED = "base_model.model.model.embed_tokens"


@pytest.fixture(scope="session")
def good_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("adapter"), target_modules=["q_proj", "embed_tokens"], r=4, lora_alpha=8)


@pytest.fixture
def folder(good_folder: Path, tmp_path: Path) -> Path:
    """An adapter of the q projections and the embedding, to be spoilt."""
    return Path(shutil.copytree(good_folder, tmp_path / "adapter"))


def read(folder: Path, max_rank: int = 16, dtype: torch.dtype = torch.bfloat16) -> None:
    read_adapter(folder, TARGETS, max_rank, dtype)


def change_config(folder: Path, **fields: Any) -> None:
    path = folder / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    path = folder / WEIGHTS
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def assert_refused(folder: Path, file: str, *words: str, **options: Any) -> None:
    with pytest.raises(ValueError, match=r"^\S") as caught:
        read(folder, **options)
    message = str(caught.value)
    assert message.startswith(f"{folder / file}"), message
    assert [word for word in words if word not in message] == [], message
    assert "\n" not in message
    assert len(message) < len(str(folder)) + 400


def test_the_adapter_is_good_before_it_is_spoilt(folder: Path) -> None:
    read(folder)


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("peft_type", "IA3", ["'IA3'", "'LORA'"]),
        ("r", 0, ["r=0", "from 1"]),
        ("r", True, ["r=True"]),
        ("r", "4", ["r='4'"]),
        ("r", 4.5, ["r=4.5"]),
        ("r", None, ["r=None"]),
        ("r", 8, ["max_lora_rank"]),
        ("lora_alpha", "8", ["lora_alpha='8'", "finite number"]),
        ("lora_alpha", [8], ["lora_alpha=[8]"]),
        ("target_modules", None, ["target_modules=None", "all-linear", "list of module names"]),
        ("target_modules", 3, ["target_modules=3"]),
        ("target_modules", ["q_proj", 3], ["target_modules=['q_proj', 3]"]),
        ("target_modules", "(", ["target_modules='('", "no regular expression"]),
        ("target_modules", ".*(", ["target_modules='.*('", "no regular expression", "unterminated"]),
        ("exclude_modules", "*q", ["exclude_modules='*q'", "nothing to repeat"]),
        ("exclude_modules", {"a": 1}, ["exclude_modules={'a': 1}"]),
        ("rank_pattern", {"q_proj": 0}, ["rank_pattern={'q_proj': 0}", "integers from 1"]),
        ("rank_pattern", {"q_proj": "4"}, ["rank_pattern={'q_proj': '4'}"]),
        ("rank_pattern", {"[": 4}, ["rank_pattern", "no regular expression"]),
        ("alpha_pattern", {"q_proj": None}, ["alpha_pattern={'q_proj': None}"]),
        ("use_rslora", "yes", ["use_rslora='yes'", "true or false"]),
        ("layers_to_transform", -1, ["layers_to_transform=-1"]),
        ("layers_to_transform", ["0"], ["layers_to_transform=['0']"]),
        ("layers_pattern", "layers", ["layers_pattern='layers'", "beside layers_to_transform"]),
        ("modules_to_save", ["lm_head", "norm"], ["modules_to_save=['lm_head', 'norm']", "embed_tokens, lm_head"]),
        ("modules_to_save", "lm_head", ["modules_to_save='lm_head'"]),
        ("bias", "all", ["bias='all'", "'none'"]),
        ("bias", "lora_only", ["bias='lora_only'"]),
        ("task_type", "SEQ_CLS", ["task_type='SEQ_CLS'", "'CAUSAL_LM'"]),
        ("task_type", "SEQ_2_SEQ_LM", ["task_type='SEQ_2_SEQ_LM'"]),
        *(
            ("init_lora_weights", value, [f"init_lora_weights={value!r}", "'gaussian'", "as they are"])
            for value in ("pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga", "other", 3)
        ),
        *(
            (field, value, [f"{field}={value!r} is not supported", "null, false or empty"])
            for field, value in [
                ("fan_in_fan_out", True),
                ("use_dora", True),
                ("lora_bias", True),
                ("use_qalora", True),
                ("use_bdlora", {"nblocks": 2}),
                ("alora_invocation_tokens", [1, 2]),
                ("arrow_config", {"top_k": 3}),
                ("kasa_config", {"beta": 1.0}),
                ("layer_replication", [[0, 1], [0, 2]]),
                ("megatron_config", {"hidden_size": 8}),
                ("monteclora_config", {"num_samples": 2}),
                ("target_parameters", ["experts.gate_up_proj"]),
                ("trainable_token_indices", [0]),
                ("velora_config", {"scale": 1.0}),
                ("a_field_of_tomorrow", "on"),
                ("a_field_of_tomorrow", 0),
            ]
        ),
    ],
)
def test_fields_of_the_config(folder: Path, field: str, value: Any, words: list[str]) -> None:
    change_config(folder, **{field: value})
    if words == ["max_lora_rank"]:
        assert_refused(folder, CONFIG, "r=8", "at most max_lora_rank=4", max_rank=4)
    else:
        assert_refused(folder, CONFIG, *words)


@pytest.mark.parametrize("value", [None, False, [], {}, ""])
def test_a_feature_that_is_off_is_accepted_known_or_not(folder: Path, value: Any) -> None:
    change_config(folder, use_dora=value, alora_invocation_tokens=value, a_field_of_tomorrow=value)
    read(folder)


@pytest.mark.parametrize("field", ["peft_type", "r", "lora_alpha", "target_modules"])
def test_fields_that_must_be_there(folder: Path, field: str) -> None:
    config = json.loads((folder / CONFIG).read_text())
    del config[field]
    (folder / CONFIG).write_text(json.dumps(config))
    assert_refused(folder, CONFIG, f"{field} is missing; allowed: ")


def test_fields_that_an_old_peft_did_not_write_have_its_defaults(folder: Path) -> None:
    config = json.loads((folder / CONFIG).read_text())
    kept = {field: config[field] for field in ("peft_type", "r", "lora_alpha", "target_modules")}
    (folder / CONFIG).write_text(json.dumps(kept))
    read(folder)


@pytest.mark.parametrize(
    "text",
    [b"", b"{", b"[]", b"null", b"\xff\xfe{", b'{"r": NaN}', b'{"r": 1e999}', b"[" * 100_000, b'{"r":' * 100_000],
    ids=lambda text: repr(text[:12]),
)
def test_configs_that_are_no_json_object(folder: Path, text: bytes) -> None:
    (folder / CONFIG).write_bytes(text)
    assert_refused(folder, CONFIG, "is no JSON object")


@pytest.mark.parametrize("value", ["1e308", "-1e308", "1" + "0" * 300, "9" * 5000])
@pytest.mark.parametrize("field", ["r", "lora_alpha"])
def test_numbers_that_are_too_large(folder: Path, field: str, value: str) -> None:
    text = (folder / CONFIG).read_text()
    (folder / CONFIG).write_text(text.replace(f'"{field}": {"4" if field == "r" else "8"}', f'"{field}": {value}'))
    with pytest.raises(ValueError, match=r"allowed|no JSON object"):
        read(folder)


@pytest.mark.parametrize("field", ["target_modules", "exclude_modules", "rank_pattern", "alpha_pattern"])
def test_a_pattern_that_takes_forever(folder: Path, field: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("octavo.lora.patterns._SECONDS", 0.2)
    pattern = r"(([\w.]+)*)*!"
    change_config(folder, **{field: {pattern: 4} if field.endswith("pattern") else pattern})
    begin = time.monotonic()
    assert_refused(folder, CONFIG, field, "takes longer than 0.2 s")
    assert time.monotonic() - begin < 10


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop(f"{Q}.lora_A.weight"), [f"'{Q}.lora_B.weight' has no counterpart", "both A and B"]),
        (lambda t: t.pop(f"{Q}.lora_B.weight"), [f"'{Q}.lora_A.weight' has no counterpart"]),
        (lambda t: t.pop(f"{EMBED}.lora_embedding_B"), [f"'{EMBED}.lora_embedding_A' has no counterpart"]),
        (
            lambda t: [t.pop(f"{Q}.lora_{side}.weight") for side in "AB"],
            ["model.layers.0.self_attn.q_proj are missing", "target_modules"],
        ),
        (
            lambda t: t.update({f"{V}.lora_A.weight": torch.ones(4, 16), f"{V}.lora_B.weight": torch.ones(8, 4)}),
            ["model.layers.0.self_attn.v_proj", CONFIG, "do not target"],
        ),
        (
            lambda t: t.update(
                {key.replace("layers.0", "layers.7"): t[key].clone() for key in list(t) if "layers.0" in key}
            ),
            ["the base model has no model.layers.7.self_attn.q_proj", "allowed: model.layers.0.self_attn.q_proj", "12"],
        ),
        (lambda t: t.update({f"{Q}.lora_A.weight": torch.ones(3, 16)}), ["lora_A", "[3, 16]", "allowed: [4, 16]"]),
        (lambda t: t.update({f"{Q}.lora_A.weight": torch.ones(4, 17)}), ["lora_A", "[4, 17]", "allowed: [4, 16]"]),
        (lambda t: t.update({f"{Q}.lora_B.weight": torch.ones(16, 5)}), ["lora_B", "[16, 5]", "allowed: [16, 4]"]),
        (lambda t: t.update({f"{Q}.lora_B.weight": torch.ones(15, 4)}), ["lora_B", "[15, 4]", "allowed: [16, 4]"]),
        (lambda t: t.update({f"{Q}.lora_B.weight": torch.ones(64)}), ["lora_B", "[64]", "allowed: [16, 4]"]),
        (lambda t: t.update({f"{Q}.lora_B.weight": torch.ones(16, 4, 1)}), ["lora_B", "[16, 4, 1]"]),
        (lambda t: t.update({f"{Q}.lora_B.weight": torch.ones(0, 4)}), ["lora_B", "[0, 4]"]),
        (lambda t: t.update({f"{Q}.lora_B.weight": torch.tensor(1.0)}), ["lora_B", "[]"]),
        (lambda t: t.update({f"{EMBED}.lora_embedding_A": torch.ones(4, 65)}), ["lora_embedding_A", "[4, 65]"]),
        (lambda t: t.update({f"{EMBED}.base_layer.weight": torch.ones(65, 16)}), ["[65, 16]", "allowed: [64, 16]"]),
        (lambda t: t[f"{Q}.lora_A.weight"][0, 0].fill_(torch.nan), [f"{Q}.lora_A.weight' has values", "not finite"]),
        (lambda t: t[f"{Q}.lora_B.weight"][3, 1].fill_(-torch.inf), [f"{Q}.lora_B.weight' has values", "not finite"]),
        (lambda t: t[f"{EMBED}.base_layer.weight"][9, 9].fill_(torch.nan), ["base_layer.weight", "not finite"]),
        (lambda t: t[f"{Q}.lora_B.weight"][0, 0].fill_(3e38), ["lora_B", "inf", "bfloat16 can hold"]),
        (lambda t: t.update({f"{Q}.lora_A.weight": t[f"{Q}.lora_A.weight"].double()}), ["float64", "bfloat16"]),
        (lambda t: t.update({f"{Q}.lora_A.weight": torch.ones(4, 16, dtype=torch.int8)}), ["int8"]),
        (
            lambda t: t.update({f"{Q}.lora_A.weight": torch.ones(4, 16).to(torch.float8_e4m3fn)}),
            ["float8_e4m3fn", "allowed: float32"],
        ),
        (lambda t: t.update({f"{Q}.lora_magnitude_vector": torch.ones(16)}), ["lora_magnitude_vector", "no part of"]),
        (lambda t: t.update({f"{Q}.lora_B.bias": torch.ones(16)}), ["lora_B.bias", "no part of"]),
        (
            lambda t: t.update({f"{EMBED}.token_adapter.trainable_tokens_delta": torch.ones(2, 16)}),
            ["trainable_tokens"],
        ),
        (lambda t: t.update({"weight": torch.ones(1)}), ["'weight' is no part of"]),
        (lambda t: t.update({"": torch.ones(1)}), ["'' is no part of"]),
        (lambda t: t.update({"x" * 5000: torch.ones(1)}), ["xxx", "no part of"]),
        (lambda t: t.update({"x" * 5000 + ".weight": torch.ones(1)}), ["xxx", "the base model has no"]),
        (lambda t: t.update({f"{Q}.weight": torch.ones(16, 16)}), ["replaces a weight", "embed_tokens and lm_head"]),
        (lambda t: t.update({f"{Q}.base_layer.weight": torch.ones(16, 16)}), ["replaces a weight"]),
        (
            lambda t: t.update({f"{Q}.lora_A.default.weight": torch.ones(4, 16)}),
            [f"{Q}.lora_A.weight", f"{Q}.lora_A.default.weight", "same part"],
        ),
        (lambda t: t.update({f"{EMBED}.weight": torch.ones(64, 16)}), [f"{EMBED}.base_layer.weight", "same part"]),
        (
            lambda t: t.update({f"{EMBED}.lora_{s}.weight": t.pop(f"{EMBED}.lora_embedding_{s}") for s in "AB"}),
            ["is of no embedding module", "lora_embedding_A and"],
        ),
        (
            lambda t: t.update({f"{Q}.lora_embedding_{s}": t.pop(f"{Q}.lora_{s}.weight") for s in "AB"}),
            ["is of no linear module", "lora_A and lora_B"],
        ),
        (lambda t: t.clear(), ["holds no tensors"]),
    ],
)
def test_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any], words: list[str]) -> None:
    change_tensors(folder, change)
    assert_refused(folder, WEIGHTS, *words)


def test_a_table_that_modules_to_save_names_must_be_there(folder: Path) -> None:
    change_config(folder, modules_to_save=["lm_head"])
    assert_refused(folder, WEIGHTS, "lm_head is missing", "modules_to_save")


def test_a_scale_beyond_float16(folder: Path) -> None:
    change_config(folder, lora_alpha=4e6)
    read(folder)
    assert_refused(folder, WEIGHTS, "lora_embedding_B", "its scale included", "at most 65504", dtype=torch.float16)


def test_ranks_beyond_the_limit(folder: Path) -> None:
    read(folder, max_rank=4)
    assert_refused(folder, CONFIG, "r=4 is too large", "at most max_lora_rank=3", max_rank=3)
    change_config(folder, rank_pattern={"embed_tokens": 2})
    assert_refused(folder, CONFIG, "rank 4 of model.layers.0.self_attn.q_proj", "max_lora_rank=3", max_rank=3)


def test_a_file_that_is_larger_than_any_adapter(folder: Path) -> None:
    """Refused by its size, before it is read: a sparse file of a terabyte."""
    os.truncate(folder / WEIGHTS, 1 << 40)
    assert_refused(folder, WEIGHTS, "has 1099511627776 bytes", "allowed: at most 4", "max_lora_rank=16")
    os.truncate(folder / CONFIG, 1 << 40)
    assert_refused(folder, CONFIG, "has 1099511627776 bytes", "allowed: at most 1048576")


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 200, 1500, -1])
def test_a_file_cut_short(folder: Path, size: int) -> None:
    path = folder / WEIGHTS
    os.truncate(path, size if size >= 0 else path.stat().st_size - 1)
    assert_refused(folder, WEIGHTS, "is no safetensors file")


@pytest.mark.parametrize(
    "data",
    [
        b"\xff" * 64,
        (2).to_bytes(8, "little") + b"{}",
        (9).to_bytes(8, "little") + b'{"a": 12}',
        b"PK\x03\x04" + b"\0" * 60,
        (1 << 40).to_bytes(8, "little") + b"{}",
    ],
)
def test_files_that_are_no_safetensors(folder: Path, data: bytes) -> None:
    (folder / WEIGHTS).write_bytes(data)
    assert_refused(folder, WEIGHTS)


def test_offsets_beyond_the_file(folder: Path) -> None:
    header = json.dumps({f"{Q}.lora_A.weight": {"dtype": "F32", "shape": [4, 16], "data_offsets": [0, 256]}}).encode()
    (folder / WEIGHTS).write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 100)
    assert_refused(folder, WEIGHTS, "is no safetensors file")


def test_files_that_are_missing(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")
    assert_refused(folder, "adapter_model.bin", "pickle", f"allowed: {WEIGHTS}")
    (folder / "adapter_model.bin").unlink()
    assert_refused(folder, WEIGHTS, "is missing")
    (folder / WEIGHTS).mkdir()
    assert_refused(folder, WEIGHTS, "is no file")
    (folder / CONFIG).unlink()
    assert_refused(folder, CONFIG, "is missing")
    shutil.rmtree(folder)
    assert_refused(folder, CONFIG, "is missing")


def test_a_pipe_is_not_waited_for(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    os.mkfifo(folder / WEIGHTS)
    assert_refused(folder, WEIGHTS, "is no file")


@pytest.mark.parametrize("name", ["x" * 300, "a\0b"])
def test_folders_that_cannot_be(name: str) -> None:
    with pytest.raises(ValueError, match=r"is missing|cannot be read: File name too long"):
        read(Path("/tmp") / name)
