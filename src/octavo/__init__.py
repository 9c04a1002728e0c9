"""Octavo, an LLM serving engine. `import octavo` loads nothing heavy: each public name loads at its first use."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from octavo.config import EngineOptions
    from octavo.llm import LLM
    from octavo.outputs import BeamSearchOutput, BeamSearchSequence, CompletionOutput, Logprob, RequestOutput
    from octavo.protocol.beam_search import BeamSearchParams
    from octavo.protocol.lora import LoRARequest
    from octavo.protocol.sampling import SamplingParams
    from octavo.protocol.structured import StructuredOutputsParams

__version__ = "0.1.0"
__all__ = [
    "LLM",
    "BeamSearchOutput",
    "BeamSearchParams",
    "BeamSearchSequence",
    "CompletionOutput",
    "EngineOptions",
    "LoRARequest",
    "Logprob",
    "RequestOutput",
    "SamplingParams",
    "StructuredOutputsParams",
    "__version__",
]

_HOMES = {
    "LLM": "octavo.llm",
    "BeamSearchOutput": "octavo.outputs",
    "BeamSearchParams": "octavo.protocol.beam_search",
    "BeamSearchSequence": "octavo.outputs",
    "CompletionOutput": "octavo.outputs",
    "Logprob": "octavo.outputs",
    "RequestOutput": "octavo.outputs",
    "EngineOptions": "octavo.config",
    "LoRARequest": "octavo.protocol.lora",
    "SamplingParams": "octavo.protocol.sampling",
    "StructuredOutputsParams": "octavo.protocol.structured",
}


def __getattr__(name: str) -> object:
    """Load a public name from the module that owns it (PEP 562). Raises AttributeError for any other."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
