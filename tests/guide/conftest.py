"""One server for the snippets of every guide."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from server_process import ServerProcess, running
from small_adapters import put_adapters

ARGUMENTS = ["smollm2", "--dtype", "float32", "--max-model-len", "1024", "--kv-cache-memory", "256MiB"]


@pytest.fixture(scope="session")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that snippets find as "loras"."""
    return put_adapters(tmp_path_factory.mktemp("adapters"))


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory, smollm2_path: Path, adapters: Path) -> Iterator[ServerProcess]:
    assert smollm2_path.exists()
    lora = ["--enable-lora", "--lora-modules", f"customer-service={adapters / 'cs-lora'}"]
    lora += ["--allow-runtime-lora", "--lora-dir", str(adapters)]
    with running([*ARGUMENTS, *lora], tmp_path_factory.mktemp("server") / "log.txt") as server:
        yield server
        text = server.log.read_text()
        assert "Traceback" not in text, text
