"""Integer weights with a scale for every group of columns, whatever checkpoint format they come from.

A format (awq.py, gptq.py, ...) unpacks its tensors into Codes, and GroupedScheme keeps and multiplies them all in one
way. In memory, columns lie in chunks, and a chunk holds all rows before the next one begins: a product reads
consecutive bytes, whatever rows and columns it is cut into.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from octavo.kernels import triton as device_kernels
from octavo.quantization.scheme import Fp8Tokens, LinearLayer, LinearShape, TensorSpec
from octavo.quantization.unquantized import UNQUANTIZED, is_skinny

_CHUNKS = (128, 64, 32, 16)  # columns of a chunk
# Tokens from which llama3-8b's products by dequantized weights were faster on an H200, where these lie there.
_PLAIN_FROM = 80
_FEW_ROWS = 32  # of a part: every format can have so many


class Codes(NamedTuple):
    """A part's weights as a format gives them: W[n, k] = (code[n, k] - zero[n, g]) * scale[n, g], or with a minimum,
    code[n, k] * scale[n, g] + minimum[n, g], where g = k // group_size; or with a table, table[code[n, k]] *
    scale[n, g].

    code: uint8 [num_rows, in_features], below 2**bits; scale: floating-point [num_rows, groups]; zero: uint8 as scale,
    None for 2**(bits - 1) everywhere; minimum: float32 as scale, or None; order: int64 [in_features]: column i of
    `code` is multiplied by x[:, order[i]]; None for i. table: float32 [16], of codes of 4 bits that are no numbers.
    """

    code: Tensor
    scale: Tensor
    zero: Tensor | None = None
    minimum: Tensor | None = None
    order: Tensor | None = None
    table: Tensor | None = None


class GroupedFormat(Protocol):
    """How a checkpoint spells such weights. Equal formats compare equal.

    bits: of a code in memory, 4 or 8 (fewer bits of a checkpoint widen to these); group_size: columns that share a
    scale, -1 for all.
    """

    @property
    def bits(self) -> int: ...

    @property
    def group_size(self) -> int: ...

    def tensors(self, in_features: int, num_rows: int) -> dict[str, TensorSpec]:
        """As LinearScheme.tensors."""
        ...

    def codes(self, in_features: int, num_rows: int, tensors: Mapping[str, Tensor]) -> Codes:
        """tensors: as LinearScheme.load has them, on any device. Raises ValueError, in words, for values that cannot
        be."""
        ...


class GroupedWeight(NamedTuple):
    """What is kept: W[n, k] = scale * (code - half - zero) + minimum, where half = 2**(bits - 1), g = k // group_size;
    with a table, scale * table[code].

    packed: uint8 [chunks, N, chunk * bits / 8]. 8 bits: column j of its chunk in byte j; 4 bits: column j in the low
    half of byte j, column j + chunk / 2 in the high half. Either half of a chunk (8 bits: the chunk) is in one group.
    scale: [groups, N], float32, or of 4 bits int32 that holds zero in its low byte and in the others those of a float32
    scale whose low byte is 0, as it is of float16 and bfloat16: one load, and one kernel for both. minimum: float32
    [groups, N], or None for 0; table, order: as in Codes.
    """

    packed: Tensor
    scale: Tensor
    minimum: Tensor | None
    group_size: int
    table: Tensor | None = None
    order: Tensor | None = None

    @property
    def num_bytes(self) -> int:
        tensors = (self.packed, self.scale, self.minimum, self.table, self.order)
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


def weight_of(codes: Codes, bits: int, group_size: int, chunk: int) -> GroupedWeight:
    """The same weights as `codes`. group_size: not -1; chunk: from `chunk_size`."""
    half = 1 << bits - 1
    packed, scale, minimum = pack(codes.code, bits, chunk), codes.scale.t().float().contiguous(), codes.minimum
    zero = torch.zeros_like(scale, dtype=torch.int32)
    if codes.zero is not None:
        zero = codes.zero.t().contiguous().to(torch.int32) - half
    # Less zero, 8 bits could need a ninth, and bfloat16 has eight.
    if bits == 4 and minimum is None and codes.scale.dtype.itemsize == 2:
        words = scale.view(torch.int32) | zero & 255
        return GroupedWeight(packed, words, None, group_size, codes.table, codes.order)
    if minimum is not None:
        minimum = (minimum.t().float() + half * scale).contiguous()
    elif codes.zero is not None:
        minimum = -zero * scale
    return GroupedWeight(packed, scale, minimum, group_size, codes.table, codes.order)


def keeps_codes(device: torch.device) -> bool:
    """Whether weights stay packed. Not on a CPU: torch's operators over packed integers take longer than oneDNN over
    bfloat16 from some 16 tokens on, and 4 to 400 times as long in float32
    (benchmarks/results/integer-formats-2026-11-28.md)."""
    return device.type != "cpu"


def apply_held(layer: LinearLayer, x: Tensor) -> Tensor:
    """x: floating-point [T, in_features], on a GPU. Returns x Wᵀ + bias in x's dtype, where W has the rows of all that
    the layer holds: few tokens by the weights as they lie, more by dequantized ones, which the layer may have too."""
    weights: Sequence[GroupedWeight] | None = layer.held
    if weights is None or (layer.weight is not None and len(x) >= _PLAIN_FROM):
        return UNQUANTIZED.apply(layer, x)
    if len(weights) == 1:
        return _product(x, weights[0], layer.bias)
    rows = [weight.packed.shape[1] for weight in weights]
    biases = [None] * len(rows) if layer.bias is None else layer.bias.split(rows)
    return torch.cat([_product(x, weight, part) for weight, part in zip(weights, biases)], -1)


def apply_held_gated(layer: LinearLayer, x: Tensor | Fp8Tokens) -> Tensor | None:
    """See LinearScheme.apply_gated."""
    weights: Sequence[GroupedWeight] | None = layer.held
    if weights is None:
        return UNQUANTIZED.apply_gated(layer, x)
    if len(weights) > 1 or not is_skinny(x):
        return None
    assert isinstance(x, Tensor)
    return _few(x, weights[0], layer.bias, gated=True)


def _few(x: Tensor, weight: GroupedWeight, bias: Tensor | None, gated: bool = False) -> Tensor:
    product: Tensor = device_kernels.get().grouped_linear(_ordered(x, weight), *weight[:5], bias, gated=gated)
    return product


def _ordered(x: Tensor, weight: GroupedWeight) -> Tensor:
    return x if weight.order is None else x[:, weight.order]


def _product(x: Tensor, weight: GroupedWeight, bias: Tensor | None) -> Tensor:
    kernels = device_kernels.get()
    if 0 < len(x) <= kernels.GROUPED_MAX_M and x.dtype in (torch.bfloat16, torch.float16):
        return _few(x, weight, bias)
    return F.linear(_ordered(x, weight), kernels.dequantize_grouped(*weight[:5], x.dtype), bias)


def launches(weight: GroupedWeight, shape: LinearShape) -> dict[Hashable, Callable[[], object]]:
    """As LinearScheme has them, for a layer that holds such a weight."""
    kernels = device_kernels.get()

    def run(num_tokens: int, gated: bool = False) -> None:
        x = torch.zeros(num_tokens, shape.in_features, dtype=shape.dtype, device=shape.device)
        _few(x, weight, None, gated=True) if gated else _product(x, weight, None)

    if shape.dtype.itemsize != 2:
        return {}
    counts = (8, 16, 32, 64, 128, 256, 512, kernels.GROUPED_MAX_M + 1)
    kind = weight.packed.shape, weight.scale.shape, weight.scale.dtype, weight.minimum is None, weight.table is None
    found = {("grouped", *shape, kind, num_tokens): partial(run, num_tokens) for num_tokens in counts}
    if shape.is_gated:
        found |= {("gated", *shape, kind, num_tokens): partial(run, num_tokens, gated=True) for num_tokens in (8, 16)}
    return found


@dataclass(frozen=True)
class GroupedScheme:
    """A LinearScheme of one format. Keeps GroupedWeights as `held`, as few as there can be, or the dequantized weight
    where codes are not kept, or the columns cannot be cut into chunks."""

    format: GroupedFormat

    fuses = True

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
        group_size = self._group_size(layer.in_features)
        chunk = chunk_size(self.format.bits, group_size, layer.in_features)
        if chunk is None or not keeps_codes(layer.device):
            layer.held.append((row, plain_weight(codes, self.format.bits, group_size).to(layer.dtype)))
        else:
            layer.held.append((row, weight_of(codes, self.format.bits, group_size, chunk)))

    def finish(self, layer: LinearLayer) -> None:
        parts = [part for _, part in sorted(layer.held, key=lambda placed: placed[0])]
        layer.held = None
        if isinstance(parts[0], Tensor):
            layer.weight = nn.Parameter(torch.cat(parts), requires_grad=False)
            UNQUANTIZED.finish(layer)
        else:
            layer.held = joined(parts)

    def num_bytes(self, layer: LinearLayer) -> int:
        return UNQUANTIZED.num_bytes(layer) if layer.held is None else held_bytes(layer.held)

    def launches(self, shape: LinearShape) -> dict[Hashable, Callable[[], object]]:
        """For weights of the kind that the format's dummies make. Codes of 4 bits with scales of 32, where those have
        16, compile when they are launched."""
        group_size = self._group_size(shape.in_features)
        chunk = chunk_size(self.format.bits, group_size, shape.in_features)
        if chunk is None:
            return UNQUANTIZED.launches(shape)
        try:
            specs = self.format.tensors(shape.in_features, _FEW_ROWS)
        except ValueError:
            return {}  # no layer can have this size, and the first that should says so
        generator = torch.Generator(shape.device).manual_seed(0)
        few = {end: spec.make_dummy(generator) for end, spec in specs.items() if spec.required or spec.dummy}
        like = weight_of(self.format.codes(shape.in_features, _FEW_ROWS, few), self.format.bits, group_size, chunk)
        return launches(_of_rows(like, shape.out_features), shape)

    def takes_fp8(self, layer: LinearLayer, like: Tensor) -> bool:  # noqa: ARG002
        return False

    def apply(self, layer: LinearLayer, x: Tensor | Fp8Tokens) -> Tensor:
        assert isinstance(x, Tensor)
        return apply_held(layer, x)

    def apply_gated(self, layer: LinearLayer, x: Tensor | Fp8Tokens) -> Tensor | None:
        return apply_held_gated(layer, x)

    def _group_size(self, in_features: int) -> int:
        return in_features if self.format.group_size == -1 else self.format.group_size


def _of_rows(like: GroupedWeight, num_rows: int) -> GroupedWeight:
    """A weight of zeros of the same kind, in order."""
    num_chunks, _, width = like.packed.shape
    scale = like.scale.new_zeros(len(like.scale), num_rows)
    return like._replace(
        packed=like.packed.new_zeros(num_chunks, num_rows, width),
        scale=scale,
        minimum=None if like.minimum is None else torch.zeros_like(scale),
        order=None,
    )


def plain_weight(codes: Codes, bits: int, group_size: int) -> Tensor:
    """float32 [rows, in_features], by the definition of Codes; the last group may be short."""
    (rows, size), groups = codes.code.shape, codes.scale.shape[1]
    grouped = F.pad(codes.code, (0, groups * group_size - size)).view(rows, groups, group_size).float()
    scale = codes.scale.float()[..., None]
    if codes.minimum is not None:
        grouped = grouped.mul_(scale).add_(codes.minimum.float()[..., None])
    else:
        grouped = grouped.sub_(1 << bits - 1 if codes.zero is None else codes.zero.float()[..., None]).mul_(scale)
    plain = grouped.view(rows, -1)[:, :size]
    return plain if codes.order is None else torch.empty_like(plain).index_copy_(1, codes.order, plain)


def joined(parts: Sequence[GroupedWeight]) -> tuple[GroupedWeight, ...]:
    """The rows of all, which have one format, in as few weights as there can be: neighbours become one where they have
    their columns in one order, and scales of one kind. Parts that are made of the same activations do as a rule."""
    found: list[list[GroupedWeight]] = []
    for part in parts:
        if found and _go_together(found[-1][0], part):
            found[-1].append(part)
        else:
            found.append([part])
    return tuple(_one(run) for run in found)


def _go_together(first: GroupedWeight, second: GroupedWeight) -> bool:
    if first.scale.dtype != second.scale.dtype or (first.minimum is None) != (second.minimum is None):
        return False
    if first.order is None or second.order is None:
        return first.order is second.order
    return torch.equal(first.order, second.order)


def _one(run: Sequence[GroupedWeight]) -> GroupedWeight:
    if len(run) == 1:
        return run[0]
    minimums = [part.minimum for part in run if part.minimum is not None]
    return run[0]._replace(
        packed=torch.cat([part.packed for part in run], 1),
        scale=torch.cat([part.scale for part in run], 1),
        minimum=torch.cat(minimums, 1) if minimums else None,
    )


def held_bytes(weights: Sequence[GroupedWeight]) -> int:
    return sum(weight.num_bytes for weight in weights)
