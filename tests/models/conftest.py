"""Fixtures of the model tests."""

from __future__ import annotations

import pytest
from dense_context import DenseContext


@pytest.fixture
def dense_context() -> DenseContext:
    return DenseContext()
