"""A LoRA adapter (Hu et al. 2021) read from the folder that PEFT wrote, checked against the base model."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from octavo.lora.peft_config import TABLES, AdapterConfig, parse_config
from octavo.lora.targeting import Scale, Target, ends_in, scales, targeted
from octavo.lora.tensor_file import Part, Parts, parse_tensors, read_bytes

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
_PICKLE_NAME = "adapter_model.bin"
_MAX_CONFIG_BYTES = 1 << 20
_SLACK_BYTES = 4 << 20  # for the header, which has about 150 bytes a tensor
_BODY = "model."
_NUM_NAMED = 4  # modules that a message lists


@dataclass(frozen=True)
class Delta:
    """What a module's output gets besides: b (a x), or b a[:, token] from an embedding.

    a: [r, in_features]; b: [out_features, r], which holds the factor alpha / r.
    """

    a: Tensor
    b: Tensor


@dataclass(frozen=True)
class Adapter:
    """An adapter in host memory; both maps go by the base model's paths.

    digest: SHA-256 of its two files, in hex; replaced: whole weights, in the shape of the base model's, that stand in
    for them. A module may have both: its delta is then one of the weight that replaced the base model's.
    """

    digest: str
    deltas: dict[str, Delta]
    replaced: dict[str, Tensor]

    @property
    def rank(self) -> int:
        """The largest of any module, 0 if there is none."""
        return max((delta.a.shape[0] for delta in self.deltas.values()), default=0)

    @property
    def num_bytes(self) -> int:
        """Of all its tensors."""
        factors = [tensor for delta in self.deltas.values() for tensor in (delta.a, delta.b)]
        return sum(tensor.nbytes for tensor in (*factors, *self.replaced.values()))


def read_adapter(folder: Path, targets: Mapping[str, Target], max_rank: int, dtype: torch.dtype) -> Adapter:
    """The adapter that lies in `folder`, with tensors of `dtype` on the CPU.

    targets: modules of the base model by their paths in transformers, as "model.layers.0.self_attn.q_proj".
    Raises ValueError naming the file, the field or tensor at fault, its value and what is allowed.
    """
    config_path, weights_path = folder / CONFIG_NAME, folder / WEIGHTS_NAME
    config_data = read_bytes(config_path, _MAX_CONFIG_BYTES, "which is enough to name every module")
    config = parse_config(config_data, config_path)
    least = min([config.r, *(config.rank_pattern or {}).values()])
    if least > max_rank:
        raise ValueError(f"{config_path}: r={least} is too large; allowed: at most max_lora_rank={max_rank}")
    if (folder / _PICKLE_NAME).exists() and not weights_path.exists():
        raise ValueError(f"{folder / _PICKLE_NAME} is a pickle, which can run code; allowed: {WEIGHTS_NAME}")
    needed = f"what the base model's modules need at max_lora_rank={max_rank} in float32"
    weights_data = read_bytes(weights_path, _most_bytes(targets, max_rank), needed)
    digest = hashlib.sha256(hashlib.sha256(config_data).digest())
    digest.update(weights_data)
    parts = parse_tensors(weights_data, weights_path)
    del weights_data  # the parts are copies
    root = _root(parts, targets)
    base = {path.removeprefix(root): target for path, target in targets.items() if path.startswith(root)}
    _check_modules(parts, base, weights_path)
    factored = [name for name, held in parts.items() if held.keys() != {"weight"}]
    _check_against_config(config, parts, base, folder)
    scale_of = scales(config, factored, config_path)
    _check_ranks(scale_of, max_rank, config_path)
    fill = _Filling(weights_path, dtype)
    tables = {name: held["weight"] for name, held in parts.items() if "weight" in held}
    return Adapter(
        digest=digest.hexdigest(),
        deltas={root + name: fill.delta(parts[name], base[name], scale_of[name]) for name in factored},
        replaced={root + name: fill.tensor(part, base[name].shape) for name, part in tables.items()},
    )


@dataclass(frozen=True)
class _Filling:
    """Tensors of the file at `path` become those of an adapter."""

    path: Path
    dtype: torch.dtype

    def delta(self, held: dict[str, Part], target: Target, scale: Scale) -> Delta:
        """The factor goes into B, in float32, before that is rounded."""
        return Delta(
            a=self.tensor(held["A"], (scale.rank, target.in_features)),
            b=self.tensor(held["B"], (target.out_features, scale.rank), scale.factor),
        )

    def tensor(self, part: Part, shape: tuple[int, int], factor: float = 1.0) -> Tensor:
        """Raises ValueError naming the tensor unless it has the shape and its values are finite, then and before."""
        what = f"{self.path}: tensor {part.key!r}"
        if part.tensor.shape != shape:
            raise ValueError(
                f"{what} has shape {list(part.tensor.shape)}; allowed: {list(shape)}, by the base model"
                f" and the ranks in {CONFIG_NAME}"
            )
        if not _is_finite(part.tensor):
            raise ValueError(f"{what} has values that are not finite")
        scaled = part.tensor if factor == 1 else part.tensor.float() * factor
        rounded = scaled.to(self.dtype)
        if not _is_finite(rounded):
            largest = scaled.abs().max().item()
            raise ValueError(
                f"{what} holds {largest:g}, its scale included; allowed: at most {torch.finfo(self.dtype).max:g},"
                f" which is what {self.dtype} can hold"
            )
        return rounded


def _is_finite(tensor: Tensor) -> bool:
    """Whether all values are finite. A sum says so five times as fast as a look at each, but for one that overflows."""
    return math.isfinite(tensor.sum(dtype=torch.float32).item()) or bool(tensor.isfinite().all())


def _most_bytes(targets: Mapping[str, Target], max_rank: int) -> int:
    """How large a file of weights can be that fits the base model."""
    numbers = sum(max_rank * (target.in_features + target.out_features) for target in targets.values())
    numbers += sum(t.in_features * t.out_features for path, t in targets.items() if ends_in(path, TABLES))
    return 4 * numbers + _SLACK_BYTES


def _root(parts: Parts, targets: Mapping[str, Target]) -> str:
    """What the file leaves off the paths. One of a model without a head (AutoModel) counts from within "model."."""
    bare = any(f"{_BODY}{name}" in targets for name in parts)
    return _BODY if bare and not any(name in targets for name in parts) else ""


def _check_modules(parts: Parts, base: Mapping[str, Target], path: Path) -> None:
    """Every module of the file is one of the base model's, and is changed as one of its kind can be."""
    strangers = [name for name in parts if name not in base]
    if strangers:
        raise ValueError(f"{path}: the base model has no {_some(strangers)}; allowed: {_some(base)}")
    for name, held in parts.items():
        if "weight" in held and not ends_in(name, TABLES):
            key = held["weight"].key
            raise ValueError(f"{path}: tensor {key!r} replaces a weight; allowed: of {' and '.join(TABLES)} alone")
        for part in held.values():
            if part.kind not in (None, base[name].kind):
                of = {"linear": "lora_A and lora_B", "embedding": "lora_embedding_A and lora_embedding_B"}
                kind = base[name].kind
                raise ValueError(
                    f"{path}: tensor {part.key!r} is of no {kind} module, as {name} is; allowed: {of[kind]}"
                )
        factors = held.keys() - {"weight"}
        if len(factors) == 1:
            (there,) = (held[factor].key for factor in factors)
            raise ValueError(f"{path}: tensor {there!r} has no counterpart; allowed: both A and B of {name}")


