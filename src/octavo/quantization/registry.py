"""Which scheme a name stands for."""

from __future__ import annotations

from octavo.config import Quantization
from octavo.quantization.fp8 import FP8
from octavo.quantization.scheme import LinearScheme
from octavo.quantization.unquantized import UNQUANTIZED

SCHEMES: dict[Quantization, LinearScheme] = {"fp8": FP8}


def scheme_of(name: Quantization | None) -> LinearScheme:
    """None: weights stay in the model's dtype."""
    return UNQUANTIZED if name is None else SCHEMES[name]
