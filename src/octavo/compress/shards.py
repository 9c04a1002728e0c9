"""Safetensors files of bounded size, and their index (format: safetensors, Hugging Face)."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from octavo.compress.plain import write_json
from octavo.loading.source import INDEX_NAME, SINGLE_NAME

_SHARD_BYTES = 5 << 30


class ShardWriter:
    """Takes tensors one by one; what is held at once is a shard."""

    def __init__(self, folder: Path, shard_bytes: int = _SHARD_BYTES) -> None:
        self._folder, self._shard_bytes = folder, shard_bytes
        self._held: dict[str, Tensor] = {}
        self._names: list[list[str]] = []  # of each shard written
        self._total = 0

    def add(self, name: str, tensor: Tensor) -> None:
        held = sum(other.nbytes for other in self._held.values())
        if self._held and held + tensor.nbytes > self._shard_bytes:
            self._write()
        self._held[name] = tensor.contiguous()
        self._total += tensor.nbytes

    def close(self) -> None:
        """Write the rest, and the index where there are several shards."""
        self._write()
        count = len(self._names)
        if count == 1:
            self._shard(0).rename(self._folder / SINGLE_NAME)
            return
        weight_map = {}
        for index, names in enumerate(self._names):
            final = f"model-{index + 1:05}-of-{count:05}.safetensors"
            self._shard(index).rename(self._folder / final)
            weight_map |= dict.fromkeys(names, final)
        write_json(self._folder / INDEX_NAME, {"metadata": {"total_size": self._total}, "weight_map": weight_map})

    def _write(self) -> None:
        path = self._shard(len(self._names))
        save_file(self._held, path, metadata={"format": "pt"})
        path.chmod(0o644)  # which the library leaves to its owner alone
        self._names.append(list(self._held))
        self._held = {}

    def _shard(self, index: int) -> Path:
        return self._folder / f"shard-{index}.safetensors"
