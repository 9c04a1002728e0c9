"""Integer weights with a scale for every group of columns, whatever checkpoint format they come from.

A format (awq.py, gptq.py, ...) unpacks its tensors into Codes, and GroupedScheme keeps and multiplies them all in one
way. In memory, columns lie in chunks, and a chunk holds all rows before the next one begins: a product reads
consecutive bytes, whatever rows and columns it is cut into.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from octavo.kernels import triton as device_kernels
from octavo.quantization.scheme import Fp8Tokens, LinearLayer, TensorSpec
from octavo.quantization.unquantized import UNQUANTIZED

_CHUNKS = (128, 64, 32, 16)  # columns of a chunk


class Codes(NamedTuple):
    """A part's weights as a format gives them: W[n, k] = (code[n, k] - zero[n, g]) * scale[n, g], or with a minimum,
    code[n, k] * scale[n, g] + minimum[n, g], where g = k // group_size.

    code: uint8 [num_rows, in_features], below 2**bits; scale: floating-point [num_rows, groups]; zero: uint8 as scale,
    None for 2**(bits - 1) everywhere; minimum: float32 as scale, or None; order: int64 [in_features]: column i of
    `code` is multiplied by x[:, order[i]]; None for i.
    """

    code: Tensor
    scale: Tensor
    zero: Tensor | None = None
    minimum: Tensor | None = None
    order: Tensor | None = None


class GroupedFormat(Protocol):
    """How a checkpoint spells such weights. Equal formats compare equal.

    bits: of a code in memory, 4 or 8 (fewer bits of a checkpoint widen to these); group_size: columns that share a
    scale, -1 for all; is_ordered: whether Codes have an order, which parts need not share.
    """

    @property
    def bits(self) -> int: ...

    @property
    def group_size(self) -> int: ...

    @property
    def is_ordered(self) -> bool: ...

    def tensors(self, in_features: int, num_rows: int) -> dict[str, TensorSpec]:
        """As LinearScheme.tensors."""
        ...

    def codes(self, in_features: int, num_rows: int, tensors: Mapping[str, Tensor]) -> Codes:
        """tensors: as LinearScheme.load has them, on any device. Raises ValueError, in words, for values that cannot
        be."""
        ...


class GroupedWeight(NamedTuple):
    """What is kept: W[n, k] = scale * (code - half - zero) + minimum, where half = 2**(bits - 1), g = k // group_size.

    packed: uint8 [chunks, N, chunk * bits / 8]. 8 bits: column j of its chunk in byte j; 4 bits: column j in the low
    half of byte j, column j + chunk / 2 in the high half. Either half of a chunk (8 bits: the chunk) is in one group.
    scale: [groups, N], float32, or int32 that holds a scale of scale_dtype (float16 or bfloat16) in its low half and
    zero in its high half: one load. minimum: float32 [groups, N], or None for 0; order: as in Codes.
    """

    packed: Tensor
    scale: Tensor
    minimum: Tensor | None
    group_size: int
    scale_dtype: torch.dtype
    order: Tensor | None = None

    @property
    def num_bytes(self) -> int:
        tensors = (self.packed, self.scale, self.minimum, self.order)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def chunk_size(bits: int, group_size: int, in_features: int) -> int | None:
    """Columns of a chunk, None for columns that cannot be cut into chunks. group_size: not -1."""
    parts = 2 if bits == 4 else 1
    for size in _CHUNKS:
        if in_features % size == 0 and group_size % (size // parts) == 0 and in_features % group_size == 0:
            return size
    return None


def pack(code: Tensor, bits: int, chunk: int) -> Tensor:
    """code: uint8 [rows, in_features]. Returns uint8 [chunks, rows, chunk * bits / 8] as GroupedWeight has it."""
    chunks = code.view(len(code), -1, chunk).transpose(0, 1)
    if bits == 8:
        return chunks.contiguous()
    low, high = chunks.split(chunk // 2, -1)
    return (low | high << 4).contiguous()


def unpack(packed: Tensor, bits: int) -> Tensor:
    """The inverse of `pack`: uint8 [rows, in_features]."""
    chunks = packed if bits == 8 else torch.cat((packed & 15, packed >> 4), -1)
    return chunks.transpose(0, 1).reshape(packed.shape[1], -1)


def dequantize(weight: GroupedWeight) -> Tensor:
    """float32 [N, in_features], the columns in the order of the layer's input."""
    groups, n = weight.scale.shape
    bits = 8 if weight.packed.numel() == groups * weight.group_size * n else 4
    number = unpack(weight.packed, bits).float().view(n, groups, weight.group_size) - (1 << bits - 1)
    scale = weight.scale
    if scale.dtype == torch.int32:
        halves = scale.view(torch.int16).view(groups, n, 2)
        number -= halves[..., 1].t()[..., None]
        scale = halves[..., 0].contiguous().view(weight.scale_dtype)
    number *= scale.t()[..., None].float()
    if weight.minimum is not None:
        number += weight.minimum.t()[..., None]
    plain = number.view(n, -1)
    return plain if weight.order is None else torch.empty_like(plain).index_copy_(1, weight.order, plain)


