"""Checkpoints of bitsandbytes (quant_method "bitsandbytes"): 4-bit codes of NF4 or FP4, and 8-bit integers.

The integers of LLM.int8() (Dettmers et al., 2022) are multiplied as W8A16: activations stay in full, so there are no
outliers to take apart, and llm_int8_threshold has nothing to decide.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from octavo.quantization.config_fields import Fields
from octavo.quantization.four_bit import TABLES, CodeTable, FourBitScheme, FourBitWeight
from octavo.quantization.grouped import Codes, GroupedScheme
from octavo.quantization.scheme import QuantizationMethod, TensorSpec
from octavo.quantization.unquantized import EveryLayer
from octavo.quantization.values import DUMMY_STD, Dummy, check_scales, full, integers, known

_BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
_NESTED_BLOCK_SIZE = 256
_TABLE_SLACK = 1e-4  # packers of different devices round the table differently
_DUMMY_ABSMAX = DUMMY_STD / 0.59  # 0.59: the standard deviation of NF4's table
_INT8_STD = 255 / 12**0.5  # of integers that are spread evenly
# Of how a checkpoint was made, and of activations: those here are of the model's dtype.
_BOOKKEEPING = ("bnb_4bit_compute_dtype", "llm_int8_threshold", "llm_int8_enable_fp32_cpu_offload")


def bitsandbytes(values: Mapping[str, Any]) -> QuantizationMethod:
    """values: the quantization_config. Raises ValueError naming a field and its value that are not supported."""
    fields = Fields(values)
    fields.choice("quant_method", ("bitsandbytes",))
    is_4bit, is_8bit = (fields.flag(name, fields.flag(f"_{name}", False)) for name in ("load_in_4bit", "load_in_8bit"))
    if is_4bit == is_8bit:
        raise fields.refused("load_in_4bit", "true, where load_in_8bit is not, or the other way round")
    table = fields.choice("bnb_4bit_quant_type", tuple(TABLES), "fp4")
    nested = fields.flag("bnb_4bit_use_double_quant", False)
    fields.choice("bnb_4bit_quant_storage", ("uint8",), "uint8")
    fields.choice("llm_int8_has_fp16_weight", (False,), False)
    skipped = fields.strings("llm_int8_skip_modules")
    fields.finish(*_BOOKKEEPING)
    return EveryLayer(FourBitScheme(StoredFourBit(table, nested)) if is_4bit else GroupedScheme(Int8Rows()), skipped)


@dataclass(frozen=True)
class Int8Rows:
    """A GroupedFormat: one scale a row, W = weight * SCB / 127."""

    bits = 8
    group_size = -1

    def tensors(self, in_features: int, num_rows: int) -> dict[str, TensorSpec]:
        shape = num_rows, in_features
        return {
            "weight": TensorSpec(shape=shape, dtypes=(torch.int8,), dummy=integers(-127, 128, torch.int8, *shape)),
            "SCB": TensorSpec(shape=(num_rows,), dummy=full(127 * DUMMY_STD / _INT8_STD, num_rows)),
            "weight_format": TensorSpec(shape=(), other_shapes=((1,),), dtypes=(torch.uint8,), required=False),
        }

    def codes(self, in_features: int, num_rows: int, tensors: Mapping[str, Tensor]) -> Codes:  # noqa: ARG002
        layout = tensors.get("weight_format")
        if layout is not None and layout.item() != 0:
            raise ValueError(f"weight_format is {layout.item()}, expected 0 (row by row)")
        check_scales("SCB", tensors["SCB"])
        code = (tensors["weight"].to(torch.int16) + 128).to(torch.uint8)
        return Codes(code, tensors["SCB"].float()[:, None] / 127)


@dataclass(frozen=True)
class StoredFourBit:
    """A FourBitFormat: as bitsandbytes saves it. nested: absmax is in 8 bits itself (double quantization)."""

    table: CodeTable
    nested: bool

    def tensors(self, in_features: int, num_rows: int) -> dict[str, TensorSpec]:
        size = in_features * num_rows
        blocks = -(-size // 64)
        absmax = full(_DUMMY_ABSMAX, blocks)
        specs = {
            "weight": TensorSpec(
                shape=(size // 2, 1),
                other_shapes=((1, size // 2),),
                dtypes=(torch.uint8,),
                dummy=integers(0, 256, torch.uint8, size // 2, 1),
            ),
            "weight.quant_map": TensorSpec(shape=(16,), dummy=known(TABLES[self.table])),
            f"weight.quant_state.bitsandbytes__{self.table}": TensorSpec(
                shape=(-1,), dtypes=(torch.uint8,), dummy=_dummy_state(self.table, [num_rows, in_features], self.nested)
            ),
        }
        if not self.nested:
            return specs | {"weight.absmax": TensorSpec(shape=(-1,), dummy=absmax)}
        codes = integers(0, 256, torch.uint8, blocks)
        steps = [(step - 128) / 128 for step in range(256)]
        nested_absmax = full(_DUMMY_ABSMAX / 4, -(-blocks // _NESTED_BLOCK_SIZE))
        return specs | {
            "weight.absmax": TensorSpec(shape=(-1,), dtypes=(torch.uint8,), dummy=codes),
            "weight.nested_absmax": TensorSpec(shape=(-1,), dummy=nested_absmax),
            "weight.nested_quant_map": TensorSpec(shape=(256,), dummy=known(steps)),
        }

    def weight(
        self, in_features: int, num_rows: int, tensors: Mapping[str, Tensor], device: torch.device
    ) -> FourBitWeight:
        state = _State.of(tensors[f"weight.quant_state.bitsandbytes__{self.table}"], self.table, self.nested)
        if state.shape != [num_rows, in_features]:
            raise ValueError(f"quant_state says shape={state.shape}, expected {[num_rows, in_features]}")
        table, blocks = tensors["weight.quant_map"].float().cpu(), -(-in_features * num_rows // state.block_size)
        if not torch.allclose(table, torch.tensor(TABLES[self.table]), rtol=0, atol=_TABLE_SLACK):
            raise ValueError(f"quant_map is not the table of {self.table}: {table.tolist()}")
        absmax = tensors["weight.absmax"].to(device)
        if len(absmax) != blocks:
            raise ValueError(f"absmax has {len(absmax)} numbers, expected {blocks} of blocks of {state.block_size}")
        if self.nested:
            absmax = _unnested(absmax, state, tensors)
        # Double quantization may carry the absmax of a block of zeros below 0.
        check_scales("absmax", absmax, -torch.inf if self.nested else 0)
        return FourBitWeight(tensors["weight"].to(device).flatten(), absmax.float(), state.block_size)


class _State(NamedTuple):
    """What quant_state says, but for what the other tensors say as well. nested_offset: 0 if not nested."""

    shape: list[int]
    block_size: int
    nested_block_size: int
    nested_offset: float

    @classmethod
    def of(cls, raw: Tensor, table: str, nested: bool) -> _State:
        """raw: uint8, JSON. Raises ValueError naming the field that is missing or wrong."""
        try:
            fields = json.loads(bytes(raw.tolist()).decode())
            state = cls(
                list(fields["shape"]),
                fields["blocksize"],
                fields.get("nested_blocksize", _NESTED_BLOCK_SIZE),
                float(fields["nested_offset"]) if nested else 0.0,
            )
            named = fields["quant_type"]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"quant_state is not readable: {type(error).__name__}: {error}") from error
        if named != table:
            raise ValueError(f"quant_state says quant_type={named!r}, expected {table!r}")
        for name, size in (("blocksize", state.block_size), ("nested_blocksize", state.nested_block_size)):
            if size not in _BLOCK_SIZES:
                raise ValueError(f"quant_state says {name}={size!r}; allowed: {', '.join(map(str, _BLOCK_SIZES))}")
        return state


def _unnested(codes: Tensor, state: _State, tensors: Mapping[str, Tensor]) -> Tensor:
    """The absmax of codes: uint8 [blocks]. Raises ValueError for nested scales that cannot be."""
    table, scale = (tensors[f"weight.nested_{name}"].to(codes.device).float() for name in ("quant_map", "absmax"))
    expected = -(-len(codes) // state.nested_block_size)
    if len(scale) != expected:
        raise ValueError(f"nested_absmax has {len(scale)} numbers, expected {expected}")
    wide = table[codes.int()] * scale.repeat_interleave(state.nested_block_size)[: len(codes)]
    return wide + state.nested_offset


def _dummy_state(table: CodeTable, shape: list[int], nested: bool) -> Dummy:
    fields: dict[str, Any] = {"quant_type": table, "blocksize": 64, "shape": shape}
    if nested:
        fields |= {"nested_blocksize": _NESTED_BLOCK_SIZE, "nested_offset": _DUMMY_ABSMAX}
    return known(list(json.dumps(fields).encode()), torch.uint8)
