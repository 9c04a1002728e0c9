"""Fixtures every part of the suite shares."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

# A worker of several has a core to itself: threads of two workers on the same cores wait at one another's barriers.
if "PYTEST_XDIST_WORKER" in os.environ:
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int(os.environ["PYTEST_XDIST_WORKER"].removeprefix("gw")) % len(cores)]})

# Before anything imports triton: without a GPU, its kernels run in its interpreter.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    import triton_interpreter

    triton_interpreter.mend()

from octavo.kernels.cpu import library
from octavo.loading.package import pull


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--guide", metavar="FILE", help="a guide whose snippets tests/guide runs too, besides our own")
    parser.addoption("--cases", type=int, default=60, help="how many requests the schema's fuzz test makes")
    parser.addoption("--server", default="", help="the URL of a running server for it, in place of one without a model")
    parser.addoption("--examples", type=int, default=3, help="examples of each sweep of output parsers")


@pytest.fixture(scope="session")
def examples(request: pytest.FixtureRequest) -> int:
    """How many generated examples a sweep takes."""
    return int(request.config.getoption("--examples"))


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """The real small model, fetched once into the cache."""
    given = os.environ.get("OCTAVO_TEST_SMOLLM2")
    return Path(given) if given else pull("smollm2")


@pytest.fixture(scope="session")
def native(tmp_path_factory: pytest.TempPathFactory) -> library.CpuKernels:
    before = library.get()
    # One folder for all workers of a run: to compile takes 12 s. Of one worker alone, the base folder is its own.
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "kernels"
    folder.mkdir(exist_ok=True)
    assert library.load(folder) == "native kernels"
    made = library.get()
    assert made is not None
    library._loaded = before
    return made
