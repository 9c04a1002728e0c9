"""Whether the encoders of tests/quantization/integer_encoders.py write what the real packers write, bit for bit.

    python -m venv packers && packers/bin/pip install gptqmodel compressed-tensors
    packers/bin/pip install --no-deps autoawq==0.2.9
    packers/bin/pip install --no-deps --target old-packers compressed-tensors==0.9.0      # padded words
    PYTHONPATH=tests/quantization packers/bin/python benchmarks/quantization/against_packers.py old-packers

Prints a line for each comparison and fails at the first that differs.
"""

# Imports wait for what stands in for parts of packages.
# ruff: noqa: PLC0415
from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import integer_encoders as ours
import torch
from torch import Tensor, nn

_WEIGHT = torch.randn(64, 128, generator=torch.Generator().manual_seed(0)) * 0.1
_SKEWED = _WEIGHT + 0.12  # some groups have no negative weight, and their zero is 0


def module_at(name: str, path: Path) -> ModuleType:
    """A module by its file, without what its package imports."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def same(what: str, theirs: dict[str, Tensor], mine: dict[str, Tensor]) -> None:
    assert set(mine) <= set(theirs), (what, set(mine), set(theirs))
    for name, tensor in mine.items():
        if not torch.equal(theirs[name].to(tensor.dtype), tensor):
            raise SystemExit(f"{what}: {name} differs")
    print(f"{what}: {', '.join(mine)} are the same")


def linear_of(weight: Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight.data = weight.clone()
    return linear


def check_awq() -> None:
    package = importlib.util.find_spec("awq")
    assert package is not None
    assert package.submodule_search_locations is not None
    sys.modules["awq.utils.module"] = module_at(
        "awq.utils.module", Path(package.submodule_search_locations[0], "utils/module.py")
    )
    gemm = module_at("gemm", Path(package.submodule_search_locations[0], "modules/linear/gemm.py"))
    for group_size in (32, 64, 128):
        groups = ours.in_order(_WEIGHT.shape[1], group_size)
        _, scale, zero, stands_for = ours.codes_of(_WEIGHT, 4, group_size, False, groups)
        # The packer takes a weight that is rounded already.
        packed = gemm.WQLinear_GEMM.from_linear(
            linear_of(stands_for), 4, group_size, scales=scale.T.float().contiguous(), zeros=zero.T.float().contiguous()
        )
        same(f"autoawq, groups of {group_size}", packed.state_dict(), ours.awq(_WEIGHT, group_size)[0])


def check_gptq() -> None:
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.quantization.config import QuantizeConfig
    from gptqmodel.utils.model import convert_gptq_v2_to_v1_format_module

    for bits in (2, 3, 4, 8):
        for symmetric, desc_act in ((True, False), (False, False), (False, True)):
            group_of = ours.shuffled(128, 32) if desc_act else ours.in_order(128, 32)
            _, scale, zero, stands_for = ours.codes_of(_SKEWED, bits, 32, symmetric, group_of)
            layer = TorchLinear(
                bits=bits,
                group_size=32,
                sym=symmetric,
                desc_act=desc_act,
                in_features=128,
                out_features=64,
                bias=False,
                register_buffers=True,
            )
            layer.pack_original(linear_of(stands_for), scale.float(), zero.float(), group_of.int())
            what = f"gptqmodel, {bits} bits, sym {symmetric}, desc_act {desc_act}, smallest zero {int(zero.min())}"
            same(f"{what}, v2", layer.state_dict(), ours.gptq(_SKEWED, bits, 32, symmetric, 2, desc_act)[0])
            convert_gptq_v2_to_v1_format_module(layer, QuantizeConfig(bits=bits, group_size=32))
            same(f"{what}, v1", layer.state_dict(), ours.gptq(_SKEWED, bits, 32, symmetric, 1, desc_act)[0])


def check_compressed_tensors() -> None:
    from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    for bits in range(2, 9):
        for symmetric in (True, False):
            groups = ours.in_order(128, 32)
            _, scale, zero, stands_for = ours.codes_of(_WEIGHT, bits, 32, symmetric, groups, torch.bfloat16)
            args = QuantizationArgs(num_bits=bits, strategy="group", group_size=32, symmetric=symmetric)
            state = {"weight": stands_for, "weight_scale": scale.float()}
            state["weight_zero_point"] = (zero.int() - (1 << bits - 1)).to(torch.int8)
            packed = PackedQuantizationCompressor.compress(state, QuantizationScheme(targets=["Linear"], weights=args))
            mine, _ = ours.pack_quantized(_WEIGHT, bits, 32, symmetric)
            same(f"compressed-tensors, {bits} bits, symmetric {symmetric}", packed, mine)


def check_older_compressed_tensors(folder: Path) -> None:
    for name in [name for name in sys.modules if name.startswith("compressed_tensors")]:
        del sys.modules[name]
    sys.path.insert(0, str(folder))
    from compressed_tensors.compressors.quantized_compressors.pack_quantized import (
        PackedQuantizationCompressor,
        pack_to_int32,
    )
    from compressed_tensors.quantization import QuantizationArgs

    for bits in range(2, 9):
        code, *_ = ours.codes_of(_WEIGHT, bits, 32, True, ours.in_order(128, 32))
        packed = pack_to_int32((code.int() - (1 << bits - 1)).to(torch.int8), bits)
        same(f"compressed-tensors 0.9, {bits} bits", {"words": packed}, {"words": ours.padded(code, bits)})
    tensors, stands_for = ours.pack_quantized(_WEIGHT, 4, 32, desc_act=True)
    args = QuantizationArgs(num_bits=4, strategy="group", group_size=32, actorder="group")
    wide = tensors | {"weight_scale": tensors["weight_scale"].float()}
    weight = PackedQuantizationCompressor().decompress_weight(wide, args)
    same("compressed-tensors 0.9, actorder group", {"weight": weight}, {"weight": stands_for})


if __name__ == "__main__":
    torch.set_num_threads(1)
    check_awq()
    check_gptq()
    check_compressed_tensors()
    check_older_compressed_tensors(Path(sys.argv[1]))
