"""Runs the few PTX instructions that kernels have inline, on arrays of registers."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import numpy as np
import torch

Registers = dict[str, np.ndarray]  # uint32; those of 16 bits have the others 0


def run(text: str, inputs: Mapping[str, np.ndarray]) -> Registers:
    """Registers after the instructions, which read `inputs`. Raises KeyError for an instruction that is not known."""
    registers = dict(inputs)
    for line in text.strip().removeprefix("{").removesuffix("}").split(";"):
        name, *operands = re.findall(r"[^\s,{}]+", line) or [""]
        if name in ("", ".reg"):
            continue
        if name == "mov.b32" and len(operands) == 3:  # a word into two halves
            low, high, word = operands
            registers[low], registers[high] = registers[word] & np.uint32(0xFFFF), registers[word] >> np.uint32(16)
            continue
        target, *read = operands
        values = [registers[word] if word in registers else np.uint32(int(word, 0)) for word in read]
        registers[target] = _INSTRUCTIONS[name](*values)
    return registers


def _permuted(a: np.ndarray, b: np.ndarray, selector: np.ndarray) -> np.ndarray:
    """Byte i is that of the eight of b:a which bits 4i to 4i + 2 of the selector name; with bit 4i + 3 its sign, eight
    times."""
    bytes_of = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
    result = np.zeros_like(bytes_of + selector.astype(np.uint64))
    for index in range(4):
        chosen = selector.astype(np.uint64) >> np.uint64(4 * index) & np.uint64(15)
        byte = bytes_of >> (chosen & np.uint64(7)) * np.uint64(8) & np.uint64(255)
        byte = np.where(chosen & np.uint64(8), (byte >> np.uint64(7)) * np.uint64(255), byte)
        result |= byte << np.uint64(8 * index)
    return result.astype(np.uint32)


def _logic(a: np.ndarray, b: np.ndarray, c: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Of each three bits, the bit of the table that they number; a is the highest."""
    result = np.zeros_like(a | b | c)
    for number in range(8):
        if int(table) >> number & 1:
            bits = [value if number >> place & 1 else ~value for value, place in ((a, 2), (b, 1), (c, 0))]
            result |= bits[0] & bits[1] & bits[2]
    return result


def _in_halves(dtype: torch.dtype, compute: Callable[..., torch.Tensor]) -> Callable[..., np.ndarray]:
    """An instruction for two numbers of 16 bits in each register."""

    def run_one(*operands: np.ndarray) -> np.ndarray:
        shape = np.broadcast_shapes(*(np.shape(operand) for operand in operands))
        words = [np.array(np.broadcast_to(operand, shape), dtype=np.uint32) for operand in operands]
        numbers = [torch.from_numpy(word.view(np.int16).copy()).view(dtype).float() for word in words]
        made: np.ndarray = compute(*numbers).to(dtype).view(torch.int16).numpy().view(np.uint32)
        return made.reshape(shape)

    return run_one


def _from_fp8(pair: np.ndarray) -> np.ndarray:
    """Two float8_e4m3 in 16 bits as two float16."""
    eights = torch.from_numpy(pair.astype(np.uint16).view(np.uint8).copy()).view(torch.float8_e4m3fn)
    made: np.ndarray = eights.half().view(torch.int16).numpy().view(np.uint32)
    return made


_INSTRUCTIONS: dict[str, Callable[..., np.ndarray]] = {
    "and.b32": np.bitwise_and,
    "xor.b32": np.bitwise_xor,
    "shr.b32": np.right_shift,
    "mov.b32": lambda value: value,
    "prmt.b32": _permuted,
    "lop3.b32": _logic,
    "mul.rn.bf16x2": _in_halves(torch.bfloat16, torch.mul),
    "sub.rn.bf16x2": _in_halves(torch.bfloat16, torch.sub),
    "sub.rn.f16x2": _in_halves(torch.float16, torch.sub),
    "cvt.rn.f16x2.e4m3x2": _from_fp8,
}