def weight_of(codes: Codes, bits: int, group_size: int, chunk: int) -> GroupedWeight:
    """The same weights as `codes`. group_size: not -1; chunk: from `chunk_size`."""
    half, dtype = 1 << bits - 1, codes.scale.dtype
    packed, scale, minimum = pack(codes.code, bits, chunk), codes.scale.t().contiguous(), codes.minimum
    zero = torch.zeros_like(scale, dtype=torch.int16)
    if codes.zero is not None:
        zero = codes.zero.t().contiguous().to(torch.int16) - half
    # Less zero, 8 bits could need a ninth, and bfloat16 has eight.
    if minimum is None and dtype.itemsize == 2 and (bits == 4 or codes.zero is None):
        words = torch.stack((scale.view(torch.int16), zero), -1).view(torch.int32)[..., 0]
        return GroupedWeight(packed, words, None, group_size, dtype, codes.order)
    scale = scale.float()
    if minimum is not None:
        minimum = (minimum.t().float() + half * scale).contiguous()
    elif codes.zero is not None:
        minimum = -zero * scale
    return GroupedWeight(packed, scale, minimum, group_size, torch.float32, codes.order)


@dataclass(frozen=True)
class GroupedScheme:
    """A LinearScheme of one format. Keeps a GroupedWeight as `held`, or the dequantized weight where the columns
    cannot be cut into chunks."""

    format: GroupedFormat

    @property
    def fuses(self) -> bool:
        return not self.format.is_ordered

    def tensors(self, in_features: int, num_rows: int) -> dict[str, TensorSpec]:
        return self.format.tensors(in_features, num_rows)

    def create_weights(self, layer: LinearLayer) -> None:
        """Room is made as parts arrive, for only they tell what there is besides the codes."""
        layer.held = []

    def load(self, layer: LinearLayer, row: int, num_rows: int, tensors: Mapping[str, Tensor]) -> None:
        """Parts may come in any order; `finish` puts them in that of their rows."""
        # Moved before they are unpacked: fewer bytes, and the device unpacks them.
        moved = {end: tensor.to(layer.device) for end, tensor in tensors.items()}
        codes = self.format.codes(layer.in_features, num_rows, moved)
        group_size = self._group_size(layer)
        chunk = chunk_size(self.format.bits, group_size, layer.in_features)
        if chunk is None:
            layer.held.append((row, plain_weight(codes, self.format.bits, group_size).to(layer.dtype)))
        else:
            layer.held.append((row, weight_of(codes, self.format.bits, group_size, chunk)))

    def finish(self, layer: LinearLayer) -> None:
        parts = [part for _, part in sorted(layer.held, key=lambda placed: placed[0])]
        layer.held = None
        if layer.device.type == "cpu" or isinstance(parts[0], Tensor):
            plain = [part if isinstance(part, Tensor) else dequantize(part).to(layer.dtype) for part in parts]
            layer.weight = nn.Parameter(torch.cat(plain), requires_grad=False)
            UNQUANTIZED.finish(layer)
        else:
            layer.held = parts[0] if len(parts) == 1 else _joined(parts)

    def num_bytes(self, layer: LinearLayer) -> int:
        return UNQUANTIZED.num_bytes(layer) if layer.held is None else layer.held.num_bytes

    def takes_fp8(self, layer: LinearLayer, like: Tensor) -> bool:  # noqa: ARG002
        return False

    def apply(self, layer: LinearLayer, x: Tensor | Fp8Tokens) -> Tensor:
        assert isinstance(x, Tensor)
        held: GroupedWeight | None = layer.held
        if held is None:
            return UNQUANTIZED.apply(layer, x)
        if held.order is not None:
            x = x[:, held.order]
        kernels = device_kernels.get()
        if 0 < len(x) <= kernels.GROUPED_MAX_M and x.dtype in (torch.bfloat16, torch.float16):
            few: Tensor = kernels.grouped_linear(x, *held[:5], layer.bias)
            return few
        weight = kernels.dequantize_grouped(*held[:5], x.dtype)
        return F.linear(x, weight, layer.bias)

    def _group_size(self, layer: LinearLayer) -> int:
        return layer.in_features if self.format.group_size == -1 else self.format.group_size


def plain_weight(codes: Codes, bits: int, group_size: int) -> Tensor:
    """float32 [rows, in_features], by the definition of Codes; the last group may be short."""
    size = codes.code.shape[1]
    scale = codes.scale.float().repeat_interleave(group_size, 1)[:, :size]
    code = codes.code.float()
    if codes.minimum is not None:
        plain = code * scale + codes.minimum.float().repeat_interleave(group_size, 1)[:, :size]
    elif codes.zero is not None:
        plain = (code - codes.zero.float().repeat_interleave(group_size, 1)[:, :size]) * scale
    else:
        plain = (code - (1 << bits - 1)) * scale
    return plain if codes.order is None else torch.empty_like(plain).index_copy_(1, codes.order, plain)


def _joined(parts: list[GroupedWeight]) -> GroupedWeight:
    """The rows of all, which have one format and no order."""
    kinds = {(part.scale.dtype, part.scale_dtype, part.minimum is None) for part in parts}
    assert len(kinds) == 1, f"parts of one format are kept in {len(kinds)} ways"
    minimums = [part.minimum for part in parts if part.minimum is not None]
    return parts[0]._replace(
        packed=torch.cat([part.packed for part in parts], 1),
        scale=torch.cat([part.scale for part in parts], 1),
        minimum=torch.cat(minimums, 1) if minimums else None,
    )
