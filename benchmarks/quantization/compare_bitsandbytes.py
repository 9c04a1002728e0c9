"""Compare what Octavo, and the encoders of its tests, make of weights with the bitsandbytes package, bit for bit; then
let transformers save tiny models through the package, load them, and compare logits.

    pip install bitsandbytes transformers accelerate
    PYTHONPATH=src python benchmarks/quantization/compare_bitsandbytes.py
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import bitsandbytes.functional as bnb
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig

from octavo.quantization.bitsandbytes import Int8Rows, StoredFourBit
from octavo.quantization.four_bit import CodeTable, dequantize, quantize_nf4
from octavo.quantization.four_bit import _pairs as pairs_of

sys.path.append(str(Path(__file__).parents[2] / "tests" / "quantization"))
import bitsandbytes_encoders as encoders
from quantized_checkpoints import load, logits

CPU = torch.device("cpu")
TABLES: tuple[CodeTable, ...] = ("nf4", "fp4")


def weights() -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for rows, columns in ((64, 128), (192, 320), (1024, 4096)):
            weight = torch.randn(rows, columns, generator=generator).to(dtype)
            weight[0, :64] = 0
            yield weight


def share(first: Tensor, second: Tensor) -> str:
    same = (first == second).float().mean().item()
    return "equal" if same == 1 else f"{same:.7f} equal"


def compare_tensors() -> None:
    for weight in weights():
        name = f"{weight.dtype} {list(weight.shape)}"
        packed, state = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4")
        made = quantize_nf4(weight, 64)
        print(f"{name}: nf4 codes {share(made.packed, packed.flatten())}, absmax {share(made.absmax, state.absmax)}")
        for table in TABLES:
            for nested in (False, True):
                compare_stored(name, weight, table, nested)
        compare_encoders(name, weight)


def compare_stored(name: str, weight: Tensor, table: CodeTable, nested: bool) -> None:
    """What is read of the package's tensors, with what the package dequantizes."""
    packed, state = bnb.quantize_4bit(weight, quant_type=table, compress_statistics=nested)
    tensors = {"weight": packed} | {f"weight.{end}": value for end, value in state.as_dict(packed=True).items()}
    specs = StoredFourBit(table, nested).tensors(weight.shape[1], weight.shape[0])
    problems = [specs[end].problem(end, value) for end, value in tensors.items()]
    assert set(specs) == set(tensors), set(specs) ^ set(tensors)
    assert not any(problems), problems
    read = StoredFourBit(table, nested).weight(weight.shape[1], weight.shape[0], tensors, CPU)
    got = dequantize(read, pairs_of(table, CPU), weight.shape[1], weight.dtype)
    print(f"{name}: {table}{' double' * nested} dequantized {share(got, bnb.dequantize_4bit(packed, state))}")


def compare_encoders(name: str, weight: Tensor) -> None:
    if weight.numel() > 1 << 17:
        return
    for table in TABLES:
        tensors, _ = encoders.four_bit(weight, table)
        packed, state = bnb.quantize_4bit(weight, quant_type=table)
        numbers = pairs_of(table, CPU)  # of codes: FP4 has two for 0
        same = share(numbers[tensors["weight"].int()], numbers[packed.int()])
        print(f"{name}: the tests' {table} codes {same}")
        assert torch.equal(tensors["weight.absmax"], state.absmax)
    codes, scale, _ = bnb.int8_vectorwise_quant(weight.half())
    tensors, _ = encoders.int8_rows(weight.half().float())
    print(f"{name}: the tests' int8 codes {share(tensors['weight'], codes)}, SCB {share(tensors['SCB'], scale)}")
    read = Int8Rows().codes(weight.shape[1], weight.shape[0], {"weight": codes, "SCB": scale})
    plain = (read.code.float() - 128) * read.scale
    expected = bnb.int8_vectorwise_dequant(codes, scale)
    print(f"{name}: int8 dequantized off by {(plain - expected).abs().max():.1e} of {expected.abs().max():.1e}")


def dequantized(module: torch.nn.Module) -> torch.nn.Linear:
    """As the package dequantizes it: its own products of few tokens on a CPU round more."""
    weight = module.weight
    plain = torch.nn.Linear(module.in_features, module.out_features, bias=False)
    if isinstance(module, Linear4bit):
        plain.weight.data = bnb.dequantize_4bit(weight.data, weight.quant_state).float()
    else:
        plain.weight.data = bnb.int8_vectorwise_dequant(weight.CB, weight.SCB)
    return plain


def compare_models() -> None:
    sizes = {"hidden_size": 128, "intermediate_size": 320, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=64, num_hidden_layers=2, max_position_embeddings=64, **sizes)
    config.initializer_range = 0.1
    kinds = {
        "nf4": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
        "nf4 double": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True),
        "fp4": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="fp4"),
        "int8": BitsAndBytesConfig(load_in_8bit=True),
    }
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(f"{folder}/plain")
        for name, quantization in kinds.items():
            model = AutoModelForCausalLM.from_pretrained(
                f"{folder}/plain", quantization_config=quantization, dtype=torch.float32, device_map="cpu"
            )
            model.save_pretrained(f"{folder}/{name}")
            for path, module in list(model.named_modules()):
                if isinstance(module, (Linear4bit, Linear8bitLt)):
                    model.set_submodule(path, dequantized(module))
            with torch.inference_mode():
                expected = model((torch.arange(24) % 64)[None]).logits[0].float()
            got = logits(load(Path(folder) / name))
            print(f"{name}: logits off by {(got - expected).norm() / expected.norm():.1e}, relative")


if __name__ == "__main__":
    torch.set_num_threads(1)
    compare_tensors()
    compare_models()
