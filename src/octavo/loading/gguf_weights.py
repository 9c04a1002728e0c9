"""The tensors of a GGUF file under their Hugging Face names: dequantized, or as the file has them."""

from __future__ import annotations

import mmap
import os
import warnings
from collections import deque
from collections.abc import Collection, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import torch
from torch import Tensor

from octavo.loading.dequantize import dequantize, num_bytes
from octavo.loading.device_stream import StoredTensor, stream_tensors
from octavo.loading.gguf_file import GgufFile
from octavo.loading.gguf_names import checkpoint_name, part_of

_ALIGNMENT = 8  # bytes, at least, by the specification
_SKIPPED = frozenset({"rope_freqs.weight"})  # it is part of the config


def gguf_weights(file: GgufFile, dtype: torch.dtype, num_threads: int = 2) -> Iterator[tuple[str, Tensor]]:
    """(Hugging Face name, tensor [rows, columns] or [size] of `dtype`), in the file's order.

    A tensor whose name is unknown keeps it. Tensors are dequantized ahead of their use, `num_threads` at once.
    Raises ValueError naming the file and the tensor that is cut short or of a type that cannot be dequantized.
    """
    with file.path.open("rb") as stream:
        data = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    # Tensors may share the mapping, which lives as long as they do.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given buffer is not writable")
        raw = torch.frombuffer(data, dtype=torch.uint8)
    heads = _heads_to_unpermute(file)
    names = [name for name in file.tensors if name not in _SKIPPED]
    with ThreadPoolExecutor(num_threads) as pool:
        ahead: deque[Future[Tensor]] = deque()
        started = 0
        for name in names:
            while started < len(names) and len(ahead) <= num_threads:
                ahead.append(pool.submit(_read, file, names[started], raw, heads, dtype))
                started += 1
            yield checkpoint_name(name), ahead.popleft().result()


def streamed_gguf_weights(
    file: GgufFile, dtype: torch.dtype, device: torch.device, packed: Collection[str]
) -> Iterator[tuple[str, Tensor]]:
    """The same on the device, dequantized there.

    packed: Hugging Face names of tensors that come as they are, uint8 [rows, bytes of a row]: the blocks of a row are
    its own, so that rows change places as those of other tensors do.
    """
    size, heads = os.path.getsize(file.path), _heads_to_unpermute(file)
    stored = [_placed(file, name, size) for name in file.tensors if name not in _SKIPPED]
    # A bias comes before its blocks: nothing of a layer then waits for the file's end.
    stored.sort(key=lambda tensor: (checkpoint_name(tensor.name) in packed, tensor.offset))
    for name, raw in stream_tensors(stored, device):
        tensor = file.tensors[name]
        with _named(file, name):
            if checkpoint_name(name) in packed:
                rows = _in_place(name, raw.view(tensor.shape[0], -1), heads)
            else:
                rows = _in_place(name, dequantize(raw, tensor.shape, tensor.type, dtype), heads)
        yield checkpoint_name(name), rows


def _read(file: GgufFile, name: str, raw: Tensor, heads: dict[str, int], dtype: torch.dtype) -> Tensor:
    placed, tensor = _placed(file, name, len(raw)), file.tensors[name]
    with _named(file, name):
        values = dequantize(raw[placed.offset :][: placed.num_bytes], tensor.shape, tensor.type, dtype)
        return _in_place(name, values, heads)


@contextmanager
def _named(file: GgufFile, name: str) -> Iterator[None]:
    """Say of a ValueError which tensor it is about."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{file.path}: tensor {name}: {error}") from error


def _placed(file: GgufFile, name: str, file_size: int) -> StoredTensor:
    """A tensor's bytes. Raises ValueError naming one that is cut short, out of line or of a type that cannot be."""
    tensor = file.tensors[name]
    with _named(file, name):
        size = num_bytes(tensor.shape, tensor.type)
        if tensor.offset + size > file_size:
            raise ValueError(f"the file ends at byte {file_size}, inside it")
        if tensor.offset % _ALIGNMENT:
            raise ValueError(f"its offset {tensor.offset} is no multiple of {_ALIGNMENT}")
    return StoredTensor(file.path, name, torch.uint8, (size,), tensor.offset, size)


def _heads_to_unpermute(file: GgufFile) -> dict[str, int]:
    """Heads of the projections whose rows llama.cpp's converter interleaves: those of its "llama" alone."""
    if file.metadata["general.architecture"] != "llama":
        return {}
    num_heads = file.metadata["llama.attention.head_count"]
    return {"attn_q": num_heads, "attn_k": file.metadata.get("llama.attention.head_count_kv", num_heads)}


def _in_place(name: str, rows: Tensor, heads: dict[str, int]) -> Tensor:
    """The rows where Hugging Face has them."""
    num_heads = heads.get(part_of(name) or "")
    return rows if num_heads is None else _unpermute(rows, num_heads)


def _unpermute(rows: Tensor, num_heads: int) -> Tensor:
    """Each head's rows 0, 2, 4, ... and then 1, 3, 5, ...: from rotation of neighbours to rotation of halves."""
    if len(rows) % (2 * num_heads):
        raise ValueError(f"its {len(rows)} rows are not {num_heads} heads of pairs")
    by_pair = rows.view(num_heads, -1, 2, *rows.shape[1:])
    return by_pair.transpose(1, 2).reshape(rows.shape)
