"""AWQ (Lin et al., 2023) as AutoAWQ stores it: its version "gemm"."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from octavo.quantization import packed_integers as packed
from octavo.quantization.config_fields import HOW_MADE, Fields
from octavo.quantization.grouped import Codes, GroupedScheme
from octavo.quantization.scheme import LinearScheme, TensorSpec
from octavo.quantization.unquantized import UNQUANTIZED

_BITS = 4
_PER_WORD = 32 // _BITS
_NIBBLES = (0, 4, 1, 5, 2, 6, 3, 7)  # of a word, in the order of its outputs
_GROUP_SIZES = (32, 64, 128, -1)


@dataclass(frozen=True)
class Awq:
    """A GroupedFormat: W = (code - zero) * scale, where `qweight` [K, N / 8] and `qzeros` [K / group_size, N / 8] are
    packed along the outputs, and `scales` are [K / group_size, N].

    group_size: -1 for one group a row; symmetric: all zeros are 8.
    """

    group_size: int
    symmetric: bool
    bits = _BITS

    def tensors(self, in_features: int, num_rows: int) -> dict[str, TensorSpec]:
        if num_rows % _PER_WORD:
            raise ValueError(f"AWQ packs {_PER_WORD} rows a word, and there are {num_rows}")
        groups = 1 if self.group_size == -1 else -(-in_features // self.group_size)
        words = num_rows // _PER_WORD
        zeros = packed.words_spec(groups, words)
        if self.symmetric:
            zeros = packed.equal_words_spec((groups, words), _BITS, 1 << _BITS - 1)
        return {
            "qweight": packed.words_spec(in_features, words),
            "qzeros": zeros,
            "scales": packed.scale_spec((groups, num_rows), _BITS, self.symmetric),
        }

    def codes(self, in_features: int, num_rows: int, tensors: Mapping[str, Tensor]) -> Codes:  # noqa: ARG002
        zero = _unpack(tensors["qzeros"])
        if self.symmetric:
            packed.refuse_zeros("qzeros", zero, _BITS)
        return Codes(_unpack(tensors["qweight"]), tensors["scales"].t(), None if self.symmetric else zero)


def _unpack(words: Tensor) -> Tensor:
    """int32 [R, N / 8] -> uint8 [N, R]."""
    octets = words.t().flatten().view(torch.uint8).view(words.shape[1], len(words), 4)
    outputs = [octets[..., nibble // 2] >> 4 * (nibble % 2) & 15 for nibble in _NIBBLES]
    return torch.stack(outputs, 1).view(-1, len(words))


@dataclass(frozen=True)
class AwqMethod:
    """A QuantizationMethod. kept: parts of the names of layers that are not quantized."""

    scheme: LinearScheme
    kept: tuple[str, ...]
    lm_head: bool

    def scheme_of(self, name: str) -> LinearScheme:
        if any(part in name for part in self.kept) or (name == "lm_head" and not self.lm_head):
            return UNQUANTIZED
        return self.scheme


def awq(declared: Mapping[str, Any]) -> AwqMethod:
    """declared: quantization_config. Raises ValueError naming a field and its value."""
    fields = Fields(declared)
    fields.choice("quant_method", ("awq", "awq_marlin"))
    bits = fields.choice("w_bit" if "w_bit" in fields else "bits", (_BITS,))
    fields.choice("bits", (bits,), bits)
    group_size = fields.choice("q_group_size" if "q_group_size" in fields else "group_size", _GROUP_SIZES)
    fields.choice("group_size", (group_size,), group_size)
    version = fields.any("version", "gemm")
    if version not in ("gemm", "GEMM"):
        raise fields.refused("version", "gemm (the other layouts of AutoAWQ are for kernels of its own)")
    for name in ("format", "checkpoint_format"):
        fields.choice(name, ("gemm",), "gemm")
    # transformers writes the `sym` of GPTQ beside it, whatever it is.
    symmetric = not fields.flag("zero_point", not fields.flag("sym", False))
    fields.choice("desc_act", (False,), False)
    method = AwqMethod(
        GroupedScheme(Awq(group_size, symmetric)),
        fields.strings("modules_to_not_convert"),
        fields.flag("lm_head", False),
    )
    fields.choice("data_type", ("int",), "int")
    fields.finish(*HOW_MADE)
    return method
