"""Which method a checkpoint's config, or an option, stands for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from octavo.config import Quantization
from octavo.quantization import gguf
from octavo.quantization.fp8 import FP8
from octavo.quantization.scheme import QuantizationMethod
from octavo.quantization.unquantized import PLAIN, EveryLayer

# Of weights that are quantized while they are loaded.
_ONLINE: dict[Quantization, QuantizationMethod] = {"fp8": EveryLayer(FP8)}
# quant_method -> reads the config's quantization_config. Raises ValueError naming a field and its value.
_READERS: dict[str, Callable[[Mapping[str, Any]], QuantizationMethod]] = {"gguf": gguf.read_config}


def method_of(option: Quantization | None, declared: Mapping[str, Any] | None) -> QuantizationMethod:
    """option: --quantization; declared: the checkpoint's quantization_config.

    Raises ValueError naming both where they do not agree, and the field and its value where one is not supported.
    """
    if declared is None:
        if option is not None and option not in _ONLINE:
            raise ValueError(
                f"quantization={option!r}, and the checkpoint has no quantization_config; allowed for such a one: "
                f"{', '.join(_ONLINE)}"
            )
        return PLAIN if option is None else _ONLINE[option]
    name = declared.get("quant_method")
    if option is not None and option != name:
        raise ValueError(
            f"quantization={option!r} and the checkpoint's quantization_config.quant_method={name!r} do not agree; "
            f"allowed: {name!r}, or no quantization option"
        )
    if name not in _READERS:
        allowed = ", ".join(_READERS) or "no such field"
        raise ValueError(f"config field quantization_config.quant_method={name!r} is not supported; allowed: {allowed}")
    return _READERS[name](declared)
