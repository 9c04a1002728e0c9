"""GGUF's tensor types as floating-point numbers (formats: ggml-quants, ggml project).

On a CPU the types that small models come in are vectorised here; the rest go through the gguf package. On a GPU what
can be kept packed is unpacked as it would be then. All give the same float32 values, but for the rounding of a few
types on a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import gguf
import torch
from gguf.quants import dequantize as gguf_dequantize
from torch import Tensor

from octavo.quantization.gguf import PACKED_TYPES, GgufFormat
from octavo.quantization.grouped import plain_weight

_BLOCK = 32  # elements of a block of the types below
_CHUNK = 1 << 14  # blocks that are worked on at once: their temporaries stay in the cache
_DEVICE_CHUNK = 1 << 24  # elements that a GPU works on at once
_FLOATS = {
    gguf.GGMLQuantizationType.F32: torch.float32,
    gguf.GGMLQuantizationType.F16: torch.float16,
    gguf.GGMLQuantizationType.BF16: torch.bfloat16,
    gguf.GGMLQuantizationType.F64: torch.float64,
}


def num_bytes(shape: tuple[int, ...], kind: int) -> int:
    """Bytes that a tensor of this ggml type takes. Raises ValueError for a type or a row length that cannot be."""
    known = {t.value: t for t in gguf.GGMLQuantizationType}
    if kind not in known:
        raise ValueError(f"ggml type {kind} is not known")
    block_size, block_bytes = gguf.GGML_QUANT_SIZES[known[kind]]
    if shape[-1] % block_size:
        raise ValueError(f"rows of {shape[-1]} are not whole blocks of {block_size} ({known[kind].name})")
    return math.prod(shape) // block_size * block_bytes


def dequantize(raw: Tensor, shape: tuple[int, ...], kind: int, dtype: torch.dtype) -> Tensor:
    """raw: uint8 [num_bytes(shape, kind)]. Returns a tensor of this shape and dtype, which may share raw's memory.

    Raises ValueError for a type that cannot be dequantized.
    """
    gguf_type = gguf.GGMLQuantizationType(kind)
    if gguf_type in _FLOATS:
        return raw.view(_FLOATS[gguf_type]).view(shape).to(dtype)
    if raw.device.type != "cpu":
        return dequantize_by_codes(raw, shape, kind, dtype)
    if gguf_type not in _UNPACK:
        return _by_package(raw, gguf_type).view(shape).to(dtype)
    unpack, block_bytes = _UNPACK[gguf_type], gguf.GGML_QUANT_SIZES[gguf_type][1]
    blocks = raw.view(-1, block_bytes)
    out = torch.empty(len(blocks), _BLOCK, dtype=dtype)
    for begin in range(0, len(blocks), _CHUNK):
        unpack(blocks[begin : begin + _CHUNK], out[begin : begin + _CHUNK])
    return out.view(shape)


def dequantize_by_codes(raw: Tensor, shape: tuple[int, ...], kind: int, dtype: torch.dtype) -> Tensor:
    """The same of a quantized type, by the operators of raw's device where they can."""
    if kind not in PACKED_TYPES:
        return _by_package(raw.cpu(), gguf.GGMLQuantizationType(kind)).view(shape).to(raw.device, dtype)
    layout, columns = GgufFormat(kind), shape[-1]
    rows = raw.view(math.prod(shape[:-1]), -1)
    out = torch.empty(len(rows), columns, dtype=dtype, device=raw.device)
    num_at_once = max(1, _DEVICE_CHUNK // columns)
    for begin in range(0, len(rows), num_at_once):
        part = rows[begin : begin + num_at_once]
        codes = layout.codes(columns, len(part), {"weight": part})
        out[begin : begin + num_at_once] = plain_weight(codes, layout.bits, layout.group_size)
    return out.view(shape)


def _by_package(raw: Tensor, gguf_type: gguf.GGMLQuantizationType) -> Tensor:
    block_bytes = gguf.GGML_QUANT_SIZES[gguf_type][1]
    try:
        return torch.from_numpy(gguf_dequantize(raw.numpy().reshape(-1, block_bytes), gguf_type))
    except NotImplementedError as error:
        raise ValueError(f"ggml type {gguf_type.name} cannot be dequantized") from error


def _half(column: Tensor) -> Tensor:
    """A little-endian float16 of every block, uint8 [N, 2], as float32 [N, 1]."""
    return column.contiguous().view(torch.float16).float()


def _q4_0(blocks: Tensor, out: Tensor) -> None:
    scale, packed = _half(blocks[:, :2]), blocks[:, 2:].contiguous()
    out[:, :16] = (packed & 15).float().sub_(8).mul_(scale)
    out[:, 16:] = (packed >> 4).float().sub_(8).mul_(scale)


def _q4_1(blocks: Tensor, out: Tensor) -> None:
    scale, least, packed = _half(blocks[:, :2]), _half(blocks[:, 2:4]), blocks[:, 4:].contiguous()
    out[:, :16] = (packed & 15).float().mul_(scale).add_(least)
    out[:, 16:] = (packed >> 4).float().mul_(scale).add_(least)


def _q8_0(blocks: Tensor, out: Tensor) -> None:
    torch.mul(blocks[:, 2:].view(torch.int8).float(), _half(blocks[:, :2]), out=out)


_UNPACK: dict[gguf.GGMLQuantizationType, Callable[[Tensor, Tensor], None]] = {
    gguf.GGMLQuantizationType.Q4_0: _q4_0,
    gguf.GGMLQuantizationType.Q4_1: _q4_1,
    gguf.GGMLQuantizationType.Q8_0: _q8_0,
}
