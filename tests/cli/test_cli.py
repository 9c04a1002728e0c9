"""The command line: flags become options, mistakes become one line, and nothing heavy is loaded to find them."""

from __future__ import annotations

import errno
import socket
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import pytest

import octavo
from octavo.cli import main
from octavo.config import EngineOptions, ServerOptions
from octavo.engine.client import EngineDeadError


class FakeServing:
    """Stands in for octavo.serving: keeps what it is asked to serve, and returns or raises `outcome`."""

    def __init__(self) -> None:
        self.engine: EngineOptions | None = None
        self.server: ServerOptions | None = None
        self.outcome: int | BaseException = 0
        self.files: tuple[Path, Path] | None = None

    def serve(self, engine: EngineOptions, server: ServerOptions) -> int:
        self.engine, self.server = engine, server
        if isinstance(self.outcome, BaseException):
            raise self.outcome
        return self.outcome

    def run_batch(self, engine: EngineOptions, server: ServerOptions, source: Path, output: Path) -> int:
        self.files = (source, output)
        return self.serve(engine, server)


@pytest.fixture
def serving(monkeypatch: pytest.MonkeyPatch) -> FakeServing:
    fake = FakeServing()
    monkeypatch.setitem(sys.modules, "octavo.serving", SimpleNamespace(serve=fake.serve, run_batch=fake.run_batch))
    return fake


def test_no_flags_are_the_defaults(serving: FakeServing) -> None:
    assert main(["serve"]) == 0
    assert serving.engine == EngineOptions()
    assert serving.server == ServerOptions()


def test_flags_become_options(serving: FakeServing) -> None:
    words = "serve some/model --max-model-len 2048 --dtype float32 --gpu-memory-utilization 0.5 --port=9 --host ::1"
    assert main([*words.split(), "--served-model-name", "a", "b", "--api-key", "k"]) == 0
    assert serving.engine == EngineOptions(
        model="some/model", max_model_len=2048, dtype="float32", gpu_memory_utilization=0.5
    )
    assert serving.server == ServerOptions(host="::1", port=9, served_model_name=("a", "b"), api_key=("k",))


@pytest.mark.parametrize(
    "words",
    [
        "m --enable-lora --lora-modules a=x b=y",
        "--enable-lora --lora-modules a=x --lora_modules b=y --model m",
        "--lora-modules=a=x m --lora-modules=b=y --enable-lora",
        "--lora-modules a=x --enable-lora --lora-modules=b=y m",
    ],
)
def test_several_values_may_stand_together_or_apart(serving: FakeServing, words: str) -> None:
    assert main(["serve", *words.split()]) == 0
    assert serving.engine == EngineOptions(model="m", enable_lora=True)
    assert serving.server == ServerOptions(lora_modules=("a=x", "b=y"))


def test_an_adapter_may_be_an_object(serving: FakeServing) -> None:
    module = '{"name": "a", "path": "x y"}'
    assert main(["serve", "--lora-modules", module, "b=y", "--api-key=-k"]) == 0
    assert serving.server == ServerOptions(lora_modules=(module, "b=y"), api_key=("-k",))
    assert main(["run-batch", "-i", "a", "-o", "b", "m", "--lora-modules", module]) == 0
    assert serving.server.lora_modules == (module,)


@pytest.mark.parametrize("command", [["serve"], ["run-batch", "-i", "in", "-o", "out"]])
def test_adapters_that_cannot_be_are_one_line(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command, "m", "--enable-lora", "--lora-modules", "a"]) == 2
    message = "--lora-modules='a' is refused; allowed: name=path, or a JSON object"
    assert capsys.readouterr().err == f"octavo: error: {message}\n"


def test_the_model_may_be_a_flag(serving: FakeServing) -> None:
    assert main(["serve", "--model", "m"]) == 0
    assert serving.engine == EngineOptions(model="m")


def test_two_models_contradict(serving: FakeServing, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "a", "--model", "b"]) == 2
    assert "--model=b contradicts MODEL a" in capsys.readouterr().err
    assert serving.engine is None


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--enable-prefix-caching", True),
        ("--no-enable-prefix-caching", False),
        ("--no_enable_prefix_caching", False),
        ("--no-enable_prefix_caching", False),
    ],
)
def test_booleans_are_pairs_and_underscores_are_hyphens(serving: FakeServing, flag: str, value: bool) -> None:
    assert main(["serve", flag]) == 0
    assert serving.engine == EngineOptions(enable_prefix_caching=value)


@pytest.mark.parametrize(
    ("words", "value"),
    [
        ([], None),
        (["--async-scheduling"], True),
        (["--no-async-scheduling"], False),
        (["--no_async_scheduling"], False),
        (["--async-scheduling=false"], False),
        (["--async-scheduling", "false"], False),
        (["--async_scheduling", "True"], True),
    ],
)
def test_a_boolean_that_may_be_none_is_a_pair_too(serving: FakeServing, words: list[str], value: bool | None) -> None:
    assert main(["serve", *words, "--port", "1"]) == 0
    assert serving.engine == EngineOptions(async_scheduling=value)


@pytest.mark.parametrize(
    ("text", "value"), [("2048", 2048), ("2k", 2000), ("25.6k", 25600), ("2K", 2048), ("1m", 1_000_000)]
)
def test_integers_take_units(serving: FakeServing, text: str, value: int) -> None:
    assert main(["serve", "--max-model-len", text]) == 0
    assert serving.engine == EngineOptions(max_model_len=value)


