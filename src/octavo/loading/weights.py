"""From a ModelSource to a model that can run."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from octavo.loading.gguf_file import read_gguf
from octavo.loading.gguf_weights import gguf_weights
from octavo.loading.source import INDEX_NAME, ModelSource
from octavo.models.base import CausalLM
from octavo.models.registry import build_model

_DUMMY_STD = 0.02  # the initializer_range of most families


def load_model(source: ModelSource, dtype: torch.dtype, device: torch.device, seed: int) -> CausalLM:
    """Build the model, fill it and pack its weights. seed: of dummy weights, and of nothing else.

    Raises ValueError naming the file or the source, and the tensors or the config field at fault.
    """
    try:
        model = build_model(source.config, dtype, device)
    except ValueError as error:
        raise ValueError(f"{source.name}: {error}") from error
    if source.format == "dummy":
        model.load_weights(dummy_weights(model, seed))
        return model
    try:
        if source.format == "gguf":
            num_threads = torch.get_num_threads()
            with _one_thread_an_operator():
                model.load_weights(gguf_weights(read_gguf(source.files[0]), dtype, num_threads))
        else:
            model.load_weights(safetensors_weights(source.files))
    except ValueError as error:
        named = any(str(file) in str(error) for file in source.files)
        raise (error if named else ValueError(f"{source.path}: {error}")) from error.__cause__
    return model


@contextmanager
def _one_thread_an_operator() -> Iterator[None]:
    """Thousands of short operators stall on one another's barriers wherever a core is shared with other work;
    threads that each take a tensor do not."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)


def safetensors_weights(files: tuple[Path, ...]) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the files, mapped, not copied. If an index lies beside the files, each tensor comes out of
    the file that it names.

    Raises ValueError naming a file that is cut short or corrupt, or the tensor that a file lacks.
    """
    index = files[0].parent / INDEX_NAME
    listed = json.loads(index.read_bytes())["weight_map"] if index.is_file() else {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                names = set(opened.keys())
                for name, holder in listed.items():
                    if holder == file.name and name not in names:
                        raise ValueError(f"{file}: tensor {name}, which {INDEX_NAME} places here, is missing")
                for name in sorted(names):
                    yield name, opened.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file} is not a readable safetensors file: {error}") from error


def dummy_weights(model: CausalLM, seed: int) -> Iterator[tuple[str, Tensor]]:
    """Random weights for every tensor that the model wants: the same for the same seed, whatever the dtype."""
    generator = torch.Generator().manual_seed(seed)
    for name, slot in model.weight_slots().items():
        if name.endswith("norm.weight"):
            yield name, torch.ones(slot.shape)
        else:
            yield name, torch.empty(slot.shape).normal_(0, _DUMMY_STD, generator=generator)
