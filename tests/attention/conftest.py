"""Every attention test runs twice: on torch operators alone, and with the native kernels."""

from __future__ import annotations

import pytest

from octavo.kernels.cpu import library


@pytest.fixture(autouse=True, params=["torch", "native"])
def kernels(request: pytest.FixtureRequest, native: library.CpuKernels, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "_loaded", native if request.param == "native" else None)