def test_large_integers_stay_exact(serving: FakeServing) -> None:
    assert main(["serve", "--seed", str(2**63 - 1)]) == 0
    assert serving.engine == EngineOptions(seed=2**63 - 1)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--max-modle-len 8", "unknown flag --max-modle-len; did you mean --max-model-len?"),
        ("--max_modle_len=8", "unknown flag --max_modle_len; did you mean --max-model-len?"),
        ("--enable-prefix", "unknown flag --enable-prefix; did you mean --enable-prefix-caching?"),
        ("--no-enable-prefix-cache", "unknown flag --no-enable-prefix-cache; did you mean --no-enable-prefix-caching?"),
        ("--zzz", "unknown flag --zzz; `octavo serve --help` lists those there are"),
        ("a b", "unexpected argument 'b'"),
        ("--max-model-len 0", "--max-model-len=0 is out of range; allowed: >= 1"),
        ("--block-size=-3", "--block-size=-3 is out of range; allowed: 1..256"),
        ("--tensor-parallel-size 2", "--tensor-parallel-size=2 is out of range; allowed: 1..1"),
        ("--gpu-memory-utilization 1.5", "--gpu-memory-utilization=1.5 is out of range; allowed: (0, 1]"),
        ("--port 99999", "--port=99999 is out of range; allowed: 0..65535"),
        ("--drain-timeout=-1", "--drain-timeout=-1.0 is out of range; allowed: >= 0"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(
    serving: FakeServing, capsys: pytest.CaptureFixture[str], words: str, message: str
) -> None:
    assert main(["serve", *words.split()]) == 2
    assert capsys.readouterr().err == f"octavo: error: {message}\n"
    assert serving.engine is None


@pytest.mark.parametrize("words", ["--max-model-len abc", "--threads 1.5", "--dtype float", "--max-model-len"])
def test_a_value_of_the_wrong_kind_names_its_flag(capsys: pytest.CaptureFixture[str], words: str) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["serve", *words.split()])
    assert exit_.value.code == 2
    assert words.split()[0] in capsys.readouterr().err


@pytest.mark.parametrize(
    ("raised", "status", "message"),
    [
        (ValueError("max_model_len=9 is out of range; allowed: 1..8"), 2, "--max-model-len=9 is out of range"),
        (OSError(errno.EADDRINUSE, "cannot listen on 127.0.0.1:8123"), 1, "error: cannot listen on 127.0.0.1:8123"),
        (FileNotFoundError(errno.ENOENT, "No such file", "m.gguf"), 1, "error: m.gguf: No such file"),
        (OSError("the hub is away"), 1, "error: the hub is away"),
        (EngineDeadError("the engine process ended\nwith exit code 1"), 1, "ended with exit code 1"),
    ],
)
def test_what_serving_raises_is_one_line(
    serving: FakeServing, capsys: pytest.CaptureFixture[str], raised: Exception, status: int, message: str
) -> None:
    serving.outcome = raised
    assert main(["serve", "--port", "8123"]) == status
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("octavo: error: ")
    assert error.count("\n") == 1


def test_ctrl_c_is_status_130(serving: FakeServing) -> None:
    serving.outcome = KeyboardInterrupt()
    assert main(["serve"]) == 130


def test_a_bug_is_not_hidden(serving: FakeServing) -> None:
    serving.outcome = AssertionError("broken invariant")
    with pytest.raises(AssertionError, match="broken invariant"):
        main(["serve"])


def test_run_batch_takes_files_and_engine_flags(serving: FakeServing, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run-batch", "-i", "a.jsonl", "-o", "b.jsonl", "m", "--max-num-seqs", "4"]) == 0
    assert serving.files == (Path("a.jsonl"), Path("b.jsonl"))
    assert serving.engine == EngineOptions(model="m", max_num_seqs=4)
    assert serving.server == ServerOptions(log_level="warning", strict=True)
    assert main(["run-batch", "--input-file", "a", "--output-file", "b", "--port", "8000"]) == 2
    assert "unknown flag --port" in capsys.readouterr().err
    serving.outcome = ValueError("output_file=b has something else")
    assert main(["run-batch", "-i", "a", "-o", "b"]) == 2
    assert capsys.readouterr().err == "octavo: error: --output-file=b has something else\n"


def test_help_shows_every_option_with_its_meaning(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["serve", "--help"])
    assert exit_.value.code == 0
    text = capsys.readouterr().out
    names = [f.name.replace("_", "-") for options in (EngineOptions, ServerOptions) for f in fields(options)]
    assert [name for name in names if f"--{name}" not in text] == []
    assert "Tokens in a KV block." in text
    assert "TCP port" in text


def test_an_unknown_command_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serf"]) == 2
    assert capsys.readouterr().err.startswith("octavo: error: unknown command 'serf'; there are serve, run-batch, ")


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"octavo {octavo.__version__}\n"


def test_a_port_in_use_is_found_before_anything_is_loaded() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        began = time.monotonic()
        command = [sys.executable, "-m", "octavo.entrypoints.openai.api_server", "--model", "m", "--port", str(port)]
        run = subprocess.run(command, capture_output=True, text=True, timeout=30)
        took = time.monotonic() - began
    assert run.returncode == 1
    assert run.stderr.startswith(f"octavo: error: cannot listen on 127.0.0.1:{port}: Address already in use")
    assert run.stderr.count("\n") == 1
    assert took < 5  # torch alone takes about 2 s to import; this takes well under 1 s on an idle machine
