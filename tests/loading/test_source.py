"""Finding a model, and saying which file is at fault where it cannot be found."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import huggingface_hub
import pytest
from checkpoints import CONFIG, write, write_sharded
from huggingface_hub.errors import LocalEntryNotFoundError

from octavo.loading.package import find, pull
from octavo.loading.source import resolve_source


def test_a_folder(tmp_path: Path) -> None:
    (write(tmp_path) / "generation_config.json").write_text('{"eos_token_id": [3, 4], "temperature": 0.5}')
    source = resolve_source(str(tmp_path))
    assert (source.format, source.path, source.tokenizer_path) == ("safetensors", tmp_path, tmp_path)
    assert source.files == (tmp_path / "model.safetensors",)
    assert source.config == CONFIG
    assert source.generation_config["temperature"] == 0.5
    assert source.eos_token_ids == (3, 4)


def test_eos_of_the_config_stands_in(tmp_path: Path) -> None:
    assert resolve_source(str(write(tmp_path))).eos_token_ids == (7,)
    assert resolve_source(str(write(tmp_path, eos_token_id=None))).eos_token_ids == ()


def test_shards_and_a_tokenizer_elsewhere(tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    source = resolve_source(str(write_sharded(tmp_path / "model")), tokenizer=str(other))
    assert [file.name for file in source.files] == [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    assert source.tokenizer_path == other


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    shard = write_sharded(tmp_path) / "model-00002-of-00002.safetensors"
    shard.unlink()
    with pytest.raises(ValueError, match=re.escape(f"{shard} is missing")):
        resolve_source(str(tmp_path))


@pytest.mark.parametrize(
    ("index", "said"),
    [
        ({"weight_map": {"a": "../x.safetensors"}}, "'../x.safetensors', which is not a plain file name"),
        ({"weight_map": []}, "weight_map is not a map"),
        ({"weight_map": {"a": 1}}, "weight_map is not a map"),
        ([], "does not hold a JSON object"),
    ],
)
def test_a_bad_index_is_refused(index: Any, said: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=f"{tmp_path}.*{said}"):
        resolve_source(str(tmp_path))


def test_pickles_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    pickle = tmp_path / "pytorch_model.bin"
    pickle.write_bytes(b"\x80\x04.")
    for name in (tmp_path, pickle):
        with pytest.raises(ValueError, match=f"{re.escape(str(pickle))} is a pickle"):
            resolve_source(str(name))


def test_what_a_folder_lacks_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"{tmp_path}.*model.safetensors"):
        resolve_source(str(tmp_path))
    with pytest.raises(ValueError, match="holds no GGUF file"):
        resolve_source(str(tmp_path), load_format="gguf")
    with pytest.raises(ValueError, match=r"config.json is missing"):
        resolve_source(str(tmp_path), load_format="dummy")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json is not valid JSON"):
        resolve_source(str(tmp_path), load_format="dummy")
    (tmp_path / "a.txt").touch()
    with pytest.raises(ValueError, match=r"a.txt is no .gguf"):
        resolve_source(str(tmp_path / "a.txt"))


def test_a_folder_of_several_gguf_files_asks_for_one(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").touch()
    (tmp_path / "b.gguf").touch()
    with pytest.raises(ValueError, match=r"name one: a\.gguf, b\.gguf"):
        resolve_source(str(tmp_path))


@pytest.mark.parametrize("name", ["no such model", "/no/such/folder", "smolm2"])
def test_a_name_that_is_nothing(name: str) -> None:
    with pytest.raises(ValueError, match=f"model {name!r} is neither a file or folder, nor a hub id"):
        resolve_source(name)


def test_a_hub_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def download(name: str, **options: Any) -> str:
        asked.append((name, options["revision"], options["token"], options["allow_patterns"]))
        return str(write(tmp_path))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setenv("HF_TOKEN", "secret")
    source = resolve_source("owner/name", revision="v1", tokenizer="owner/tokenizer")
    assert (source.name, source.path) == ("owner/name", tmp_path)
    assert [(name, revision, token) for name, revision, token, _ in asked] == [
        ("owner/name", "v1", "secret"),
        ("owner/tokenizer", None, "secret"),
    ]
    assert "*.safetensors" in asked[0][3]
    assert "*.safetensors" not in asked[1][3]
    resolve_source("owner/name", load_format="dummy")
    assert "*.safetensors" not in asked[2][3]
    assert pull("owner/name", "v1") == tmp_path


def test_gguf_files_are_not_fetched_from_the_hub() -> None:
    with pytest.raises(ValueError, match="load_format='gguf' and model 'owner/name' is a hub id"):
        resolve_source("owner/name", load_format="gguf")


def test_a_hub_model_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(_name: str, **_options: Any) -> str:
        raise LocalEntryNotFoundError("offline")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(OSError, match="hub model 'owner/name' at revision 'v1' is not in the cache"):
        resolve_source("owner/name", revision="v1")
    assert find("owner/name-that-nobody-fetched") is None


def test_a_hub_model_is_found_in_the_cache_when_offline(tmp_path: Path) -> None:
    """The real client, in a process of its own: it reads its settings when it is imported."""
    repo = tmp_path / "models--owner--name"
    write(repo / "snapshots" / "abc")
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("abc")
    code = "from octavo.loading.source import resolve_source; print(resolve_source('owner/name').path.name)"
    environment = os.environ | {"HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "abc"


def test_finding_a_source_does_not_load_torch(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    code = f"""
import sys
from octavo.loading.source import resolve_source
try:
    resolve_source({str(path)!r})
except ValueError as error:
    print('torch' in sys.modules, error)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == f"False {path}: tensor token_embd.weight is missing"


@pytest.mark.parametrize("model", ["smollm2", "."])
def test_a_revision_is_for_hub_models_only(model: str) -> None:
    with pytest.raises(ValueError, match=r"revision='main' is given for '.+'; allowed: only for models from the hub"):
        resolve_source(model, revision="main")
