"""Packs weights as bitsandbytes does, element by element from the definition of its formats."""

from __future__ import annotations

import json

import torch
from torch import Tensor

# As the package's quant_map has them.
NF4_TABLE = [
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
]
FP4_POSITIVE = [0.0, 0.0625 / 12, 8 / 12, 1.0, 4 / 12, 6 / 12, 2 / 12, 3 / 12]
TABLES = {"nf4": torch.tensor(NF4_TABLE), "fp4": torch.tensor(FP4_POSITIVE + [-value for value in FP4_POSITIVE])}


def nearest(values: Tensor, table: Tensor) -> Tensor:
    """uint8: the index of the nearest number of the table."""
    return (values[:, None] - table).abs().argmin(1).to(torch.uint8)


def blockwise(flat: Tensor, table: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Codes of a flat tensor, and the absmax of its blocks."""
    codes, absmax = [], []
    for block in flat.float().split(block_size):
        absmax.append(block.abs().max())
        codes.append(nearest(block * (1 / absmax[-1].clamp(min=1e-38)), table))
    return torch.cat(codes), torch.stack(absmax)


def nf4_codes(weight: Tensor) -> tuple[Tensor, Tensor]:
    return blockwise(weight.flatten(), TABLES["nf4"], 64)


def four_bit(weight: Tensor, table: str, block_size: int = 64) -> tuple[dict[str, Tensor], Tensor]:
    codes, absmax = blockwise(weight.flatten(), TABLES[table], block_size)
    tensors = _tensors(weight, codes, absmax, table, {"blocksize": block_size})
    return tensors, _plain(weight, codes, absmax, table, block_size)


def double_quantized(weight: Tensor, table: str) -> tuple[dict[str, Tensor], Tensor]:
    """absmax less its mean is cut into blocks of 256, each with a table of 256 numbers."""
    codes, absmax = blockwise(weight.flatten(), TABLES[table], 64)
    offset = absmax.mean()
    steps = torch.linspace(-1, 1, 256)
    nested_codes, nested_absmax = blockwise(absmax - offset, steps, 256)
    fields = {"blocksize": 64, "nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": offset.item()}
    tensors = _tensors(weight, codes, nested_codes, table, fields)
    tensors |= {"weight.nested_absmax": nested_absmax, "weight.nested_quant_map": steps}
    restored = steps[nested_codes.int()] * nested_absmax.repeat_interleave(256)[: len(absmax)] + offset
    return tensors, _plain(weight, codes, restored, table, 64)


def _tensors(weight: Tensor, codes: Tensor, absmax: Tensor, table: str, fields: dict[str, object]) -> dict[str, Tensor]:
    state = {"quant_type": table, "dtype": "float32", "shape": list(weight.shape)} | fields
    return {
        "weight": (codes[::2] << 4 | codes[1::2])[:, None],
        "weight.absmax": absmax,
        "weight.quant_map": TABLES[table],
        f"weight.quant_state.bitsandbytes__{table}": torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8),
    }


def _plain(weight: Tensor, codes: Tensor, absmax: Tensor, table: str, block_size: int) -> Tensor:
    wide = TABLES[table][codes.int()] * absmax.repeat_interleave(block_size)[: len(codes)]
    return wide.view(weight.shape)


def int8_rows(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """One scale a row, SCB, its largest magnitude."""
    largest = weight.abs().amax(1)
    codes = (weight * (127 / largest)[:, None]).round().to(torch.int8)
    tensors = {"weight": codes, "SCB": largest, "weight_format": torch.tensor(0, dtype=torch.uint8)}
    return tensors, codes.float() * (largest / 127)[:, None]
