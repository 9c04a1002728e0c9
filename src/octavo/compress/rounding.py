"""Weights rounded to FP8 or to four bits, without calibration (layouts: compressed-tensors, "float-quantized" and
"pack-quantized")."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

GROUP_SIZES = (128, 64, 32)
_FP8_MAX = 448.0  # the largest finite float8_e4m3fn
_SCALE_MIN = 1e-12  # of a row or group of zeros
_INT4_HALF = 8  # codes are -8..7
# The largest weight of a group need not be reached: less of it may leave less error in the others.
_SHRINKS = tuple(1 - step / 40 for step in range(13))
_CHUNK_ELEMENTS = 16 << 20  # rounded at once


@dataclass(frozen=True)
class Rounding:
    """quantize: floating-point [N, K] to the tensors that stand for it, by the end of their names; config: the
    quantization_config that says so."""

    quantize: Callable[[Tensor], dict[str, Tensor]]
    config: dict[str, Any]


def fp8() -> Rounding:
    """One scale a row of the weight, one a token of the activations, made as they come."""
    weights = _arguments(8, "float", "channel", None)
    activations = _arguments(8, "float", "token", None) | {"dynamic": True}
    return Rounding(quantize_fp8, _config("float-quantized", weights, activations))


def int4(group_size: int) -> Rounding:
    """One scale for `group_size` columns of a row; activations stay as they are."""
    weights = _arguments(4, "int", "group", group_size)
    return Rounding(lambda weight: quantize_int4(weight, group_size), _config("pack-quantized", weights, None))


def quantize_fp8(weight: Tensor) -> dict[str, Tensor]:
    """weight: [N, K]. Returns `weight` float8_e4m3fn [N, K] and `weight_scale` bfloat16 [N, 1]."""
    wide = weight.float()
    scale = wide.abs().amax(1, keepdim=True).div_(_FP8_MAX).clamp_(min=_SCALE_MIN).bfloat16()
    quantized = wide.div_(scale.float()).clamp_(-_FP8_MAX, _FP8_MAX).to(torch.float8_e4m3fn)
    return {"weight": quantized, "weight_scale": scale}


def quantize_int4(weight: Tensor, group_size: int) -> dict[str, Tensor]:
    """weight: [N, K]. Returns `weight_packed` int32 [N, K / 8], eight codes a number, the first in the lowest bits,
    each more by 8 than what it stands for; `weight_scale` bfloat16 [N, K / group_size]; `weight_shape` int64 [2].

    A scale is the one of 13 that leaves the least squared error.
    """
    rows = max(1, _CHUNK_ELEMENTS // weight.shape[1])
    made = [_nearest_int4(part.float().unflatten(1, (-1, group_size))) for part in weight.split(rows)]
    code, scale = (torch.cat(parts) for parts in zip(*made))
    return {
        "weight_packed": _packed(code.flatten(1)),
        "weight_scale": scale,
        "weight_shape": torch.tensor(weight.shape, dtype=torch.int64),
    }


def _nearest_int4(groups: Tensor) -> tuple[Tensor, Tensor]:
    """groups: float32 [N, groups, group_size]. Returns codes int8 of the shape, and bfloat16 scales [N, groups]."""
    full = groups.abs().amax(2, keepdim=True).div_(_INT4_HALF - 0.5).clamp_(min=_SCALE_MIN)
    best_scale, best_code = full.bfloat16(), torch.zeros_like(groups, dtype=torch.int8)
    least = torch.full_like(full, torch.inf)
    for shrink in _SHRINKS:
        scale = (full * shrink).bfloat16()
        code = (groups / scale.float()).round_().clamp_(-_INT4_HALF, _INT4_HALF - 1)
        error = (code * scale.float()).sub_(groups).square_().sum(2, keepdim=True)
        better = error < least
        least = torch.where(better, error, least)
        best_scale = torch.where(better, scale, best_scale)
        best_code = torch.where(better, code.to(torch.int8), best_code)
    return best_code, best_scale.squeeze(2)


def _packed(code: Tensor) -> Tensor:
    """code: int8 [N, K] in -8..7. Returns int32 [N, K / 8]."""
    eights = (code + _INT4_HALF).to(torch.int64).unflatten(1, (-1, 8))
    shifts = torch.arange(0, 32, 4)
    return (eights << shifts).sum(2).to(torch.int32)  # the sign is the highest code's highest bit


def _arguments(num_bits: int, kind: str, strategy: str, group_size: int | None) -> dict[str, Any]:
    return {
        "num_bits": num_bits,
        "type": kind,
        "symmetric": True,
        "strategy": strategy,
        "group_size": group_size,
        "dynamic": False,
    }


def _config(layout: str, weights: dict[str, Any], activations: dict[str, Any] | None) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": activations, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
    }
