"""What `octavo doctor` examines: whether this machine can serve a model."""

from __future__ import annotations

import os
import platform
import socket
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from octavo.config import home

_MIN_PYTHON = (3, 11)
_MIN_FREE_RAM = 1024**3  # bytes: a small model, its KV cache and two processes


@dataclass(frozen=True)
class Check:
    """The outcome of one examination, in words."""

    name: str
    ok: bool
    detail: str


def examine(model: str, host: str, port: int) -> list[Check]:
    """Run every examination. One that raises OSError or ValueError has failed, with that as its detail."""
    examinations: dict[str, Callable[[], tuple[bool, str]]] = {
        "python": _python,
        "torch": _torch,
        "memory": _memory,
        "cache": lambda: _cache(home()),
        "model": lambda: _model(model),
        "port": lambda: _port(host, port),
    }
    checks = []
    for name, examination in examinations.items():
        try:
            checks.append(Check(name, *examination()))
        except (OSError, ValueError) as error:
            checks.append(Check(name, False, str(error)))
    return checks


def _python() -> tuple[bool, str]:
    wanted = ".".join(map(str, _MIN_PYTHON))
    new_enough = platform.python_version_tuple()[:2] >= tuple(map(str, _MIN_PYTHON))
    return new_enough, f"{platform.python_version()} on {platform.machine()} (needs {wanted} or later)"
