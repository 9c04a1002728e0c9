"""`octavo doctor` says what is wrong where something is, and nothing where nothing is."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from octavo.cli import main


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder of the test's own."""
    monkeypatch.setenv("OCTAVO_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def examine(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, dict[str, str]]:
    """The exit status and each check's line, by the check's name."""
    status = main(["doctor", *args])
    lines = capsys.readouterr().out.splitlines()
    return status, {line.split()[1]: line for line in lines}


def test_a_machine_that_can_serve(cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, lines = examine(capsys, str(tmp_path), "--port", "0")
    assert status == 0
    assert list(lines) == ["python", "torch", "memory", "cache", "model", "port"]
    assert all(line.startswith("ok ") for line in lines.values())
    assert str(cache) in lines["cache"]


def test_what_is_wrong_is_said(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache.write_text("a file where the folder should be")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        status, lines = examine(capsys, "smollm2", "--port", str(port))
    assert status == 1
    assert lines["cache"].startswith("FAIL")
    assert str(cache) in lines["cache"]
    assert lines["model"].startswith("FAIL")
    assert "octavo pull smollm2" in lines["model"]
    assert lines["port"].startswith("FAIL")
    assert f"127.0.0.1:{port}" in lines["port"]
    assert lines["torch"].startswith("ok ")
