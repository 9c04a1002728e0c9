"""What stands in the guide runs: every snippet of docs/guide.md, and of the file that `--guide` names, as it stands."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from server_process import ServerProcess
from server_rig import free_port
from snippets import Snippet, snippets_of, with_port

import octavo

OWN = Path(__file__).parents[2] / "docs" / "guide.md"
# An answer that is an error fails the snippet, and so does any command of it.
_STRICT = 'set -eo pipefail\ncurl() { command curl --silent --show-error --fail-with-body "$@"; }\n'


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "snippet" in metafunc.fixturenames:
        given = metafunc.config.getoption("guide")
        paths = [OWN, *([Path(given)] if given else [])]
        cases = [(each, snippets_of(path), path.stem) for path in paths for each in snippets_of(path)]
        runs = [(each, every, name) for each, every, name in cases if each.lacks is None]
        names = [f"{name}-{each.line}" for each, _, name in runs]
        metafunc.parametrize(("snippet", "guide"), [(each, every) for each, every, _ in runs], ids=names)


def test_snippet(snippet: Snippet, guide: list[Snippet], tmp_path: Path, server: ServerProcess, adapters: Path) -> None:
    (tmp_path / "loras").symlink_to(adapters)
    port = free_port() if snippet.serves else server.port
    for each in guide:
        if each.file is not None:
            (tmp_path / each.file).write_text(with_port(each.source, port))
    if snippet.serves:
        assert_serves(snippet, tmp_path, port)
        return
    path = tmp_path / ("snippet.py" if snippet.kind == "python" else "snippet.sh")
    path.write_text(("" if snippet.kind == "python" else _STRICT) + with_port(snippet.source, port))
    command = [sys.executable if snippet.kind == "python" else "bash", path.name]
    done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False)
    print(done.stdout, done.stderr)
    assert done.returncode == 0, f"{snippet.source}\n{done.stdout}\n{done.stderr}"
    assert done.stdout or not re.search(r"^print\(", snippet.source, re.MULTILINE)


def assert_serves(snippet: Snippet, folder: Path, port: int) -> None:
    """It answers /health within a minute, and SIGTERM ends it."""
    with (folder / "log.txt").open("wb") as log:
        process = subprocess.Popen(
            ["bash", "-c", "exec " + with_port(snippet.source, port).lstrip()],
            cwd=folder,
            env=environment(),
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    try:
        deadline = time.monotonic() + 60
        while True:
            with contextlib.suppress(urllib.error.URLError, ConnectionError, TimeoutError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2).close()
                break
            assert process.poll() is None, (folder / "log.txt").read_text()
            assert time.monotonic() < deadline, (folder / "log.txt").read_text()
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0, (folder / "log.txt").read_text()
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def environment() -> dict[str, str]:
    """`python` and `octavo` are those of the tests."""
    source = str(Path(octavo.__file__).parents[1])
    return {
        **os.environ,
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "PYTHONPATH": os.pathsep.join([source, os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep),
    }
