"""adapter_config.json as PEFT's LoraConfig writes it (peft 0.21), read field by field.

Every field is used, or says how the adapter was trained and nothing of what it computes (_BOOKKEEPING), or is
refused unless it is null, false or empty: then the feature that it turns on, known or not, is off.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

ALL_LINEAR = "all-linear"
TABLES = ("embed_tokens", "lm_head")  # modules whose weights an adapter may replace as a whole
_Rank = Annotated[int, msgspec.Meta(ge=1)]
_Layer = Annotated[int, msgspec.Meta(ge=0)]
_BOOKKEEPING = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "inference_mode",
        "lora_dropout",  # none when not training
        "megatron_core",  # only with megatron_config
        "peft_version",
        "qalora_group_size",  # only with use_qalora
        "revision",  # of the base model
        "runtime_config",
        # Settings of initialisations: init_lora_weights says whether one was used.
        "corda_config",
        "eva_config",
        "loftq_config",
        "lora_ga_config",
    }
)
_REQUIRED = ("peft_type", "r", "lora_alpha", "target_modules")
_NAMES = "a regular expression, or a list of module names"
_ALLOWED = {
    "peft_type": "'LORA'",
    "r": "an integer from 1",
    "lora_alpha": "a finite number",
    "target_modules": f"'{ALL_LINEAR}', {_NAMES}",
    "exclude_modules": _NAMES,
    "rank_pattern": "integers from 1 by regular expressions of module names",
    "alpha_pattern": "finite numbers by regular expressions of module names",
    "use_rslora": "true or false",
    "layers_to_transform": "a layer's number, or a list of them, beside a list of target_modules",
    "layers_pattern": "a plain name, or a list of them, beside layers_to_transform",
    "modules_to_save": f"null, or a list out of {', '.join(TABLES)}",
    "ensure_weight_tying": "true or false",
    "bias": "'none'",
    "task_type": "null, 'CAUSAL_LM' or 'FEATURE_EXTRACTION'",
    "init_lora_weights": "true, false, 'gaussian', 'eva', 'orthogonal' or 'mica', which leave the base model's weights"
    " as they are",
}
_PLAIN_NAME = re.compile(r"[\w.]+")
_FIELD_IN_ERROR = re.compile(r"`\$\.(\w+)")  # of msgspec: "Expected `int`, got `str` - at `$.r`"


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """The fields that are used, by PEFT's names; an absent one has PEFT's default."""

    peft_type: Literal["LORA"]
    r: _Rank
    lora_alpha: float
    target_modules: str | list[str]
    exclude_modules: str | list[str] | None = None
    rank_pattern: dict[str, _Rank] | None = None
    alpha_pattern: dict[str, float] | None = None
    use_rslora: bool = False
    layers_to_transform: _Layer | list[_Layer] | None = None
    layers_pattern: str | list[str] | None = None
    modules_to_save: list[str] | None = None
    ensure_weight_tying: bool = False
    bias: Literal["none"] = "none"
    task_type: Literal["CAUSAL_LM", "FEATURE_EXTRACTION"] | None = None
    init_lora_weights: bool | Literal["gaussian", "eva", "orthogonal", "mica"] | None = True


def parse_config(data: bytes, path: Path) -> AdapterConfig:
    """What adapter_config.json says. path: of the file, for messages.

    Raises ValueError that names the file, the field, its value and what is allowed.
    """
    try:
        fields = msgspec.json.decode(data, type=dict[str, Any])
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON object: {error}") from None
    for name in _REQUIRED:
        if name not in fields:
            raise ValueError(f"{path}: {name} is missing; allowed: {_ALLOWED[name]}")
    for name, value in fields.items():
        if name not in _ALLOWED and name not in _BOOKKEEPING and not _is_neutral(value):
            raise ValueError(f"{path}: {name}={_short(value)} is not supported; allowed: null, false or empty")
    try:
        config = msgspec.convert(fields, AdapterConfig)
    except msgspec.ValidationError as error:
        name = _FIELD_IN_ERROR.findall(str(error))[0]
        raise _refusal(path, name, fields[name]) from None
    for name in _contradictions(config):
        raise _refusal(path, name, fields[name])
    return config


def _contradictions(config: AdapterConfig) -> Iterator[str]:
    """Fields of the right type whose value is not allowed, or not beside another's."""
    if any(entry.rpartition(".")[2] not in TABLES for entry in config.modules_to_save or ()):
        yield "modules_to_save"
    if isinstance(config.target_modules, str) and config.layers_to_transform is not None:
        yield "layers_to_transform"
    if config.layers_pattern and config.layers_to_transform is None:
        yield "layers_pattern"
    if not all(_PLAIN_NAME.fullmatch(entry) for entry in as_list(config.layers_pattern)):
        yield "layers_pattern"


def as_list(value: str | list[str] | None) -> list[str]:
    """A field that holds one name, several or none."""
    return [value] if isinstance(value, str) else value or []


def _is_neutral(value: Any) -> bool:
    return value is None or value is False or value in ("", [], {})


def _refusal(path: Path, name: str, value: Any) -> ValueError:
    return ValueError(f"{path}: {name}={_short(value)} is not allowed; allowed: {_ALLOWED[name]}")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
