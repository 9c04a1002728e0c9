"""4-bit codes of a table, scaled by the largest magnitude of each block (NF4: Dettmers et al., 2023, "QLoRA"; FP4: a
sign, two bits of exponent, one of mantissa), in memory: how bitsandbytes keeps weights.

Blocks follow one another in the flat matrix; where they end with its rows, they are groups of columns.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from octavo.quantization.grouped import (
    Codes,
    GroupedWeight,
    apply_held,
    apply_held_gated,
    chunk_size,
    held_bytes,
    joined,
    keeps_codes,
    launches,
    weight_of,
)
from octavo.quantization.scheme import Fp8Tokens, LinearLayer, LinearShape, TensorSpec
from octavo.quantization.unquantized import UNQUANTIZED
from octavo.quantization.values import pieces

CodeTable = Literal["nf4", "fp4"]
# The 16 quantiles of a normal distribution that QLoRA gives, as bitsandbytes rounds them; multiples of a twelfth.
TABLES: dict[CodeTable, tuple[float, ...]] = {
    "nf4": (
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ),
    "fp4": tuple(value / 12 for value in (0, 0.0625, 8, 12, 4, 6, 2, 3, -0.0, -0.0625, -8, -12, -4, -6, -2, -3)),
}
_CHUNK_ELEMENTS = 16 << 20  # quantized at once, a multiple of every block size


class FourBitWeight(NamedTuple):
    """W[i] = table[code[i]] * absmax[i // block_size], where i counts the elements row by row.

    packed: uint8 [ceil(elements / 2)], the first of two codes in the high half; absmax: float32 [blocks].
    """

    packed: Tensor
    absmax: Tensor
    block_size: int


class FourBitFormat(Protocol):
    """Where such weights come from. Equal formats compare equal."""

    @property
    def table(self) -> CodeTable: ...

    def tensors(self, in_features: int, num_rows: int) -> dict[str, TensorSpec]:
        """As LinearScheme.tensors."""
        ...

    def weight(
        self, in_features: int, num_rows: int, tensors: Mapping[str, Tensor], device: torch.device
    ) -> FourBitWeight:
        """tensors: as LinearScheme.load has them. Raises ValueError, in words, for values that cannot be."""
        ...


@dataclass(frozen=True)
class FourBitScheme:
    """Keeps GroupedWeights with a table as `held`, or the dequantized weight where codes are not kept, or blocks do
    not end with the rows."""

    format: FourBitFormat

    fuses = True

    def tensors(self, in_features: int, num_rows: int) -> dict[str, TensorSpec]:
        if in_features * num_rows % 2:
            raise ValueError(
                f"a weight of {num_rows} x {in_features} elements has no 4-bit format; allowed: even sizes"
            )
        return self.format.tensors(in_features, num_rows)

    def create_weights(self, layer: LinearLayer) -> None:
        """Room is made as parts arrive, for only they tell the size of their blocks."""
        layer.held = []

    def load(self, layer: LinearLayer, row: int, num_rows: int, tensors: Mapping[str, Tensor]) -> None:
        """Parts may come in any order; `finish` puts them in that of their rows."""
        part = self.format.weight(layer.in_features, num_rows, tensors, layer.device)
        layer.held.append((row, part))

    def finish(self, layer: LinearLayer) -> None:
        parts: list[FourBitWeight] = [part for _, part in sorted(layer.held, key=lambda placed: placed[0])]
        layer.held, size = None, parts[0].block_size
        chunk = chunk_size(4, size, layer.in_features)
        if chunk is not None and keeps_codes(layer.device) and all(part.block_size == size for part in parts):
            layer.held = joined([self._grouped(part, layer.in_features, chunk) for part in parts])
            return
        pairs = _pairs(self.format.table, layer.device)
        plain = [dequantize(part, pairs, layer.in_features, layer.dtype) for part in parts]
        layer.weight = nn.Parameter(torch.cat(plain), requires_grad=False)
        UNQUANTIZED.finish(layer)

    def _grouped(self, part: FourBitWeight, in_features: int, chunk: int) -> GroupedWeight:
        packed = part.packed.view(-1, in_features // 2)
        code = torch.stack((packed >> 4, packed & 15), -1).view(-1, in_features)
        table = torch.tensor(TABLES[self.format.table], device=packed.device)
        absmax = part.absmax.view(-1, in_features // part.block_size)
        return weight_of(Codes(code, absmax, table=table), 4, part.block_size, chunk)

    def num_bytes(self, layer: LinearLayer) -> int:
        return UNQUANTIZED.num_bytes(layer) if layer.held is None else held_bytes(layer.held)

    def launches(self, shape: LinearShape) -> dict[Hashable, Callable[[], object]]:
        """For blocks of 64."""
        chunk = chunk_size(4, 64, shape.in_features)
        if chunk is None:
            return UNQUANTIZED.launches(shape)
        packed = torch.zeros(shape.out_features * shape.in_features // 2, dtype=torch.uint8, device=shape.device)
        absmax = torch.zeros(len(packed) // 32, device=shape.device)
        return launches(self._grouped(FourBitWeight(packed, absmax, 64), shape.in_features, chunk), shape)

    def takes_fp8(self, layer: LinearLayer, like: Tensor) -> bool:  # noqa: ARG002
        return False

    def apply(self, layer: LinearLayer, x: Tensor | Fp8Tokens) -> Tensor:
        assert isinstance(x, Tensor)
        return apply_held(layer, x)

    def apply_gated(self, layer: LinearLayer, x: Tensor | Fp8Tokens) -> Tensor | None:
        return apply_held_gated(layer, x)


@dataclass(frozen=True)
class OnlineNf4:
    """A FourBitFormat: a plain checkpoint's weights, quantized while they are loaded, with float32 absmax."""

    block_size: int = 64

    table: ClassVar[CodeTable] = "nf4"

    def tensors(self, in_features: int, num_rows: int) -> dict[str, TensorSpec]:
        return {"weight": TensorSpec(shape=(num_rows, in_features))}

    def weight(
        self,
        in_features: int,  # noqa: ARG002
        num_rows: int,  # noqa: ARG002
        tensors: Mapping[str, Tensor],
        device: torch.device,
    ) -> FourBitWeight:
        return quantize_nf4(tensors["weight"].to(device), self.block_size)


def quantize_nf4(weight: Tensor, block_size: int) -> FourBitWeight:
    """weight: floating-point, of an even number of elements. Each element, divided by the largest magnitude of its
    block, becomes the nearest code."""
    table, flat = torch.tensor(TABLES["nf4"], device=weight.device), weight.flatten()
    middles, packed, absmax = (table[:-1] + table[1:]) / 2, [], []
    for begin in range(0, len(flat), _CHUNK_ELEMENTS):
        part = flat[begin : begin + _CHUNK_ELEMENTS].float()
        blocks = F.pad(part, (0, -len(part) % block_size)).view(-1, block_size)
        largest = blocks.abs().amax(1)
        # By the reciprocal, as bitsandbytes does it: a quotient may round to the other side of a middle.
        scaled = blocks * (1.0 / largest.clamp(min=1e-38))[:, None]
        code = torch.bucketize(scaled.flatten()[: len(part)], middles, out_int32=True).to(torch.uint8)
        packed.append(code[::2] << 4 | code[1::2])
        absmax.append(largest)
    return FourBitWeight(torch.cat(packed), torch.cat(absmax), block_size)


def _pairs(table: CodeTable, device: torch.device) -> Tensor:
    """float32 [256, 2]: the two numbers of every byte."""
    values, byte = torch.tensor(TABLES[table], device=device), torch.arange(256, device=device)
    return torch.stack((values[byte >> 4], values[byte & 15]), -1)


def dequantize(weight: FourBitWeight, pairs: Tensor, in_features: int, dtype: torch.dtype) -> Tensor:
    """pairs: from `_pairs`. Returns [rows, in_features], rounded once."""
    packed, absmax, block_size = weight
    if in_features % block_size:
        wide = F.embedding(packed.int(), pairs).flatten()
        return (wide * absmax.repeat_interleave(block_size)[: len(wide)]).view(-1, in_features).to(dtype)
    rows, scales = packed.view(-1, in_features // 2), absmax.view(-1, in_features // block_size, 1)
    plain = torch.empty(len(rows), in_features, dtype=dtype, device=packed.device)
    for some in pieces(plain):
        numbers = F.embedding(rows[some].int(), pairs).view(-1, in_features // block_size, block_size)
        plain[some] = (numbers * scales[some]).view(-1, in_features)
    return plain


NF4 = FourBitScheme(OnlineNf4())
