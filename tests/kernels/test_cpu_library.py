"""The native kernels against their references, and what happens where they cannot be made."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.kernels.cpu import library
from octavo.kernels.cpu.library import CpuKernels, DecodeRows
from octavo.kernels.reference import attention as oracle
from octavo.kernels.reference.norm import rms_norm

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2}


@settings(deadline=None, max_examples=40)
@given(
    num_rows=st.integers(1, 40),
    size=st.sampled_from([16, 64, 576, 4096]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    has_delta=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_rms_norm(native: CpuKernels, num_rows: int, size: int, dtype: torch.dtype, has_delta: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    residual = (torch.randn(num_rows, size, generator=generator) * 3).to(dtype)
    delta = torch.randn(num_rows, size, generator=generator).to(dtype) if has_delta else None
    weight = torch.randn(size, generator=generator).to(dtype)
    total, expected = rms_norm(residual, delta, weight, 1e-5)
    out = torch.empty_like(residual)
    native.rms_norm(residual, delta, weight, out, 1e-5)
    assert torch.equal(residual, total)
    torch.testing.assert_close(out, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def test_rms_norm_hands_on_nan(native: CpuKernels) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.ones(2, 32, dtype=dtype)
        x[1, 5] = torch.nan
        out = torch.empty_like(x)
        native.rms_norm(x, None, torch.ones(32, dtype=dtype), out, 1e-5)
        assert out[0].isfinite().all()
        assert out[1].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [16, 32, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("block_size", [3, 16, 40])
def test_paged_attention(native: CpuKernels, dtype: torch.dtype, head_dim: int, block_size: int) -> None:
    """Rows shorter and longer than what one thread takes at once; every second token of the batch is a row."""
    torch.manual_seed(head_dim)
    num_kv_heads, group, ends = 2, 3, [1, 7, 256, 257, 600]
    blocks_per_row = -(-max(ends) // block_size)
    tables = torch.randperm(len(ends) * blocks_per_row).view(len(ends), -1)
    cache = torch.randn(tables.numel(), 2, num_kv_heads, block_size, head_dim).to(dtype)
    query = torch.randn(2 * len(ends), num_kv_heads * group, head_dim).to(dtype)
    tokens = torch.arange(0, 2 * len(ends), 2)
    out = torch.full_like(query, torch.nan)
    rows = DecodeRows(tokens, tables, torch.zeros(len(ends), dtype=torch.int64), torch.tensor(ends))
    native.paged_attention(query, out, cache, rows, head_dim**-0.5)
    flat = cache.permute(0, 3, 1, 2, 4).reshape(-1, 2, num_kv_heads, head_dim)
    starts, lengths = [end - 1 for end in ends], [1] * len(ends)
    expected = oracle.paged_attention(query[tokens], flat, starts, lengths, tables, block_size, head_dim**-0.5)
    torch.testing.assert_close(out[tokens].double(), expected.double(), rtol=1e-2, atol=TOLERANCE[dtype] * 2)


def test_heads_that_are_not_served_are_refused(native: CpuKernels) -> None:
    assert library.serves(32, 2, 64)
    assert not library.serves(4, 2, 24)
    assert not library.serves(34, 2, 64)
    one = torch.zeros(1, dtype=torch.int64)
    rows = DecodeRows(one, one[None], one, one + 1)
    query = torch.zeros(1, 2, 24)
    with pytest.raises(ValueError, match="2 heads over 2 of dimension 24"):
        native.paged_attention(query, query.clone(), torch.zeros(1, 2, 2, 4, 24), rows, 1.0)


def test_compiled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "_loaded", None)
    assert library.load(tmp_path) == "native kernels"
    (made,) = tmp_path.iterdir()
    before = made.stat().st_mtime_ns
    assert library.load(tmp_path) == "native kernels"
    assert [(f.name, f.stat().st_mtime_ns) for f in tmp_path.iterdir()] == [(made.name, before)]


def test_without_a_compiler_torch_does_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "_loaded", None)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert library.load(tmp_path) == "torch operators: there is no C++ compiler to make the native kernels with"
    assert library.get() is None


def test_a_compiler_that_fails_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "_loaded", None)
    compiler = tmp_path / "g++"
    compiler.write_text('#!/bin/sh\n[ "$1" = --version ] || exit 3\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    assert "could not be made" in library.load(tmp_path / "cache")
    assert library.get() is None
