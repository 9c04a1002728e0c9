"""Which modules of a base model an adapter's config names, and with which rank and scale: as PEFT decides it."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

from octavo.lora.patterns import matched
from octavo.lora.peft_config import ALL_LINEAR, AdapterConfig, as_list

_Value = TypeVar("_Value")


@dataclass(frozen=True)
class Target:
    """A module of the base model that adapters may change.

    An embedding has one input feature a token of the vocabulary, so its weight is [in_features, out_features];
    that of a linear layer is [out_features, in_features].
    """

    in_features: int
    out_features: int
    kind: Literal["linear", "embedding"]

    @property
    def shape(self) -> tuple[int, int]:
        """Of the weight."""
        shape = (self.in_features, self.out_features)
        return shape if self.kind == "embedding" else shape[::-1]


@dataclass(frozen=True)
class Scale:
    """How much of a module's update there is: the rank of B A, and its factor."""

    rank: int
    factor: float


def targeted(config: AdapterConfig, base: Mapping[str, Target], path: Path) -> frozenset[str]:
    """The modules of `base` that get an update. path: of the config, for messages.

    Raises ValueError naming the field whose regular expression cannot be used.
    """
    names = [name for name in base if not ends_in(name, config.modules_to_save or ())]
    if isinstance(config.exclude_modules, str):
        excluded = _fully_matched(config.exclude_modules, names, f"{path}: exclude_modules")
    else:
        excluded = frozenset(name for name in names if ends_in(name, config.exclude_modules or ()))
    names = [name for name in names if name not in excluded]
    if isinstance(config.target_modules, list):
        entries = frozenset(config.target_modules)
        # PEFT asks for the layer only of modules that are not named in full.
        return frozenset(n for n in names if n in entries or (ends_in(n, entries) and _in_layers(config, n)))
    if config.target_modules.lower() == ALL_LINEAR:
        return frozenset(name for name in names if base[name].kind == "linear" and not ends_in(name, ("lm_head",)))
    return _fully_matched(config.target_modules, names, f"{path}: target_modules")


def scales(config: AdapterConfig, names: Sequence[str], path: Path) -> dict[str, Scale]:
    """Rank and factor of each module: alpha / r, or alpha / sqrt(r) where the config says so (rsLoRA,
    Kalajdzievski 2023). Raises as `targeted`.
    """
    ranks = _first_match(config.rank_pattern or {}, config.r, names, f"{path}: rank_pattern")
    alphas = _first_match(config.alpha_pattern or {}, config.lora_alpha, names, f"{path}: alpha_pattern")
    made = {}
    for name, rank, alpha in zip(names, ranks, alphas, strict=True):
        made[name] = Scale(rank, alpha / (math.sqrt(rank) if config.use_rslora else rank))
    return made


def ends_in(name: str, entries: Collection[str]) -> bool:
    """Whether the dotted name, or its end after some dot, is one of the entries."""
    parts = name.split(".")
    return any(".".join(parts[i:]) in entries for i in range(len(parts)))


def _fully_matched(pattern: str, names: Sequence[str], what: str) -> frozenset[str]:
    return matched(f"{what}={pattern[:80]!r}", [pattern], names, as_ends=False)[0]


def _first_match(patterns: Mapping[str, _Value], default: _Value, names: Sequence[str], what: str) -> list[_Value]:
    """For each name the value of the first pattern, in the file's order, that matches it or its end."""
    found = matched(what, list(patterns), names, as_ends=True)
    pairs = list(zip(found, patterns.values(), strict=True))
    return [next((value for names_of, value in pairs if name in names_of), default) for name in names]


def _in_layers(config: AdapterConfig, name: str) -> bool:
    """Whether the module lies in one of layers_to_transform; a name's first number after a dot is its layer's."""
    layers = config.layers_to_transform
    if layers is None or layers == []:
        return True
    lists = [rf"(?:.*?\.)?{pattern}" for pattern in as_list(config.layers_pattern)] or [r".*?\.[^.]*"]
    for pattern in lists:
        if found := re.match(rf"{pattern}\.(\d+)\.", name):
            return int(found[1]) in (layers if isinstance(layers, list) else [layers])
    return False
