"""adapter_model.safetensors: from its bytes to tensors that know which part of which module they are."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, NamedTuple

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_KEY = re.compile(
    r"(?:base_model\.model\.)?(?P<module>.+?)\."
    r"(?:lora_(?P<factor>[AB])(?:\.default)?\.weight"
    r"|lora_embedding_(?P<embedding_factor>[AB])(?:\.default)?"
    r"|(?:base_layer\.|modules_to_save\.(?:default\.)?)?weight)"
)
_ALLOWED = "MODULE. before lora_A.weight, lora_B.weight, lora_embedding_A, lora_embedding_B or weight"


class Part(NamedTuple):
    """A tensor of the file. key: its name there; kind: of the module that it is written for, None for a table."""

    key: str
    kind: Literal["linear", "embedding"] | None
    tensor: Tensor


Parts = dict[str, dict[str, Part]]  # by module, as the file names it; then by "A", "B" or "weight"


def read_bytes(path: Path, limit: int, meaning: str) -> bytes:
    """A file's content. limit: the most bytes it may have; meaning: why, for the message.

    What happens to the file later harms nobody, as it could if it were mapped.
    Raises ValueError naming the file.
    """
    try:
        if not path.is_file():  # a pipe would be waited for
            raise ValueError(f"{path} is {'no file' if path.exists() else 'missing'}")
        with path.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            if size > limit:
                raise ValueError(f"{path} has {size} bytes; allowed: at most {limit}, {meaning}")
            data = stream.read(size + 1)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from None
    if len(data) != size:
        raise ValueError(f"{path} changed while it was read")
    return data


def parse_tensors(data: bytes, path: Path) -> Parts:
    """The parts of every module that the file holds, unchecked but for their names and dtypes.

    Raises ValueError naming the file and the tensor at fault.
    """
    try:
        tensors: Mapping[str, Tensor] = safetensors.torch.load(data)
    except (SafetensorError, KeyError) as error:
        raise ValueError(f"{path} is no safetensors file: {error}") from None
    if not tensors:
        raise ValueError(f"{path} holds no tensors")
    parts: Parts = {}
    for key, tensor in sorted(tensors.items()):
        found, shown = _KEY.fullmatch(key), repr(key[:200])
        if found is None:
            raise ValueError(f"{path}: tensor {shown} is no part of a LoRA adapter; allowed: {_ALLOWED}")
        if tensor.dtype not in _DTYPES:
            raise ValueError(f"{path}: tensor {shown} is {tensor.dtype}; allowed: float32, bfloat16, float16")
        factor = found["factor"] or found["embedding_factor"]
        kind: Literal["linear", "embedding"] | None = "linear" if found["factor"] else "embedding" if factor else None
        held = parts.setdefault(found["module"], {})
        same = held.setdefault(factor or "weight", Part(key, kind, tensor))
        if same.key != key:
            raise ValueError(f"{path}: tensors {same.key[:200]!r} and {shown} are the same part of one module")
    return parts
