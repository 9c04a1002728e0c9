"""Products by packed integer weights: every layout and way to cut them up, against float64."""

from __future__ import annotations

import numpy as np
import ptx
import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.kernels.reference import grouped_gemm as reference
from octavo.kernels.triton.activation import silu_and_mul
from octavo.kernels.triton.grouped_gemm import GroupedPlan, dequantize_grouped, grouped_linear
from octavo.kernels.triton.grouped_numbers import _BF16_NUMBERS, _LOOKED_UP, _table_words
from octavo.quantization.four_bit import TABLES, CodeTable
from octavo.quantization.grouped import Codes, chunk_size, weight_of

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PLANS = [
    GroupedPlan(8, 32, num_warps=2, swap=True),
    GroupedPlan(16, 64, split_k=3, swap=True, unroll=2),
    GroupedPlan(32, 64, scale_first=True, swap=True),
    GroupedPlan(16, 32, split_k=2, scale_first=True),
]
CASES = [(4, 128, 256), (4, 64, 128), (4, 32, 96), (4, 192, 192), (8, 128, 256), (8, 16, 80), (8, 96, 96), (4, 96, 192)]


def weight(
    bits: int, group_size: int, k: int, kind: str, n: int = 40, dtype: torch.dtype = torch.float16
) -> tuple[Tensor, Tensor, Tensor | None, int, Tensor | None]:
    """What the kernels take. kind: of "plain", "zeros", "minimums", "table"; dtype: of the scales."""
    generator = torch.Generator().manual_seed(k + bits)
    code = torch.randint(0, 1 << bits, (n, k), generator=generator, dtype=torch.uint8)
    groups = n, k // group_size
    scale = (torch.rand(groups, generator=generator) / (1 << bits) + 0.01).to(dtype)
    zero = torch.randint(0, 1 << bits, groups, generator=generator, dtype=torch.uint8) if kind == "zeros" else None
    minimum = torch.randn(groups, generator=generator) if kind == "minimums" else None
    table = torch.linspace(-1, 1, 16) ** 3 if kind == "table" else None
    chunk = chunk_size(bits, group_size, k)
    assert chunk is not None
    made = weight_of(
        Codes(code, scale.float() if kind == "table" else scale, zero, minimum, None, table), bits, group_size, chunk
    )
    return tuple(part.to(DEVICE) if isinstance(part, Tensor) else part for part in made[:5])


def assert_close(got: Tensor, expected: Tensor, units: float) -> None:
    assert got.dtype == expected.dtype
    assert got.isfinite().all()
    error = (got.double() - expected.double()).abs()
    step = 2**-8 if got.dtype == torch.bfloat16 else 2**-11
    slack = units * step * (expected.double().abs() + expected.double().abs().max() / 4)
    assert (error <= slack).all(), f"off by up to {(error / slack).max().item()} of what is allowed"


@pytest.mark.parametrize("kind", ["plain", "zeros", "minimums"])
@pytest.mark.parametrize("case", CASES)
def test_every_layout(case: tuple[int, int, int], kind: str) -> None:
    k = case[2]
    for number, plan in enumerate(PLANS):
        dtype = torch.bfloat16 if number % 2 else torch.float16
        made = weight(*case, kind, dtype=dtype)
        x = torch.randn(5, k, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype)
        bias = torch.randn(40, generator=torch.Generator().manual_seed(2)).to(DEVICE, dtype) if number else None
        got = grouped_linear(x, *made, bias, plan=plan)
        # Rounding of scaled numbers is by half a unit each; a group's product is exact up to the sum.
        assert_close(got, reference.grouped_linear(x, *made, bias), 4.0 if plan.scale_first else 1.0)


@pytest.mark.parametrize("plan", [None, *PLANS])
@pytest.mark.parametrize("kind", ["plain", "zeros", "minimums", "table"])
def test_gated_is_the_activation_of_the_product(kind: str, plan: GroupedPlan | None) -> None:
    made = weight(4, 64, 128, kind, n=84)  # 42 gates: no whole number of tiles
    x = torch.randn(5, 128, generator=torch.Generator().manual_seed(1)).to(DEVICE, torch.bfloat16)
    got = grouped_linear(x, *made, plan=plan, gated=True)
    assert torch.equal(got, silu_and_mul(grouped_linear(x, *made, plan=plan)))
    # A gate and what it is for are rounded each, and their product.
    assert_close(got, reference.grouped_linear(x, *made, gated=True), 4.0)


