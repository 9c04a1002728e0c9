"""Adapters come from folders, and from the hub's cache."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from octavo.lora.source import adapter_folder


def test_a_folder_is_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert adapter_folder(str(tmp_path)) == tmp_path
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert adapter_folder("~/owner/name") == tmp_path / "owner" / "name"
    monkeypatch.chdir(tmp_path)
    assert adapter_folder("owner/name") == Path("owner/name")


def test_of_a_hub_adapter_two_files_are_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def download(name: str, **options: Any) -> str:
        asked.append((name, options["allow_patterns"]))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert adapter_folder("owner/name") == tmp_path
    assert asked == [("owner/name", ["adapter_config.json", "adapter_model.safetensors"])]


def test_a_hub_adapter_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(_name: str, **_options: Any) -> str:
        raise LocalEntryNotFoundError("offline")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(ValueError, match=r"lora_path='owner/name': hub model 'owner/name' is not in the cache"):
        adapter_folder("owner/name")


@pytest.mark.parametrize("path", ["", "no such", "/no/such/folder", __file__, "~nobody-of-this-name/x", "x" * 5000])
def test_paths_that_are_neither(path: str) -> None:
    with pytest.raises(ValueError, match=r"^lora_path='"):
        adapter_folder(path)


def test_an_adapter_in_the_cache_is_found_offline(tmp_path: Path) -> None:
    """The real client, in a process of its own: it reads its settings when it is imported."""
    repo = tmp_path / "models--owner--name"
    (repo / "snapshots" / "abc").mkdir(parents=True)
    (repo / "snapshots" / "abc" / "adapter_config.json").write_text("{}")
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("abc")
    code = "from octavo.lora.source import adapter_folder; print(adapter_folder('owner/name').name)"
    environment = os.environ | {"HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "abc"
