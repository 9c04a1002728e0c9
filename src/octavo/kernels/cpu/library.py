"""The C++ kernels: compiled once for this machine, called through ctypes. Without a compiler there are none, and
their callers use torch."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from torch import Tensor

SOURCE = Path(__file__).with_name("kernels.cpp")
_FLAGS = ("-march=native", "-std=c++17", "-fopenmp", "-fno-math-errno", "-Wno-psabi", "-fPIC", "-shared")
_COMPILE_SECONDS = 120

# As in kernels.cpp.
_HEAD_DIMS = frozenset({16, 32, 64, 80, 96, 128, 256})
_MAX_GROUP = 16


class CpuKernels:
    """The functions of kernels.cpp on tensors. All tensors: bfloat16 or float32 of one dtype, last dimension
    contiguous; indices: int64, contiguous."""

    def __init__(self, path: Path) -> None:
        """path: the compiled library. Raises OSError if it cannot be loaded."""
        # torch has loaded its OpenMP runtime by now, under the same name: the kernels share its threads.
        library = ctypes.CDLL(str(path))
        pointer, integer, real = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
        self._write_kv = library.octavo_write_kv
        self._write_kv.argtypes = [pointer] * 4 + [integer] * 7
        self._write_kv.restype = None
        self._paged_attention = library.octavo_paged_decode
        self._paged_attention.argtypes = [pointer] * 7 + [integer] * 8 + [real]
        self._rms_norm = library.octavo_rms_norm
        self._rms_norm.argtypes = [pointer] * 4 + [integer] * 3 + [real]
        self._rms_norm.restype = None

    def write_kv(self, key: Tensor, value: Tensor, cache: Tensor, slot_mapping: Tensor) -> None:
        """Copy key and value [T, KV heads, head_dim] to their slots of cache [blocks, 2, KV heads, block_size,
        head_dim]. slot_mapping: [T], block * block_size + offset."""
        _, _, num_kv_heads, block_size, head_dim = cache.shape
        self._write_kv(
            key.data_ptr(),
            value.data_ptr(),
            cache.data_ptr(),
            slot_mapping.data_ptr(),
            key.shape[0],
            key.stride(0),
            value.stride(0),
            num_kv_heads,
            block_size,
            head_dim,
            cache.element_size(),
        )

    def paged_attention(self, query: Tensor, out: Tensor, cache: Tensor, rows: DecodeRows, scale: float) -> None:
        """Attend one query a row, flash-decoding style (Dao et al., 2023): query [T, heads, head_dim] of which rows
        name some tokens, out [T, heads, head_dim] contiguous. Raises ValueError for heads that are not served."""
        _, _, num_kv_heads, block_size, head_dim = cache.shape
        refused = self._paged_attention(
            query.data_ptr(),
            out.data_ptr(),
            cache.data_ptr(),
            rows.tokens.data_ptr(),
            rows.block_tables.data_ptr(),
            rows.begins.data_ptr(),
            rows.ends.data_ptr(),
            rows.tokens.shape[0],
            query.stride(0),
            rows.block_tables.stride(0),
            query.shape[1],
            num_kv_heads,
            block_size,
            head_dim,
            cache.element_size(),
            scale,
        )
        if refused:
            raise ValueError(f"{query.shape[1]} heads over {num_kv_heads} of dimension {head_dim} are not served")

    def rms_norm(self, residual: Tensor, delta: Tensor | None, weight: Tensor, out: Tensor, eps: float) -> None:
        """residual += delta, if there is one; out = residual / rms(residual) * weight. All [T, size] contiguous,
        weight [size]; size is a multiple of 16."""
        self._rms_norm(
            residual.data_ptr(),
            0 if delta is None else delta.data_ptr(),
            weight.data_ptr(),
            out.data_ptr(),
            residual.shape[0],
            residual.shape[1],
            residual.element_size(),
            eps,
        )


def serves(num_heads: int, num_kv_heads: int, head_dim: int) -> bool:
    """Whether CpuKernels.paged_attention is compiled for such heads."""
    return head_dim in _HEAD_DIMS and num_heads // num_kv_heads <= _MAX_GROUP


class DecodeRows:
    """R rows that have one query each.

    tokens: [R], where the query stands in the batch. block_tables: [R, blocks]. Row r sees the keys at positions
    begins[r] <= position < ends[r]. All int64.
    """

    __slots__ = ("begins", "block_tables", "ends", "tokens")

    def __init__(self, tokens: Tensor, block_tables: Tensor, begins: Tensor, ends: Tensor) -> None:
        self.tokens = tokens
        self.block_tables = block_tables
        self.begins = begins
        self.ends = ends


_loaded: CpuKernels | None = None  # written by `load` only


def get() -> CpuKernels | None:
    """The kernels, if `load` found them usable."""
    return _loaded


def load(folder: Path) -> str:
    """Make `get` return the kernels, compiling them into `folder` unless that was done before. Returns in words
    what is used, and why where it is torch."""
    global _loaded
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        return "torch operators: there is no C++ compiler to make the native kernels with"
    try:
        path = _compiled(compiler, folder)
        _loaded = CpuKernels(path)
    except (OSError, subprocess.SubprocessError) as error:
        return f"torch operators: the native kernels could not be made: {error}"
    return "native kernels"


def _compiled(compiler: str, folder: Path) -> Path:
    """The library for this source, compiler and processor."""
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True, timeout=10).stdout
    processor = Path("/proc/cpuinfo").read_text().partition("\n\n")[0]
    described = [line for line in processor.splitlines() if line.startswith(("flags", "Features", "model name"))]
    # Where vectors of 64 bytes are taken apart, -O3 takes 36 s instead of 11, and gains 2-8 %.
    level = ("-O3",) if any("avx512f" in line.split() for line in described) else ("-O2", "-funroll-loops")
    flags = *level, *_FLAGS
    key = hashlib.sha256(b"\0".join([SOURCE.read_bytes(), version, *(text.encode() for text in (*described, *flags))]))
    path = folder / f"kernels-{key.hexdigest()[:24]}.so"
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".compile-", dir=folder) as unfinished:
            made = Path(unfinished) / path.name
            command = [compiler, *flags, str(SOURCE), "-o", str(made)]
            subprocess.run(command, capture_output=True, check=True, timeout=_COMPILE_SECONDS)
            os.replace(made, path)
    return path
