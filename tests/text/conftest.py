"""Fixtures of the text tests."""

from __future__ import annotations

import pytest
from real_tokenizers import BYTE_LEVEL, SELECTED, WITH_CHAT_TEMPLATE, Pair, pair_of

from octavo.text.tokenizer import Tokenizer


@pytest.fixture(scope="session", params=SELECTED)
def pair(request: pytest.FixtureRequest) -> Pair:
    return pair_of(request.param)


@pytest.fixture(scope="session", params=WITH_CHAT_TEMPLATE)
def chat_pair(request: pytest.FixtureRequest) -> Pair:
    return pair_of(request.param)


@pytest.fixture(scope="session", params=BYTE_LEVEL)
def byte_level_pair(request: pytest.FixtureRequest) -> Pair:
    return pair_of(request.param)


@pytest.fixture(scope="session")
def qwen3() -> Tokenizer:
    return pair_of("qwen3").ours


@pytest.fixture(scope="session")
def llama2() -> Tokenizer:
    return pair_of("llama2").ours
