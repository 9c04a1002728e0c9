"""GGUF's blocks, kept as integer weights by groups (formats: ggml-quants, ggml project).

A block is some numbers of a row with their scales. What a type's bytes say becomes Codes exactly: types of four bits
have codes of four, those of five, six and eight bits have codes of eight, moved to where 128 stands for their middle.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import gguf
import torch
from torch import Tensor

from octavo.quantization.grouped import Codes, GroupedScheme
from octavo.quantization.scheme import LinearScheme, TensorSpec
from octavo.quantization.unquantized import UNQUANTIZED

_MIDDLE = 128  # what a code of eight bits is, where Codes have no zero
_NUM_SCALE_BYTES = 12  # of Q4_K and Q5_K: eight scales and eight minimums of six bits


class _Blocks(NamedTuple):
    """What N blocks say. code: uint8 [N, elements]; scale, minimum: [N, groups]."""

    code: Tensor
    scale: Tensor
    minimum: Tensor | None = None


@dataclass(frozen=True)
class _Type:
    """unpack: uint8 [N, bytes of a block] to what it says. halves: where a block's float16 numbers are, and what they
    are in a model without a checkpoint: weights of a standard deviation of 0.02, about zero."""

    bits: int
    group_size: int
    unpack: Callable[[Tensor], _Blocks]
    halves: Mapping[int, float]


def _half(blocks: Tensor, at: int) -> Tensor:
    """The little-endian float16 at a byte of every block, [N, 1]."""
    return blocks[:, at : at + 2].contiguous().view(torch.float16)


def _fields(packed: Tensor, width: int, run: int) -> Tensor:
    """Fields of `width` bits. packed: uint8 [N, bytes], runs of `run` bytes: a run holds the lowest bits of all its
    bytes first, then the next. Returns uint8 [N, bytes * 8 / width]."""
    shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=packed.device)
    fields = packed.reshape(len(packed), -1, 1, run) >> shifts[:, None] & (1 << width) - 1
    return fields.flatten(1)


def _q4_0(blocks: Tensor) -> _Blocks:
    return _Blocks(_fields(blocks[:, 2:], 4, 16), _half(blocks, 0))


def _q4_1(blocks: Tensor) -> _Blocks:
    return _Blocks(_fields(blocks[:, 4:], 4, 16), _half(blocks, 0), _half(blocks, 2).float())


def _q5_0(blocks: Tensor) -> _Blocks:
    code = _fields(blocks[:, 6:], 4, 16) | _fields(blocks[:, 2:6], 1, 1) << 4
    return _Blocks(code + (_MIDDLE - 16), _half(blocks, 0))


def _q5_1(blocks: Tensor) -> _Blocks:
    code = _fields(blocks[:, 8:], 4, 16) | _fields(blocks[:, 4:8], 1, 1) << 4
    return _centred(code, _half(blocks, 0).float(), _half(blocks, 2).float())


def _q8_0(blocks: Tensor) -> _Blocks:
    return _Blocks(blocks[:, 2:] ^ _MIDDLE, _half(blocks, 0))  # from two's complement


def _q4_k(blocks: Tensor) -> _Blocks:
    return _Blocks(_fields(blocks[:, 4 + _NUM_SCALE_BYTES :], 4, 32), *_scales_of_k(blocks))


def _q5_k(blocks: Tensor) -> _Blocks:
    high, low = blocks[:, 4 + _NUM_SCALE_BYTES :].split((32, 128), 1)
    return _centred(_fields(low, 4, 32) | _fields(high, 1, 32) << 4, *_scales_of_k(blocks))


def _q6_k(blocks: Tensor) -> _Blocks:
    low, high, scales, _ = blocks.split((128, 64, 16, 2), 1)
    code = _fields(low, 4, 64) | _fields(high, 2, 32) << 4
    return _Blocks(code + (_MIDDLE - 32), scales.contiguous().view(torch.int8).float() * _half(blocks, 208).float())


def _scales_of_k(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Scales and minimums, float32 [N, 8]. The first four of each are the low six bits of a byte; the others are four
    bits of a third row of bytes, below the two bits that are left above the first four."""
    scale, minimum, rest = blocks[:, 4 : 4 + _NUM_SCALE_BYTES].split(4, 1)
    scales = torch.cat((scale & 63, rest & 15 | scale >> 2 & 48), 1)
    minimums = torch.cat((minimum & 63, rest >> 4 | minimum >> 2 & 48), 1)
    return _half(blocks, 0).float() * scales.float(), -_half(blocks, 2).float() * minimums.float()


