"""What `octavo doctor` examines: whether this machine can serve a model."""

from __future__ import annotations

import os
import platform
import tempfile
from collections.abc import Callable
from dataclasses import dataclass

import torch

from octavo.config import home
from octavo.loading.package import find
from octavo.server.bind import bind
from octavo.worker.memory import free_host_bytes

GIB = 1024**3
MIN_FREE_MEMORY = 1 * GIB  # bytes: a small model, its KV cache and two processes


@dataclass(frozen=True)
class Check:
    """The outcome of one examination, in words."""

    name: str
    ok: bool
    detail: str


def examine(model: str, host: str, port: int) -> list[Check]:
    """Run every examination. One that raises has failed, with what it raised as its detail."""
    examinations: dict[str, Callable[[], str]] = {
        "python": lambda: f"{platform.python_version()} on {platform.machine()}",
        "torch": _torch,
        "memory": _memory,
        "cache": _cache,
        "model": lambda: _model(model),
        "port": lambda: _port(host, port),
    }
    return [_check(name, examination) for name, examination in examinations.items()]


def _check(name: str, examination: Callable[[], str]) -> Check:
    try:
        return Check(name, True, examination())
    except (OSError, ValueError, RuntimeError) as error:
        return Check(name, False, str(error))


def _torch() -> str:
    """Multiply two bfloat16 matrices where the model would."""
    ones = torch.ones(64, 64, dtype=torch.bfloat16)
    if not torch.equal(ones @ ones, 64 * ones):
        raise RuntimeError(f"{torch.__version__} multiplies bfloat16 matrices wrongly")
    return f"{torch.__version__} on cpu, {torch.get_num_threads()} threads, {len(os.sched_getaffinity(0))} cores"


def _memory() -> str:
    free = free_host_bytes()
    if free < MIN_FREE_MEMORY:
        raise RuntimeError(f"{free / GIB:.1f} GiB free; a small model needs {MIN_FREE_MEMORY / GIB:.0f} GiB")
    return f"{free / GIB:.1f} GiB free"


def _cache() -> str:
    folder = home()
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        return f"{folder} is writable"


def _model(name: str) -> str:
    found = find(name)
    if found is None:
        raise RuntimeError(f"{name} is not on this machine; `octavo pull {name}` fetches it")
    return f"{name} is at {found}"


def _port(host: str, port: int) -> str:
    bind(host, port).close()
    return f"{host}:{port} is free"
