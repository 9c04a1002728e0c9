"""Every quantized format's linear layer on the GPU beside the same tensors on the CPU, which multiplies by the
dequantized weight in float32.

    PYTHONPATH=src python benchmarks/gpu/check_quantized.py

Weights stay in their bits where the format says so, and rounding to bfloat16 is all that may differ; where a format
quantizes activations too, they are quantized here and kept in full there. Exits 1 if a layer is off by more.
"""

from __future__ import annotations

import sys
from typing import Any

import gguf
import torch
from torch import Tensor

from octavo.config import Quantization
from octavo.kernels import triton
from octavo.layers.linear import Linear
from octavo.quantization.gguf import PACKED_TYPES
from octavo.quantization.registry import method_of

CPU, GPU = torch.device("cpu"), torch.device("cuda")
IN_FEATURES, PARTS = 1024, {"gate_proj": 768, "up_proj": 384}
BLOCK = "model.layers.0.mlp"
TOKENS = (1, 5, 16, 40, 100, 300, 700)
FULL, NARROW = 6e-3, 5e-2  # relative error with activations in bfloat16, and in 8 bits


def compressed(format_name: str, weights: dict[str, Any], activations: dict[str, Any] | None = None) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": activations, "format": format_name}
    return {"quant_method": "compressed-tensors", "format": format_name, "config_groups": {"group_0": group}}


INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128, "symmetric": True}
CHANNEL = {"strategy": "channel", "symmetric": True, "dynamic": False}
TOKEN = {"strategy": "token", "symmetric": True, "dynamic": True}


def of_gguf(*kinds: int) -> dict[str, Any]:
    """kinds: ggml type numbers of the parts."""
    return {"quant_method": "gguf", "types": {f"{BLOCK}.{part}": kind for part, kind in zip(PARTS, kinds, strict=True)}}


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True}
NF4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
CASES: dict[str, tuple[Quantization | None, dict[str, Any] | None, float]] = {
    "awq g128": (None, {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True}, FULL),
    "awq g32": (None, {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True}, FULL),
    "gptq 4 bits": (None, GPTQ, FULL),
    "gptq 4 bits by activations": (None, GPTQ | {"desc_act": True, "sym": False}, FULL),
    "gptq 3 bits": (None, GPTQ | {"bits": 3}, FULL),
    "gptq 8 bits": (None, GPTQ | {"bits": 8, "sym": False}, FULL),
    "gptq 8 bits, symmetric": (None, GPTQ | {"bits": 8}, FULL),
    "pack-quantized": (None, compressed("pack-quantized", INT4), FULL),
    "float-quantized": (
        None,
        compressed(
            "float-quantized", {"num_bits": 8, "type": "float"} | CHANNEL, {"num_bits": 8, "type": "float"} | TOKEN
        ),
        NARROW,
    ),
    "int-quantized": (
        None,
        compressed("int-quantized", {"num_bits": 8, "type": "int"} | CHANNEL, {"num_bits": 8, "type": "int"} | TOKEN),
        NARROW,
    ),
    "fp8 checkpoint": (None, {"quant_method": "fp8", "activation_scheme": "dynamic"}, NARROW),
    "fp8 blocks": (
        None,
        {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]},
        NARROW,
    ),
    "fp8 while loaded": ("fp8", None, NARROW),
    "bitsandbytes nf4": (None, NF4, FULL),
    "bitsandbytes nf4, nested": (None, NF4 | {"bnb_4bit_use_double_quant": True}, FULL),
    "bitsandbytes int8": (None, {"quant_method": "bitsandbytes", "load_in_8bit": True}, FULL),
    "bitsandbytes fp4": (None, NF4 | {"bnb_4bit_quant_type": "fp4"}, FULL),
    "bitsandbytes while loaded": ("bitsandbytes", None, FULL),
    **{
        f"gguf {gguf.GGMLQuantizationType(kind).name}": (None, of_gguf(kind, kind), FULL)
        for kind in sorted(PACKED_TYPES)
    },
    "gguf Q4_K and Q6_K": (None, of_gguf(gguf.GGMLQuantizationType.Q4_K, gguf.GGMLQuantizationType.Q6_K), FULL),
}


def layer(
    option: Quantization | None, config: dict[str, Any] | None, dtype: torch.dtype, device: torch.device
) -> Linear:
    """A fused layer with the same tensors for every dtype and device."""
    made = Linear(IN_FEATURES, PARTS, False, dtype, device)
    made.create_weights(f"{BLOCK}.gate_up_proj", method_of(option, config))
    generator = torch.Generator(CPU).manual_seed(0)
    for slot in made.weight_slots("").values():
        slot.load(slot.spec.make_dummy(generator).to(device) if slot.spec.required or slot.spec.dummy else None)
    return made


def worst(option: Quantization | None, config: dict[str, Any] | None) -> tuple[float, int]:
    """(largest relative error, tokens of that product)."""
    exact, here = layer(option, config, torch.float32, CPU), layer(option, config, torch.bfloat16, GPU)
    errors = []
    for num_tokens in TOKENS:
        x: Tensor = torch.randn(num_tokens, IN_FEATURES, generator=torch.Generator().manual_seed(num_tokens)).bfloat16()
        expected, got = exact(x.float()), here(x.to(GPU)).float().cpu()
        errors.append((((got - expected).norm() / expected.norm()).item(), num_tokens))
    return max(errors)


@torch.inference_mode()
def main() -> int:
    triton.load()
    failed = 0
    for name, (option, config, allowed) in CASES.items():
        try:
            error, num_tokens = worst(option, config)
            passed, said = error <= allowed, f"relative error {error:.2e} at {num_tokens} tokens, allowed {allowed:.0e}"
        except Exception as failure:  # one format that cannot run must not hide what the others do
            passed, said = False, f"{type(failure).__name__}: {failure}"[:300]
        failed += not passed
        print("PASS" if passed else "FAIL", f"{name}: {said}", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
