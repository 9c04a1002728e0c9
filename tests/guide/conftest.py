"""One server for the snippets of every guide."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from server_process import ServerProcess, running

ARGUMENTS = ["smollm2", "--dtype", "float32", "--max-model-len", "1024", "--kv-cache-memory", "256MiB"]


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory, smollm2_path: Path) -> Iterator[ServerProcess]:
    assert smollm2_path.exists()

    with running(ARGUMENTS, tmp_path_factory.mktemp("server") / "log.txt") as server:
        yield server
        text = server.log.read_text()
        assert "Traceback" not in text, text