def _centred(code: Tensor, scale: Tensor, minimum: Tensor) -> _Blocks:
    """Codes of five bits about the middle of eight: what is multiplied stays small."""
    up = _MIDDLE - 16
    return _Blocks(code + up, scale, minimum - up * scale)


_TYPES = {
    gguf.GGMLQuantizationType.Q4_0: _Type(4, 32, _q4_0, {0: 0.0043}),
    gguf.GGMLQuantizationType.Q4_1: _Type(4, 32, _q4_1, {0: 0.0043, 2: -0.0325}),
    gguf.GGMLQuantizationType.Q5_0: _Type(8, 32, _q5_0, {0: 0.0022}),
    gguf.GGMLQuantizationType.Q5_1: _Type(8, 32, _q5_1, {0: 0.0022, 2: -0.0335}),
    gguf.GGMLQuantizationType.Q8_0: _Type(8, 32, _q8_0, {0: 0.00027}),
    gguf.GGMLQuantizationType.Q4_K: _Type(4, 32, _q4_k, {0: 7.7e-5, 2: 5.8e-4}),
    gguf.GGMLQuantizationType.Q5_K: _Type(8, 32, _q5_k, {0: 3.8e-5, 2: 5.9e-4}),
    gguf.GGMLQuantizationType.Q6_K: _Type(8, 16, _q6_k, {208: 1.5e-5}),
}
PACKED_TYPES = frozenset(kind.value for kind in _TYPES)  # ggml type numbers


@dataclass(frozen=True)
class GgufFormat:
    """A GroupedFormat. kind: one of PACKED_TYPES."""

    kind: int

    @property
    def bits(self) -> int:
        return self._type.bits

    @property
    def group_size(self) -> int:
        return self._type.group_size

    def tensors(self, in_features: int, num_rows: int) -> dict[str, TensorSpec]:
        """One tensor, uint8: the bytes of every row."""
        block_size, block_bytes = self._sizes
        if in_features % block_size:
            raise ValueError(f"rows of {in_features} are not whole blocks of {block_size} ({self._name})")
        shape = num_rows, in_features // block_size * block_bytes

        def random_blocks(generator: torch.Generator) -> Tensor:
            raw = torch.randint(256, shape, dtype=torch.uint8, device=generator.device, generator=generator)
            blocks = raw.view(-1, block_bytes)
            for at, value in self._type.halves.items():
                half = torch.tensor([value], dtype=torch.float16, device=raw.device)
                blocks[:, at : at + 2] = half.view(torch.uint8)
            return raw

        return {"weight": TensorSpec(shape=shape, dtypes=(torch.uint8,), dummy=random_blocks)}

    def codes(self, in_features: int, num_rows: int, tensors: Mapping[str, Tensor]) -> Codes:
        blocks = tensors["weight"].reshape(-1, self._sizes[1])
        if not all(_half(blocks, at).isfinite().all() for at in self._type.halves):
            raise ValueError(f"a scale of its {self._name} blocks is not finite")
        code, scale, minimum = self._type.unpack(blocks)
        return Codes(
            code.view(num_rows, in_features),
            scale.reshape(num_rows, -1),
            minimum=None if minimum is None else minimum.reshape(num_rows, -1),
        )

    @property
    def _type(self) -> _Type:
        return _TYPES[gguf.GGMLQuantizationType(self.kind)]

    @property
    def _name(self) -> str:
        return gguf.GGMLQuantizationType(self.kind).name

    @property
    def _sizes(self) -> tuple[int, int]:
        """Elements and bytes of a block."""
        return gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(self.kind)]


class GgufMethod:
    """Each part in the type that the file has it in; parts of types that are not kept packed come dequantized."""

    def __init__(self, types: Mapping[str, int]) -> None:
        """types: ggml type numbers by the names of parts."""
        self._schemes: dict[str, LinearScheme] = {
            name: GroupedScheme(GgufFormat(kind)) for name, kind in types.items() if kind in PACKED_TYPES
        }

    def scheme_of(self, name: str) -> LinearScheme:
        return self._schemes.get(name, UNQUANTIZED)


def read_config(declared: Mapping[str, Any]) -> GgufMethod:
    """declared: what loading says of a GGUF file, {"quant_method": "gguf", "types": {part: ggml type number}}.

    Raises ValueError for a checkpoint that is not such a file.
    """
    if not isinstance(declared.get("types"), Mapping):
        raise ValueError("config field quantization_config.quant_method='gguf' is not supported outside a .gguf file")
    return GgufMethod(declared["types"])
