"""Let compressed-tensors quantize a tiny model to 8 bits, by its own presets and some more schemes, and compare the
logits of what it saves with those that it computes itself, weights and activations rounded as it rounds them.

    pip install compressed-tensors transformers accelerate
    PYTHONPATH=src python benchmarks/quantization/compare_w8a8.py

On a CPU Octavo leaves the activations of FP8 layers in full: there the package is told to do so too. W8A8 takes the
largest magnitude of a token to 127.5: which of two integers a negative one becomes is up to the last bit of a float.
"""

from __future__ import annotations

import copy
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    QuantizationStatus,
    apply_quantization_config,
    preset_name_to_scheme,
)
from compressed_tensors.quantization.utils import calculate_qparams
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

sys.path.append(str(Path(__file__).parents[2] / "tests" / "quantization"))
from quantized_checkpoints import load, logits


def int8(**fields: Any) -> QuantizationArgs:
    return QuantizationArgs(num_bits=8, type="int", **fields)


def schemes() -> dict[str, QuantizationScheme]:
    found = {name: preset_name_to_scheme(name, ["Linear"]) for name in ("FP8", "FP8_DYNAMIC", "FP8_BLOCK", "W8A8")}
    weights = int8(strategy="channel", symmetric=True)
    inputs = {
        "W8A8, zeros": int8(strategy="token", symmetric=False, dynamic=True),
        "W8A8, static": int8(strategy="tensor", symmetric=True),
        "W8A8, static, zeros": int8(strategy="tensor", symmetric=False),
    }
    for name, args in inputs.items():
        found[name] = QuantizationScheme(targets=["Linear"], weights=weights, input_activations=args)
    return found


def calibrate(model: torch.nn.Module) -> None:
    """Scales of the weights, by the package's rule; static ones of the inputs for the range -6 to 8."""
    for module in model.modules():
        scheme = getattr(module, "quantization_scheme", None)
        if scheme is None:
            continue
        args, weight = scheme.weights, module.weight.data
        scale, zero = calculate_qparams(*ranges(weight, args), args)
        module.weight_scale.data.copy_(scale.view(module.weight_scale.shape))
        if hasattr(module, "weight_zero_point"):
            module.weight_zero_point.data.copy_(zero.view(module.weight_zero_point.shape))
        if hasattr(module, "input_scale"):
            scale, zero = calculate_qparams(torch.tensor([-6.0]), torch.tensor([8.0]), scheme.input_activations)
            module.input_scale.data.copy_(scale)
            if hasattr(module, "input_zero_point"):
                module.input_zero_point.data.copy_(zero)


def ranges(weight: Tensor, args: QuantizationArgs) -> tuple[Tensor, Tensor]:
    if args.strategy == "tensor":
        return weight.amin().view(1), weight.amax().view(1)
    if args.strategy == "channel":
        return weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
    rows, columns = args.block_structure
    blocks = [[(block.amin(), block.amax()) for block in part.split(columns, 1)] for part in weight.split(rows)]
    low, high = torch.tensor(blocks).unbind(-1)
    return low, high


def compare(name: str, scheme: QuantizationScheme, plain: torch.nn.Module, folder: Path) -> None:
    model = copy.deepcopy(plain)
    config = QuantizationConfig(
        config_groups={"group_0": scheme}, ignore=["lm_head"], quantization_status=QuantizationStatus.FROZEN
    )
    apply_quantization_config(model, config)
    calibrate(model)
    reference = copy.deepcopy(model)
    for module in reference.modules():
        found = getattr(module, "quantization_scheme", None)
        if found is not None and found.weights.type == "float":
            module.quantization_scheme = found.model_copy(update={"input_activations": None})
    with torch.inference_mode():
        expected = reference((torch.arange(24) % 64)[None]).logits[0]
        lossless = plain((torch.arange(24) % 64)[None]).logits[0]
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(str(folder))
    got = logits(load(folder))
    error = (got - expected).norm() / expected.norm()
    lost = (expected - lossless).norm() / lossless.norm()
    print(f"{name}: logits off by {error:.1e}, relative (of the model before it was quantized: {lost:.1e})")


def main() -> None:
    sizes = {"hidden_size": 128, "intermediate_size": 320, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=64, num_hidden_layers=2, max_position_embeddings=64, **sizes)
    config.initializer_range = 0.1
    torch.manual_seed(0)
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for name, scheme in schemes().items():
        with tempfile.TemporaryDirectory() as folder:
            compare(name, scheme, plain, Path(folder))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
