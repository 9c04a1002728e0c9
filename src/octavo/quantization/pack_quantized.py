"""Integer weights as compressed-tensors packs them (its format pack-quantized)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from octavo.quantization import packed_integers as packed
from octavo.quantization.grouped import Codes
from octavo.quantization.scheme import TensorSpec


@dataclass(frozen=True)
class PackQuantized:
    """A GroupedFormat: `weight_packed` holds W = (code - zero) * scale along the columns of each row, where zero is
    2**(num_bits - 1), or if not symmetric lies in `weight_zero_point`, packed along the rows of each group.

    num_bits: 2 to 8 in the checkpoint; group_size: -1 for one group a row; is_ordered: `weight_g_idx` says which
    group a column is in. Values are a stream of bits, or, as older packers wrote them, 32 // num_bits a word: the
    shape tells which.
    """

    num_bits: int
    group_size: int
    symmetric: bool
    is_ordered: bool

    @property
    def bits(self) -> int:
        return packed.memory_bits(self.num_bits)

    def tensors(self, in_features: int, num_rows: int) -> dict[str, TensorSpec]:
        bits, groups = self.num_bits, -(-in_features // self._size(in_features))
        specs = {
            "weight_packed": replace(
                packed.words_spec(num_rows, packed.num_words(bits, in_features)),
                other_shapes=((num_rows, self._padded(in_features)),),
            ),
            "weight_scale": packed.scale_spec((num_rows, groups), bits, self.symmetric),
            "weight_shape": packed.known_spec(num_rows, in_features),
        }
        if not self.symmetric:
            specs["weight_zero_point"] = packed.words_spec(packed.num_words(bits, num_rows), groups)
        if self.is_ordered:
            specs["weight_g_idx"] = packed.g_idx_spec(in_features, self.group_size, shuffled=True)
        return specs

    def codes(self, in_features: int, num_rows: int, tensors: Mapping[str, Tensor]) -> Codes:
        shape = tensors["weight_shape"].tolist()
        if shape != [num_rows, in_features]:
            raise ValueError(f"weight_shape is {shape}, expected {[num_rows, in_features]}")
        words = tensors["weight_packed"]
        dense = words.shape[1] == packed.num_words(self.num_bits, in_features)
        unpack = packed.unpack_bits if dense else packed.unpack_padded
        code, zero = unpack(words, self.num_bits, in_features), None
        if self.symmetric:
            code = packed.widened(code, self.num_bits)
        else:
            zero = packed.unpack_bits(tensors["weight_zero_point"].t(), self.num_bits, num_rows).t()
        order = packed.order_of(tensors["weight_g_idx"], self.group_size) if self.is_ordered else None
        return Codes(code if order is None else code[:, order], tensors["weight_scale"], zero, order=order)

    def _size(self, in_features: int) -> int:
        return in_features if self.group_size == -1 else self.group_size

    def _padded(self, in_features: int) -> int:
        return -(-in_features // (32 // self.num_bits))
