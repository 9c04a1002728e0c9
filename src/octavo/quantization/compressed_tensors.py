"""The config of compressed-tensors: groups of layers, each under one scheme, in one format each (format:
compressed-tensors, QuantizationConfig)."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from octavo.quantization.config_fields import Fields
from octavo.quantization.fp8 import Fp8Scheme, StoredFp8
from octavo.quantization.fp8_block import BLOCK, Fp8BlockScheme
from octavo.quantization.grouped import GroupedScheme
from octavo.quantization.int8 import Int8Groups, Int8Scheme
from octavo.quantization.kv_scales import check_kv_cache_scheme
from octavo.quantization.pack_quantized import PackQuantized
from octavo.quantization.scheme import LinearScheme
from octavo.quantization.unquantized import UNQUANTIZED

_STRATEGIES = ("tensor", "channel", "group", "block", "token", "tensor_group")
_ACTIVATION_ORDERS = ("group", "dynamic", "weight", "static", False)  # each with its older name
_BOOKKEEPING = ("quantization_status", "global_compression_ratio", "version")


@dataclass(frozen=True, kw_only=True)
class QuantizationArgs:
    """How a group's weights, or activations, are quantized, in the format's words.

    type: "int" or "float"; group_size: None where the strategy has no groups; block_structure: rows and columns of a
    block, of the strategy "block" only; dynamic: scales are made as activations come, "local" for those of groups
    alone; has_order: columns are grouped by a g_idx; path: of the object in config.json, for messages.
    """

    num_bits: int
    type: str
    strategy: str
    group_size: int | None
    block_structure: tuple[int, int] | None
    symmetric: bool
    dynamic: bool | str
    has_order: bool
    path: str

    def require(self, name: str, *allowed: Any) -> None:
        """Raises ValueError naming a field whose value the format cannot have."""
        if getattr(self, name) not in allowed:
            raise ValueError(
                f"config field {self.path}.{name}={getattr(self, name)!r} is not supported; "
                f"allowed: {', '.join(map(str, allowed))}"
            )


# A format: (a group's weights, its input_activations or None) -> the scheme of its layers. Raises ValueError naming
# the field that the format cannot have.
Format = Callable[[QuantizationArgs, QuantizationArgs | None], LinearScheme]


def _pack_quantized(weights: QuantizationArgs, inputs: QuantizationArgs | None) -> LinearScheme:
    if inputs is not None:
        raise ValueError(f"config field {inputs.path} is not supported with format pack-quantized; allowed: null")
    weights.require("type", "int")
    weights.require("strategy", "group", "channel")
    weights.require("dynamic", False)
    weights.require("num_bits", *range(2, 9))
    if weights.has_order:
        weights.require("strategy", "group")
    group_size = -1 if weights.group_size is None else weights.group_size
    return GroupedScheme(PackQuantized(weights.num_bits, group_size, weights.symmetric, weights.has_order))


def _dense(_weights: QuantizationArgs, _inputs: QuantizationArgs | None) -> LinearScheme:
    return UNQUANTIZED


def _naive_quantized(weights: QuantizationArgs, inputs: QuantizationArgs | None) -> LinearScheme:
    return (_float_quantized if weights.type == "float" else _int_quantized)(weights, inputs)


def _float_quantized(weights: QuantizationArgs, inputs: QuantizationArgs | None) -> LinearScheme:
    """FP8 weights; inputs are FP8 or stay in full."""
    _require_8_bits("float", weights, inputs)
    weights.require("strategy", "tensor", "channel", "block")
    weights.require("symmetric", True)
    if inputs is not None:
        inputs.require("symmetric", True)
    if weights.strategy != "block":
        static = inputs is not None and not inputs.dynamic
        return Fp8Scheme(StoredFp8(static), quantizes_tokens=inputs is not None)
    weights.require("block_structure", (BLOCK, BLOCK))
    if inputs is not None:
        inputs.require("dynamic", True)
        inputs.require("strategy", "group")
        inputs.require("group_size", BLOCK)
    return Fp8BlockScheme("weight_scale", quantizes_tokens=inputs is not None)


def _int_quantized(weights: QuantizationArgs, inputs: QuantizationArgs | None) -> LinearScheme:
    """int8 weights; inputs are int8 or stay in full."""
    _require_8_bits("int", weights, inputs)
    weights.require("symmetric", True)
    if inputs is None:
        weights.require("strategy", "tensor", "channel", "group")
        return GroupedScheme(Int8Groups(-1 if weights.group_size is None else weights.group_size))
    weights.require("strategy", "tensor", "channel")
    return Int8Scheme(static=not inputs.dynamic, symmetric=inputs.symmetric)


def _require_8_bits(kind: str, weights: QuantizationArgs, inputs: QuantizationArgs | None) -> None:
    """What the formats of 8 bits have in common. A scale of all tokens of a step is served by one of each."""
    weights.require("type", kind)
    weights.require("num_bits", 8)
    weights.require("dynamic", False)
    weights.require("has_order", False)
    if inputs is not None:
        inputs.require("type", kind)
        inputs.require("num_bits", 8)
        inputs.require("dynamic", True, False)
        if weights.strategy != "block":
            inputs.require("strategy", *(("token", "tensor") if inputs.dynamic else ("tensor",)))


_FORMATS: dict[str, Format] = {
    "dense": _dense,
    "float-quantized": _float_quantized,
    "int-quantized": _int_quantized,
    "naive-quantized": _naive_quantized,
    "pack-quantized": _pack_quantized,
}


class CompressedTensors:
    """A QuantizationMethod: the scheme of the first target that a name matches, unless the name is ignored.

    targets: exact names first, then patterns ("re:..."), then "Linear", which is every layer.
    """

    def __init__(self, targets: Mapping[str, LinearScheme], ignored: tuple[str, ...]) -> None:
        self._targets = dict(sorted(targets.items(), key=lambda item: (item[0] == "Linear", "re:" in item[0], item[0])))
        self._ignored = ignored

    def scheme_of(self, name: str) -> LinearScheme:
        if any(_matches(name, target) for target in self._ignored):
            return UNQUANTIZED
        return next((scheme for target, scheme in self._targets.items() if _matches(name, target)), UNQUANTIZED)


def compressed_tensors(declared: Mapping[str, Any]) -> CompressedTensors:
    """declared: quantization_config. Raises ValueError naming a field and its value."""
    fields = Fields(declared)
    fields.choice("quant_method", ("compressed-tensors",))
    every = fields.choice("format", (*_FORMATS, "mixed-precision"))
    ignored = fields.strings("ignore")
    _check_patterns(fields, "ignore", ignored)
    _refuse_sparsity(fields)
    check_kv_cache_scheme(fields)
    groups = fields.inner("config_groups")
    targets: dict[str, LinearScheme] = {}
    for name in groups.names():
        group = groups.inner(name)
        scheme = _scheme(group, every)
        for target in group.strings("targets"):
            targets.setdefault(target, scheme)
        _check_patterns(group, "targets", group.strings("targets"))
        group.finish()
    fields.finish(*_BOOKKEEPING)
    return CompressedTensors(targets, ignored)


def _matches(name: str, target: str) -> bool:
    if target.startswith("re:"):
        return re.match(target.removeprefix("re:"), name) is not None
    return target in (name, "Linear")


def _scheme(group: Fields, every: str) -> LinearScheme:
    """The scheme of a group. every: the format of groups that name none."""
    name = group.choice("format", tuple(_FORMATS), None if every == "mixed-precision" else every)
    weights = _args(group.inner("weights"))
    inputs = _args(group.inner("input_activations")) if "input_activations" in group else None
    if "output_activations" in group:
        raise group.refused("output_activations", "null")
    return _FORMATS[name](weights, inputs)


def _args(fields: Fields) -> QuantizationArgs:
    group_size = fields.any("group_size")
    given = {None: "tensor", -1: "channel"}.get(group_size, "group")
    strategy = fields.choice("strategy", _STRATEGIES, given)
    if strategy in ("group", "tensor_group"):
        if not isinstance(group_size, int) or isinstance(group_size, bool) or group_size < 1:
            raise fields.refused("group_size", f"an integer >= 1, for the strategy {strategy}")
    elif group_size not in (None, -1):
        raise fields.refused("group_size", f"-1, for the strategy {strategy}")
    order = fields.choice("actorder", _ACTIVATION_ORDERS, False)
    args = QuantizationArgs(
        num_bits=fields.integer("num_bits"),
        type=fields.choice("type", ("int", "float"), "int"),
        strategy=strategy,
        group_size=group_size if strategy in ("group", "tensor_group") else None,
        block_structure=_block_structure(fields) if strategy == "block" else None,
        symmetric=fields.flag("symmetric", True),
        dynamic=fields.choice("dynamic", (True, False, "local"), False),
        has_order=order in ("group", "dynamic"),
        path=fields.path("")[:-1],
    )
    # How scales were found, and dtypes that the tensors have anyway.
    fields.finish("observer", "observer_kwargs", "scale_dtype", "zp_dtype")
    return args


def _block_structure(fields: Fields) -> tuple[int, int]:
    """Written as [128, 128] or "128x128"."""
    value = fields.any("block_structure")
    sizes = value.split("x") if isinstance(value, str) else value
    try:
        rows, columns = map(int, sizes)
    except (TypeError, ValueError):
        rows = columns = 0
    if rows < 1 or columns < 1:
        raise fields.refused("block_structure", "two integers >= 1")
    return rows, columns


def _check_patterns(fields: Fields, name: str, targets: tuple[str, ...]) -> None:
    for target in targets:
        try:
            re.compile(target.removeprefix("re:") if target.startswith("re:") else "")
        except re.error as error:
            raise fields.refused(name, f"names and regular expressions ({error})") from error


def _refuse_sparsity(fields: Fields) -> None:
    """What changes the weights besides their quantization."""
    for name in ("transform_config", "sparsity_config", "moe_sparsity_config"):
        value = fields.any(name)
        if value and not (name == "sparsity_config" and value == {"format": "dense"}):
            raise fields.refused(name, "null")
