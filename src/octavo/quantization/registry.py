"""Which method a checkpoint's config, or an option, stands for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from octavo.config import Quantization
from octavo.quantization import gguf
from octavo.quantization.awq import awq
from octavo.quantization.bitsandbytes import bitsandbytes
from octavo.quantization.compressed_tensors import compressed_tensors
from octavo.quantization.four_bit import NF4
from octavo.quantization.fp8 import FP8, FP8_PER_TENSOR
from octavo.quantization.fp8_block import FP8_PER_BLOCK
from octavo.quantization.fp8_config import fp8
from octavo.quantization.gptq import gptq
from octavo.quantization.scheme import QuantizationMethod
from octavo.quantization.unquantized import PLAIN, EveryLayer

# Of weights that are quantized while they are loaded.
_ONLINE: dict[Quantization, QuantizationMethod] = {
    "bitsandbytes": EveryLayer(NF4),
    "fp8": EveryLayer(FP8),
    "fp8_per_block": EveryLayer(FP8_PER_BLOCK),
    "fp8_per_channel": EveryLayer(FP8),
    "fp8_per_tensor": EveryLayer(FP8_PER_TENSOR),
}
# quant_method -> reads the config's quantization_config. Raises ValueError naming a field and its value.
_READERS: dict[str, Callable[[Mapping[str, Any]], QuantizationMethod]] = {
    "awq": awq,
    "bitsandbytes": bitsandbytes,
    "compressed-tensors": compressed_tensors,
    "fp8": fp8,
    "gguf": gguf.read_config,
    "gptq": gptq,
}
# Names that stand for a kernel and a format in other engines, where here they are the format's.
_ALIASES = {"awq_marlin": "awq", "gptq_marlin": "gptq"}


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
    method = _ALIASES.get(name, name) if isinstance(name, str) else None
    if option is not None and _ALIASES.get(option, option) != method:
        raise ValueError(
            f"quantization={option!r} and the checkpoint's quantization_config.quant_method={name!r} do not agree; "
            f"allowed: {name!r}, or no quantization option"
        )
    if method not in _READERS:
        allowed = ", ".join(_READERS)
        raise ValueError(f"config field quantization_config.quant_method={name!r} is not supported; allowed: {allowed}")
    return _READERS[method](declared)
