"""Which method a name stands for."""

from __future__ import annotations

from octavo.config import Quantization
from octavo.quantization.fp8 import FP8
from octavo.quantization.scheme import QuantizationMethod
from octavo.quantization.unquantized import PLAIN, EveryLayer

_METHODS: dict[Quantization, QuantizationMethod] = {"fp8": EveryLayer(FP8)}


def method_of(name: Quantization | None) -> QuantizationMethod:
    """None: weights stay in the model's dtype."""
    return PLAIN if name is None else _METHODS[name]
