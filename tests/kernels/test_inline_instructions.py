"""Inline instructions that take several elements at once keep them apart: which elements of a tensor stand together is
for the compiler to choose, and it chooses otherwise for an operand of a product than memory has them."""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import ptx
import pytest

import octavo

_FOLDER = Path(octavo.__file__).parent / "kernels" / "triton"


class Inline(NamedTuple):
    """inputs, outputs: bits of an element of each."""

    text: str
    pack: int
    inputs: list[int]
    outputs: list[int]


# By where it stands, and the name or the first instruction of its text: bits of an element of each input and output.
# Inputs that are left out are the same for all elements.
_BITS: dict[str, tuple[list[int], list[int]]] = {
    "decode_attention._split_pairs.prmt": ([16], [16, 16]),
    "grouped_numbers._bf16_bytes.prmt": ([8], [16]),
    "grouped_numbers._ones._BF16_ONES": ([8], [16]),
    "grouped_numbers._ones._FP16_ONES": ([8], [16]),
    "grouped_numbers._low_and_high._LOOKED_UP": ([8], [16, 16]),
    "grouped_numbers._low_and_high._BF16_NUMBERS": ([8], [16, 16]),
    "grouped_numbers._low_and_high._BF16_LESS": ([8, 16], [16, 16]),
    "grouped_numbers._low_and_high._FP16_LESS": ([8, 16], [16, 16]),
    "grouped_numbers._scaled.mul": ([16, 16], [16]),
    "skinny_gemm._to_operand.prmt": ([8], [16]),
}


def _found() -> Iterator[tuple[str, str, int]]:
    """(where it stands, its text, the elements that it takes) of all inline instructions for several elements."""
    for path in sorted(_FOLDER.glob("*.py")):
        for function in ast.walk(ast.parse(path.read_text())):
            if not isinstance(function, ast.FunctionDef):
                continue
            for node in ast.walk(function):
                if not isinstance(node, ast.Call) or not ast.unparse(node.func).endswith("inline_asm_elementwise"):
                    continue
                pack = next(int(ast.unparse(key.value)) for key in node.keywords if key.arg == "pack")
                if isinstance(node.args[0], ast.Name):
                    name = node.args[0].id
                    text = getattr(importlib.import_module(f"octavo.kernels.triton.{path.stem}"), name).value
                else:
                    text = ast.literal_eval(node.args[0])
                    name = next(word for word in text.replace(";", " ").split() if "." in word and word[0] != ".")
                    name = name.split(".")[0]
                if pack > 1:
                    yield f"{path.stem}.{function.name}.{name}", text, pack


_ALL = {where: Inline(text, pack, *_BITS.get(where, ([], []))) for where, text, pack in _found()}


def _places(bits: list[int], pack: int, first: int) -> list[list[tuple[str, int, int]]]:
    """Of each element of each operand, (register, shift, bits). first: number of the first register."""
    found = []
    for size in bits:
        found.append([(f"${first + size * at // 32}", size * at % 32, size) for at in range(pack)])
        first += -(-size * pack // 32)
    return found


def _leaking(inline: Inline) -> list[tuple[int, int]]:
    """Pairs of elements: the first shows in the result of the second."""
    outputs = _places(inline.outputs, inline.pack, 0)
    first = max(int(name[1:]) for operand in outputs for name, _, _ in operand) + 1
    inputs = _places(inline.inputs, inline.pack, first)
    random = np.random.default_rng(1)
    names = {name for operand in inputs for name, _, _ in operand}
    names |= {f"${number}" for number in map(int, re.findall(r"\$(\d+)", inline.text)) if number >= first}
    registers = {name: random.integers(0, 1 << 32, 300, dtype=np.uint32) for name in names}

    def results(given: dict[str, np.ndarray]) -> list[np.ndarray]:
        made = ptx.run(inline.text, given)
        shown = [[made[name] >> np.uint32(at) & np.uint32((1 << size) - 1) for name, at, size in o] for o in outputs]
        return [np.stack(np.broadcast_arrays(*(operand[at] for operand in shown))) for at in range(inline.pack)]

    before, leaks = results(registers), []
    for operand in inputs:
        for element, (name, at, size) in enumerate(operand):
            other = random.integers(0, 1 << size, 300, dtype=np.uint64).astype(np.uint32)
            keep = ~np.uint32(((1 << size) - 1) << at)
            after = results(registers | {name: registers[name] & keep | other << np.uint32(at)})
            leaks += [(element, to) for to in range(inline.pack) if to != element and (before[to] != after[to]).any()]
    return leaks


def test_all_are_known() -> None:
    assert sorted(_ALL) == sorted(_BITS)


@pytest.mark.parametrize("where", _BITS)
def test_elements_stay_apart(where: str) -> None:
    assert _leaking(_ALL[where]) == []


def test_what_mixes_elements_is_found() -> None:
    """Codes of four bytes as one word, which needs the four that are neighbours in memory."""
    mixing = """{
        .reg .b32 a;
        shr.b32 a, $2, 8;
        lop3.b32 $0, $2, 0x000F000F, 0x43004300, 0xEA;
        lop3.b32 $1, a, 0x000F000F, 0x43004300, 0xEA;
    }"""
    assert (2, 1) in _leaking(Inline(mixing, 4, [8], [16]))
