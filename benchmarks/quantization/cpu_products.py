"""What torch's own operators over packed integers give on a CPU, beside oneDNN over the dequantized weight.

    python benchmarks/quantization/cpu_products.py [threads]

Prints, for each size, dtype and number of tokens: microseconds of both (the best of interleaved runs) and the largest
error against the product in float64, relative to its largest value.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

_SIZES = ((576, 576), (1536, 576), (576, 1536), (4096, 4096))
_TOKENS = (1, 4, 16, 32, 128)
_SECONDS = 0.5  # of runs for each pair


def int4(rows: int, columns: int, group_size: int, dtype: torch.dtype) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """The dequantized weight, float32, and the product by groups."""
    code = torch.randint(0, 16, (rows, columns), dtype=torch.int32)
    zero = torch.randint(0, 16, (rows, columns // group_size)).float()
    scale = (torch.rand(rows, columns // group_size) * 0.02 + 0.001).half().float()
    weight = (code.float().view(rows, -1, group_size) - zero[..., None]) * scale[..., None]
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(code, 1)
    scale_and_zero = torch.stack((scale.t(), ((8 - zero) * scale).t()), -1).to(dtype).contiguous()
    return weight.view(rows, columns), lambda x: torch.ops.aten._weight_int4pack_mm_for_cpu(
        x, packed, group_size, scale_and_zero
    )


def int8(rows: int, columns: int, dtype: torch.dtype) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """The same with one scale a row."""
    code = torch.randint(-128, 128, (rows, columns), dtype=torch.int8)
    scale = (torch.rand(rows) * 0.002 + 0.0001).to(dtype)
    return code.float() * scale.float()[:, None], lambda x: torch.ops.aten._weight_int8pack_mm(x, code, scale)


def best_of_both(first: Callable[[], Tensor], second: Callable[[], Tensor]) -> tuple[float, float]:
    """Microseconds; taken in turns, so that other work on the machine meets both."""
    best = [float("inf"), float("inf")]
    end = time.perf_counter() + _SECONDS
    while time.perf_counter() < end:
        for index, product in enumerate((first, second)):
            begin = time.perf_counter()
            product()
            best[index] = min(best[index], time.perf_counter() - begin)
    return best[0] * 1e6, best[1] * 1e6


def compare(name: str, weight: Tensor, product: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
    plain = torch.ops.mkldnn._reorder_linear_weight(weight.to(dtype))
    for tokens in _TOKENS:
        x = torch.randn(tokens, weight.shape[1]).to(dtype)

        def by_plain(x: Tensor = x) -> Tensor:
            result: Tensor = torch.ops.mkldnn._linear_pointwise.default(x, plain, None, "none", [], "")
            return result

        exact = x.double() @ weight.double().T
        errors = [float((y.double() - exact).abs().max() / exact.abs().max()) for y in (product(x), by_plain())]
        packed, unpacked = best_of_both(lambda x=x: product(x), by_plain)
        print(
            f"{name} M={tokens:<4} packed {packed:8.0f} us  plain {unpacked:8.0f} us  ratio {packed / unpacked:7.2f}  "
            f"errors {errors[0]:.1e} {errors[1]:.1e}",
            flush=True,
        )


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(int(sys.argv[1]) if len(sys.argv) > 1 else 1)
    for dtype in (torch.bfloat16, torch.float32):
        for rows, columns in _SIZES if dtype == torch.bfloat16 else _SIZES[:3]:
            size = f"{str(dtype)[6:]:<9}{rows:>5} x {columns:<5}"
            group_size = 128 if columns % 128 == 0 else 64
            compare(f"int4 {size} group {group_size}", *int4(rows, columns, group_size, dtype), dtype)
            compare(f"int8 {size} row      ", *int8(rows, columns, dtype), dtype)


if __name__ == "__main__":
    main()