@pytest.mark.parametrize("m", [1, 16, 33, 70])
def test_the_rule_serves_any_number_of_tokens(m: int) -> None:
    made = weight(4, 64, 128, "zeros", n=72)
    x = torch.randn(m, 128, generator=torch.Generator().manual_seed(m)).to(DEVICE, torch.bfloat16)
    assert_close(grouped_linear(x, *made), reference.grouped_linear(x, *made), 4.0)


@pytest.mark.parametrize("case", CASES)
def test_dequantized(case: tuple[int, int, int]) -> None:
    for kind in ("plain", "zeros", "minimums"):
        made = weight(*case, kind)
        expected = reference.dequantize_grouped(*made, torch.float32)
        torch.testing.assert_close(dequantize_grouped(*made, torch.float32), expected, rtol=1e-6, atol=1e-6)


def test_what_does_not_fit_is_refused() -> None:
    made = weight(4, 64, 128, "plain")
    x = torch.zeros(1, 128, dtype=torch.bfloat16, device=DEVICE)
    with pytest.raises(ValueError, match="do not fit"):
        grouped_linear(x[:, :96], *made)
    with pytest.raises(ValueError, match=r"expected \[1, 40\]"):
        grouped_linear(x, *made[:3], 128)
    with pytest.raises(ValueError, match=r"expected torch\.bfloat16 or"):
        grouped_linear(x.float(), *made)


def test_codes_of_a_table() -> None:
    x = torch.randn(5, 128, generator=torch.Generator().manual_seed(1)).to(DEVICE, torch.bfloat16)
    for group_size in (64, 128, 32):
        made = weight(4, group_size, 128, "table")
        expected = reference.dequantize_grouped(*made, torch.float32)
        torch.testing.assert_close(dequantize_grouped(*made, torch.float32), expected, rtol=1e-6, atol=1e-6)
        for plan in PLANS:  # numbers of a table are rounded to the dtype, too
            assert_close(grouped_linear(x, *made, plan=plan), reference.grouped_linear(x, *made), 4.0)


@triton.jit
def _store_table_words(table_ptr, out_ptr, DTYPE: tl.constexpr):
    words = _table_words(table_ptr, True, DTYPE)
    for index in tl.static_range(8):
        tl.store(out_ptr + index + tl.zeros((1, 1), tl.int32), words[index])


# By nibble of a word: its number, of the four bytes' low codes, then of their high ones. Each byte's numbers stand
# where the byte does, so that it does not matter which bytes a layout puts together.
_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)


def test_instructions_that_take_codes_apart() -> None:
    words = np.random.default_rng(1).integers(0, 1 << 32, 200, dtype=np.uint32)
    found = ptx.run(_BF16_NUMBERS.value, {"$4": words})
    for nibble, number in enumerate(_ORDER):
        bits = found[f"${number // 2}"] >> 16 * (number % 2) & 0xFFFF
        expected = torch.from_numpy((words >> 4 * nibble & 15).astype(np.int32) + 128).bfloat16()
        np.testing.assert_array_equal(bits, expected.view(torch.int16).numpy().view(np.uint16))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_instructions_that_look_codes_up(name: CodeTable, dtype: torch.dtype) -> None:
    table = torch.tensor(TABLES[name], device=DEVICE)
    words = torch.zeros(8, dtype=torch.int32, device=DEVICE)
    _store_table_words[(1,)](table, words, DTYPE=tl.bfloat16 if dtype == torch.bfloat16 else tl.float16)
    codes = np.stack([np.roll(np.arange(256, dtype=np.uint32), 37 * position) for position in range(4)])
    inputs = {"$4": codes[0] | codes[1] << 8 | codes[2] << 16 | codes[3] << 24}
    for index, word in enumerate(words.cpu().numpy().view(np.uint32)):
        inputs |= {f"${5 + 4 * index + copy}": np.full(256, word) for copy in range(4)}
    found = ptx.run(_LOOKED_UP.value, inputs)
    expected = table.cpu().to(dtype).view(torch.int16).numpy().view(np.uint16)
    word = inputs["$4"]
    for nibble, number in enumerate(_ORDER):
        register = found[f"${number // 2}"]
        np.testing.assert_array_equal(register >> 16 * (number % 2) & 0xFFFF, expected[word >> 4 * nibble & 15])