def _check_against_config(config: AdapterConfig, parts: Parts, base: Mapping[str, Target], folder: Path) -> None:
    """The file holds what the config says that it does: no less, and no more that PEFT would leave out."""
    path = folder / WEIGHTS_NAME
    wanted = targeted(config, base, folder / CONFIG_NAME)
    factored = {name for name, held in parts.items() if "A" in held}
    if missing := [name for name in base if name in wanted - factored]:
        raise ValueError(f"{path}: tensors of {_some(missing)} are missing, which target_modules names")
    tied = {name for name in factored if config.ensure_weight_tying and ends_in(name, TABLES)}
    if beyond := sorted(factored - wanted - tied):
        raise ValueError(f"{path} holds tensors of {_some(beyond)}, which the fields of {CONFIG_NAME} do not target")
    for entry in config.modules_to_save or ():
        if not any("weight" in held and ends_in(name, (entry,)) for name, held in parts.items()):
            raise ValueError(f"{path}: the weight of {entry} is missing, which modules_to_save names")


def _check_ranks(scale_of: Mapping[str, Scale], max_rank: int, path: Path) -> None:
    for name, scale in scale_of.items():
        if scale.rank > max_rank:
            raise ValueError(
                f"{path}: rank {scale.rank} of {name} is too large; allowed: at most max_lora_rank={max_rank}"
            )


def _some(names: Collection[str]) -> str:
    """The first names, and how many more there are."""
    shown = ", ".join(name[:80] for name in list(names)[:_NUM_NAMED])
    return shown if len(names) <= _NUM_NAMED else f"{shown} and {len(names) - _NUM_NAMED} more"
