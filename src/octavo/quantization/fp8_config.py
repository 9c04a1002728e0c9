"""The quantization_config of FP8 checkpoints (quant_method "fp8")."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from octavo.quantization.config_fields import Fields
from octavo.quantization.fp8 import Fp8Scheme, StoredFp8
from octavo.quantization.fp8_block import BLOCK, Fp8BlockScheme
from octavo.quantization.kv_scales import check_kv_cache_scheme
from octavo.quantization.scheme import LinearScheme, QuantizationMethod
from octavo.quantization.unquantized import EveryLayer


def fp8(values: Mapping[str, Any]) -> QuantizationMethod:
    """values: the quantization_config. Raises ValueError naming a field and its value that are not supported."""
    fields = Fields(values)
    fields.choice("quant_method", ("fp8",))
    activations = fields.choice("activation_scheme", ("dynamic", "static"), "dynamic")
    block = fields.any("weight_block_size")
    fields.choice("fmt", ("e4m3",), "e4m3")
    fields.choice("scale_fmt", ("float", "ue8m0"), "float")
    fields.choice("expert_dtype", ("fp8",), "fp8")
    skipped = fields.strings("ignored_layers") + fields.strings("modules_to_not_convert")
    check_kv_cache_scheme(fields)
    fields.finish("dequantize", "is_checkpoint_fp8_serialized")
    scheme: LinearScheme = Fp8Scheme(StoredFp8(activations == "static"))
    if block is not None:
        if block != [BLOCK, BLOCK]:
            raise fields.refused("weight_block_size", f"[{BLOCK}, {BLOCK}], or null")
        if activations != "dynamic":
            raise fields.refused("activation_scheme", "'dynamic', where weight_block_size is given")
        scheme = Fp8BlockScheme("weight_scale_inv")
    return EveryLayer(scheme, skipped)
