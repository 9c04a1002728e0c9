"""`octavo quantize` put together: a model in, a folder with its quantized checkpoint out."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from tqdm import tqdm

from octavo.compress import rounding
from octavo.compress.plain import PlainModel, write_json
from octavo.compress.rounding import GROUP_SIZES, Rounding
from octavo.compress.shards import ShardWriter
from octavo.loading.source import resolve_source

Scheme = Literal["awq", "fp8", "gptq", "q4"]


def quantize(
    name: str,
    scheme: Scheme,
    output: Path,
    *,
    revision: str | None = None,
    group_size: int | None = None,
    calibration: Path | None = None,
) -> None:
    """name: as EngineOptions.model; output: a folder that does not exist yet, or is empty; group_size: columns that
    share a scale of four bits, None for the largest that every layer can have; calibration: a text, for awq and gptq.

    Raises ValueError naming the option, the file, or the package that is missing; OSError for what cannot be written.
    """
    _check(scheme, output, group_size, calibration)
    model = PlainModel(resolve_source(name, revision=revision))
    sizes = model.linear_sizes()
    if scheme != "fp8":
        group_size = _group_size(sizes, group_size)
    with _finished_only(output) as folder:
        if scheme in ("fp8", "q4"):
            made = rounding.fp8() if group_size is None else rounding.int4(group_size)
            _write_rounded(model, sizes, made, folder)
        else:
            assert calibration is not None
            assert group_size is not None
            _write_calibrated(model, scheme, group_size, calibration, folder)
        model.write_files(folder)


def _check(scheme: Scheme, output: Path, group_size: int | None, calibration: Path | None) -> None:
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"output={str(output)!r} exists; allowed: a new folder, or an empty one")
    calibrates = scheme in ("awq", "gptq")
    if calibrates and calibration is None:
        raise ValueError(f"scheme={scheme!r} needs a text to calibrate on: give --calibration FILE, plain UTF-8")
    if calibration is not None and not calibrates:
        raise ValueError(f"calibration={str(calibration)!r} is not used by scheme={scheme!r}; allowed with: awq, gptq")
    if calibration is not None and not calibration.is_file():
        raise ValueError(f"calibration={str(calibration)!r} is no file")
    if group_size is not None and (scheme == "fp8" or group_size not in GROUP_SIZES):
        allowed = "none with fp8" if scheme == "fp8" else ", ".join(map(str, GROUP_SIZES))
        raise ValueError(f"group_size={group_size} is not supported; allowed: {allowed}")


def _group_size(sizes: Mapping[str, int], wanted: int | None) -> int:
    """Raises ValueError naming a layer that cannot be cut into such groups."""
    for group_size in GROUP_SIZES if wanted is None else (wanted,):
        odd = next((name for name, size in sizes.items() if size % group_size), None)
        if odd is None:
            return group_size
    raise ValueError(f"{odd} has {sizes[odd or '']} columns, which are not whole groups of {group_size}")


@contextmanager
def _finished_only(output: Path) -> Iterator[Path]:
    """A folder to write into that becomes `output` when all went well."""
    output.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
    try:
        yield folder
        folder.chmod(0o755)
        os.replace(folder, output)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@torch.inference_mode()
def _write_rounded(model: PlainModel, sizes: Mapping[str, int], made: Rounding, folder: Path) -> None:
    missing = dict(sizes)
    writer = ShardWriter(folder)
    for name, tensor in _with_progress(model):
        known = name if name in sizes else f"model.{name}"  # saved without the part that had the head
        if missing.pop(known, None) is None:
            writer.add(name, _stored(model, tensor))
            continue
        for end, part in made.quantize(tensor).items():
            writer.add(f"{name.removesuffix('.weight')}.{end}", part)
    if missing:
        raise ValueError(f"the checkpoint lacks {next(iter(missing))}")
    writer.close()
    write_json(folder / "config.json", model.config | {"quantization_config": made.config})


def _write_calibrated(
    model: PlainModel, scheme: Literal["awq", "gptq"], group_size: int, calibration: Path, folder: Path
) -> None:
    try:
        from octavo.compress.calibrated import write_calibrated
    except ImportError as error:
        raise ValueError(f"scheme={scheme!r} needs llm-compressor: pip install 'octavo[quantize]' ({error})") from error
    with tempfile.TemporaryDirectory(prefix=".plain-", dir=folder.parent) as scratch:
        plain = model.folder or _write_plain(model, Path(scratch))
        write_calibrated(plain, scheme, group_size, calibration, folder)


def _write_plain(model: PlainModel, folder: Path) -> Path:
    writer = ShardWriter(folder)
    for name, tensor in _with_progress(model):
        writer.add(name, _stored(model, tensor))
    writer.close()
    write_json(folder / "config.json", model.config)
    model.write_files(folder)
    return folder


def _stored(model: PlainModel, tensor: Tensor) -> Tensor:
    """A tensor that is not quantized, in its own type; bfloat16 for those of a GGUF file, which were dequantized."""
    return tensor if model.folder else tensor.bfloat16()


def _with_progress(model: PlainModel) -> Iterator[tuple[str, Tensor]]:
    return iter(tqdm(model.weights(), "tensors", unit=""))
