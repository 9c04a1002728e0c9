"""GPTQ (Frantar et al., 2022) as AutoGPTQ and GPTQModel store it: their formats "gptq" (v1) and "gptq_v2"."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from octavo.quantization import packed_integers as packed
from octavo.quantization.config_fields import HOW_MADE, Fields
from octavo.quantization.grouped import Codes, GroupedScheme
from octavo.quantization.scheme import FLOATS, LinearScheme, TensorSpec
from octavo.quantization.unquantized import UNQUANTIZED

_BITS = (2, 3, 4, 8)
_BLOCKS = "model.layers"
_OVERRIDES = ("damp_percent", "damp_auto_increment", "static_groups", "act_group_aware", "mse", "fallback")


@dataclass(frozen=True)
class Gptq:
    """A GroupedFormat: W = (code - zero) * scale, where `qweight` [K * num_bits / 32, N] is packed along the inputs,
    `qzeros` [groups, N * num_bits / 32] along the outputs, and `scales` are [groups, N].

    num_bits: 2, 3, 4 or 8 in the checkpoint (2 and 3 take 4 bits in memory); group_size: -1 for one group a row;
    symmetric: all zeros are 2**(num_bits - 1); is_ordered: `g_idx` [K] says which group a column is in, not its place;
    version: 1 stores zeros less one.
    """

    num_bits: int
    group_size: int
    symmetric: bool
    is_ordered: bool
    version: int

    @property
    def bits(self) -> int:
        return packed.memory_bits(self.num_bits)

    def tensors(self, in_features: int, num_rows: int) -> dict[str, TensorSpec]:
        """`bias` is for layers that have none: some packers write one of zeros."""
        bits, size = self.num_bits, self._size(in_features)
        for said, length in (("columns", in_features), ("rows", num_rows)):
            if length * bits % 32:
                raise ValueError(f"GPTQ of {bits} bits packs whole words, and there are {length} {said}")
        groups, middle = -(-in_features // size), 1 << bits - 1
        zeros = (groups, packed.num_words(bits, num_rows))
        return {
            "qweight": packed.words_spec(packed.num_words(bits, in_features), num_rows),
            "qzeros": packed.equal_words_spec(zeros, bits, middle - (self.version == 1))
            if self.symmetric
            else packed.words_spec(*zeros),
            "scales": packed.scale_spec((groups, num_rows), bits, self.symmetric),
            "g_idx": packed.g_idx_spec(in_features, size, shuffled=self.is_ordered, required=self.is_ordered),
            "bias": TensorSpec(shape=(num_rows,), dtypes=FLOATS, required=False),
        }

    def codes(self, in_features: int, num_rows: int, tensors: Mapping[str, Tensor]) -> Codes:
        if "bias" in tensors and tensors["bias"].any():
            raise ValueError("bias is not zero, and the model has none")
        zero = self._zeros(tensors["qzeros"], num_rows)
        code = packed.unpack_bits(tensors["qweight"].t(), self.num_bits, in_features)
        if self.symmetric:
            packed.refuse_zeros("qzeros", zero, self.num_bits)
            code = packed.widened(code, self.num_bits)
        order = self._order(tensors["g_idx"], in_features) if "g_idx" in tensors else None
        code = code if order is None else code[:, order]
        return Codes(code, tensors["scales"].t(), None if self.symmetric else zero.t(), order=order)

    def _zeros(self, words: Tensor, num_rows: int) -> Tensor:
        """uint8 [groups, num_rows]. Version 1 subtracted one from every value of a word at once, borrows included,
        and they go where they came from; of 3 bits, which cross words, from every value by itself."""
        if self.version == 2:
            return packed.unpack_bits(words, self.num_bits, num_rows)
        if self.num_bits == 3:
            return packed.unpack_bits(words, 3, num_rows) + 1 & 7
        ones = sum(1 << shift for shift in range(0, 32, self.num_bits))
        return packed.unpack_bits(words + ones, self.num_bits, num_rows)

    def _order(self, g_idx: Tensor, in_features: int) -> Tensor | None:
        order = packed.order_of(g_idx, self._size(in_features))
        if order is not None and not self.is_ordered:
            raise ValueError("g_idx is not in order, and desc_act is false")
        return order

    def _size(self, in_features: int) -> int:
        return in_features if self.group_size == -1 else self.group_size


@dataclass(frozen=True)
class GptqMethod:
    """A QuantizationMethod. dynamic: (pattern, scheme) pairs, of which the first that matches a name's beginning says
    its scheme; modules: the ends of the names that are quantized, None for all; lm_head: whether that is."""

    scheme: LinearScheme
    dynamic: tuple[tuple[str, LinearScheme], ...]
    modules: tuple[str, ...] | None
    lm_head: bool

    def scheme_of(self, name: str) -> LinearScheme:
        if name == "lm_head" and not self.lm_head:
            return UNQUANTIZED
        for pattern, scheme in self.dynamic:
            if re.match(pattern, name):
                return scheme
        chosen = self.modules is None or name == "lm_head"
        chosen = chosen or any(f".{name}".endswith(f".{module}") for module in self.modules or ())
        return self.scheme if chosen else UNQUANTIZED


def gptq(declared: Mapping[str, Any]) -> GptqMethod:
    """declared: quantization_config. Raises ValueError naming a field and its value."""
    fields = Fields(declared)
    for name in ("quant_method", "method"):
        fields.choice(name, ("gptq", "gptq_marlin"), "gptq")
    version = _version(fields)
    base = _format(fields, version, None)
    dynamic = _dynamic(fields, version, base)
    modules = _modules(fields)
    method = GptqMethod(GroupedScheme(base), dynamic, modules, fields.flag("lm_head", False))
    fields.choice("block_name_to_quantize", (_BLOCKS,), _BLOCKS)
    fields.choice("pack_dtype", ("int32",), "int32")
    fields.choice("data_type", ("int",), "int")
    fields.choice("is_marlin_format", (False,), False)
    fields.finish(*HOW_MADE)
    return method


def _version(fields: Fields) -> int:
    """The format has two names, and a checkpoint that has neither is of version 1."""
    name = "checkpoint_format" if "checkpoint_format" in fields else "format"
    version = fields.choice(name, ("gptq", "gptq_v2"), "gptq")
    fields.choice("format", (version,), version)
    return 2 if version == "gptq_v2" else 1


def _format(fields: Fields, version: int, base: Gptq | None) -> Gptq:
    """base: of which the fields override some."""
    bits = fields.choice("bits", _BITS, base and base.num_bits)
    group_size = fields.integer("group_size") if base is None or "group_size" in fields else base.group_size
    if group_size != -1 and group_size < 1:
        raise fields.refused("group_size", "-1, an integer >= 1")
    symmetric = fields.flag("sym", base is None or base.symmetric)
    ordered = fields.flag("desc_act", base is not None and base.is_ordered)
    return Gptq(bits, group_size, symmetric, ordered and group_size != -1, version)


def _dynamic(fields: Fields, version: int, base: Gptq) -> tuple[tuple[str, LinearScheme], ...]:
    """{"-:pattern": {}} leaves layers as they are, {"+:pattern": {"bits": 8}} overrides fields."""
    if "dynamic" not in fields:
        return ()
    rules = fields.inner("dynamic")
    read: list[tuple[str, LinearScheme]] = []
    for rule in fields.any("dynamic"):
        pattern = rule[2:] if rule[:2] in ("+:", "-:") else rule
        try:
            re.compile(pattern)
        except re.error as error:
            raise rules.refused(rule, f"a regular expression ({error})") from error
        if rule.startswith("-:"):
            read.append((pattern, UNQUANTIZED))
            continue
        overrides = rules.inner(rule)
        read.append((pattern, GroupedScheme(_format(overrides, version, base))))
        overrides.finish(*_OVERRIDES)
    return tuple(read)


def _modules(fields: Fields) -> tuple[str, ...] | None:
    """A list of lists, or one list, of names within a block."""
    value = fields.any("modules_in_block_to_quantize")
    if value is None:
        return None
    flat = [name for one in value for name in (one if isinstance(one, list) else [one])] if value else []
    if not flat or not all(isinstance(name, str) for name in flat):
        raise fields.refused("modules_in_block_to_quantize", "lists of names")
    return tuple(flat)
