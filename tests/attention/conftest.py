"""Every attention test runs twice: on torch operators alone, and with the native kernels."""

from __future__ import annotations

from pathlib import Path

import pytest

from octavo.kernels.cpu import library


@pytest.fixture(scope="session")
def native(tmp_path_factory: pytest.TempPathFactory) -> library.CpuKernels:
    before = library.get()
    assert library.load(tmp_path_factory.mktemp("kernels")) == "native kernels"
    made = library.get()
    assert made is not None
    library._loaded = before
    return made


@pytest.fixture(autouse=True, params=["torch", "native"])
def kernels(request: pytest.FixtureRequest, native: library.CpuKernels, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "_loaded", native if request.param == "native" else None)
