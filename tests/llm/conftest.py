"""What every test of an LLM ends with. Each module has its own `llm`."""

from __future__ import annotations

import pytest

from octavo import LLM


@pytest.fixture(autouse=True)
def nothing_is_left_behind(llm: LLM) -> object:
    yield
    llm.audit()
    stats = llm.stats()
    assert (stats.num_running, stats.num_waiting) == (0, 0)
    assert stats.num_free_blocks == stats.num_blocks
