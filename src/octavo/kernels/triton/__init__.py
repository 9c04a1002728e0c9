"""The Triton kernels, reached without importing Triton: where there is no GPU, nothing loads it.

`load` is called once, when an engine is put together for a GPU; `get` is what layers and schemes ask at each call.
"""

from __future__ import annotations

import importlib
from types import SimpleNamespace
from typing import Any

_MODULES = (
    "activation",
    "block_fp8",
    "copies",
    "decode_attention",
    "draft_passes",
    "embedding",
    "fp8",
    "fp8_gemm",
    "grouped_gemm",
    "lookup",
    "lora",
    "norm",
    "prefill_attention",
    "rope",
    "sampling",
    "skinny_gemm",
    "speculation",
    "step_inputs",
)
_loaded: Any = None  # written by `load` only


def get() -> Any:
    """Every public function of the kernel modules as an attribute, by name; None before `load`."""
    return _loaded


def load() -> None:
    """Import the kernel modules. Raises ImportError where Triton is missing."""
    global _loaded
    if _loaded is None:
        found: dict[str, Any] = {}
        for name in _MODULES:
            module = importlib.import_module(f"octavo.kernels.triton.{name}")
            found |= {key: value for key, value in vars(module).items() if not key.startswith("_")}
        _loaded = SimpleNamespace(**found)
