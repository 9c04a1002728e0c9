"""From a ModelSource to a model that can run."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from octavo.config import Quantization
from octavo.loading.device_stream import StoredTensor, read_header, stream_tensors
from octavo.loading.gguf_file import read_gguf
from octavo.loading.gguf_weights import gguf_weights, streamed_gguf_weights
from octavo.loading.source import INDEX_NAME, ModelSource
from octavo.models.base import CausalLM, DraftHead, LoadedModel
from octavo.models.registry import HeadMethod, build_head, build_model


def load_model(
    source: ModelSource,
    dtype: torch.dtype,
    device: torch.device,
    seed: int,
    quantization: Quantization | None = None,
) -> CausalLM:
    """Build the model, fill it and pack its weights. seed: of dummy weights, and of nothing else; quantization: of
    the linear layers, tensor by tensor as they arrive.

    Raises ValueError naming the file or the source, and the tensors or the config field at fault.
    """
    config, quantization = as_loaded(source, device, quantization)
    try:
        model = build_model(config, dtype, device, quantization)
    except ValueError as error:
        raise ValueError(f"{source.name}: {error}") from error
    if source.format == "dummy":
        model.load_weights(dummy_weights(model, seed, device))
        return model
    with _named(source):
        if source.format == "gguf":
            _load_gguf(model, source.files[0], dtype, device)
        else:
            unpacks = device.type == "cpu" and config.get("quantization_config") is not None
            with _one_thread_an_operator() if unpacks else nullcontext():
                _load_stored(model, source.files, stored_tensors(source.files), device)
    return model


def load_draft(
    source: ModelSource,
    method: HeadMethod | Literal["draft_model"],
    target: CausalLM,
    dtype: torch.dtype,
    device: torch.device,
    seed: int,
    quantization: Quantization | None = None,
) -> CausalLM | DraftHead:
    """What drafts tokens for `target`, loaded: a model of its own, or a head that reads the target's states, which the
    target then hands out and with which it shares what it may. seed, and quantization of a model of its own: as for
    `load_model`.

    Raises ValueError naming the file or the source, and the tensors or the config field at fault: a field, too, that
    does not go with the method or with the target.
    """
    if method == "draft_model":
        theirs, allowed = source.config.get("vocab_size"), target.config.vocab_size
        if theirs != allowed:
            raise ValueError(
                f"{source.name}: config field vocab_size={theirs!r} is not supported of a draft; "
                f"allowed: {allowed}, the target's"
            )
        return load_model(source, dtype, device, seed, quantization)
    with _named(source):
        if source.format == "gguf":
            raise ValueError(
                f"speculative method {method!r} does not read GGUF files; allowed: a folder of safetensors"
            )
        stored = stored_tensors(source.files) if source.files else []
        names = {tensor.name for tensor in stored}
        head = build_head(method, source.config, target.config, names, dtype, device)
        if source.format == "dummy":
            head.load_weights(dummy_weights(head, seed, device))
        else:
            _load_stored(head, source.files, stored, device)
        head.share(target)
        target.tap(head.tap_layers)
    return head


@contextmanager
def _named(source: ModelSource) -> Iterator[None]:
    """A ValueError that names no file of the source gets its path."""
    try:
        yield
    except ValueError as error:
        named = any(str(file) in str(error) for file in source.files)
        raise (error if named else ValueError(f"{source.path}: {error}")) from error.__cause__


def _load_stored(model: LoadedModel, files: tuple[Path, ...], stored: list[StoredTensor], device: torch.device) -> None:
    weights = safetensors_weights(files) if device.type == "cpu" else stream_tensors(stored, device)
    model.load_weights(weights, {tensor.name for tensor in stored})


def as_loaded(
    source: ModelSource, device: torch.device, quantization: Quantization | None
) -> tuple[dict[str, Any], Quantization | None]:
    """The config and the option by which the model is built: of a GGUF file whose weights are dequantized before the
    model gets them, without the file's own format.

    A CPU multiplies by dequantized ones anyway, and they are made fastest tensor by tensor; what quantizes weights as
    they come wants to see weights.
    """
    keeps_blocks = device.type != "cpu" and quantization in (None, "gguf")
    if source.path.suffix != ".gguf" or keeps_blocks:
        return source.config, quantization
    plain = {name: value for name, value in source.config.items() if name != "quantization_config"}
    return plain, None if quantization == "gguf" else quantization


def _load_gguf(model: CausalLM, path: Path, dtype: torch.dtype, device: torch.device) -> None:
    file = read_gguf(path)
    if device.type == "cpu":
        num_threads = torch.get_num_threads()
        with _one_thread_an_operator():
            model.load_weights(gguf_weights(file, dtype, num_threads))
    else:
        packed = {name for name, slot in model.weight_slots().items() if torch.uint8 in slot.spec.dtypes}
        model.load_weights(streamed_gguf_weights(file, dtype, device, packed))


@contextmanager
def _one_thread_an_operator() -> Iterator[None]:
    """Thousands of short operators, as unpacking is, stall on one another's barriers wherever a core is shared with
    other work; threads that each take a tensor do not, nor does a single one."""
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
    listed = _weight_map(files)
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                names = set(opened.keys())
                _require(file, names, listed)
                for name in sorted(names):
                    yield name, opened.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file} is not a readable safetensors file: {error}") from error


def stored_tensors(files: tuple[Path, ...]) -> list[StoredTensor]:
    """Where every tensor of the files lies, in their order, as the headers say. Raises as `safetensors_weights`."""
    listed = _weight_map(files)
    stored: list[StoredTensor] = []
    for file in files:
        tensors = read_header(file)
        _require(file, {tensor.name for tensor in tensors}, listed)
        stored += tensors
    return stored


def _weight_map(files: tuple[Path, ...]) -> dict[str, str]:
    """Tensor name -> file name, as the index beside the files says; empty where there is none."""
    index = files[0].parent / INDEX_NAME
    listed: dict[str, str] = json.loads(index.read_bytes())["weight_map"] if index.is_file() else {}
    return listed


def _require(file: Path, names: set[str], listed: dict[str, str]) -> None:
    """Raises ValueError naming a tensor that the index places in a file that lacks it."""
    for name, holder in listed.items():
        if holder == file.name and name not in names:
            raise ValueError(f"{file}: tensor {name}, which {INDEX_NAME} places here, is missing")


def dummy_weights(model: LoadedModel, seed: int, device: torch.device) -> Iterator[tuple[str, Tensor]]:
    """Random weights for every tensor that the model must have, or whose spec makes some, made on the device: the same
    for the same seed on one kind of device, whatever the model's dtype."""
    generator = torch.Generator(device).manual_seed(seed)
    for name, slot in model.weight_slots().items():
        if slot.spec.required or slot.spec.dummy is not None:
            yield name, slot.spec.make_dummy(generator)
