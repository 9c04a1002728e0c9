"""Which class runs which architecture."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any, Literal

import torch

from octavo.config import HEADS, ModelFacts, OutputHead, Quantization
from octavo.models.base import CausalLM, DraftHead
from octavo.models.config import DecoderConfig
from octavo.models.eagle import EagleHead
from octavo.models.eagle3 import Eagle3Head
from octavo.models.llama import LlamaForCausalLM
from octavo.models.mistral import MistralForCausalLM
from octavo.models.qwen2 import Qwen2ForCausalLM
from octavo.models.qwen3 import Qwen3ForCausalLM
from octavo.quantization.registry import method_of

# The ids of config.json's classifier_from_token, which only a tokenizer knows.
CLASSIFIER_IDS = "classifier_token_ids"
_FAMILIES: dict[str, type[LlamaForCausalLM]] = {
    "Llama": LlamaForCausalLM,
    "Mistral": MistralForCausalLM,
    "Qwen2": Qwen2ForCausalLM,
    "Qwen3": Qwen3ForCausalLM,
}
ARCHITECTURES = {name + suffix: (family, head) for suffix, head in HEADS.items() for name, family in _FAMILIES.items()}

HeadMethod = Literal["eagle", "eagle3"]
# Draft heads by method, and what their configs call them. Their authors' own configs name the target's architecture.
_HEADS: dict[HeadMethod, tuple[type[EagleHead] | type[Eagle3Head], tuple[str, ...]]] = {
    "eagle": (EagleHead, ("LlamaForCausalLM", "EagleLlamaForCausalLM", "LlamaForCausalLMEagle")),
    "eagle3": (Eagle3Head, ("LlamaForCausalLM", "Eagle3LlamaForCausalLM", "LlamaForCausalLMEagle3")),
}


def build_model(
    config: Mapping[str, Any], dtype: torch.dtype, device: torch.device, quantization: Quantization | None = None
) -> CausalLM:
    """The model that a config.json describes, its weights not loaded yet.

    quantization: how the linear layers keep what is loaded into them.

    Raises ValueError naming the field that is missing, out of range or not supported.
    """
    family, head = _family(config)
    read = replace(family.read_config(config), head=head)
    if head == "scores":
        _check_num_labels(config)
        read = replace(read, classifier_token_ids=tuple(config.get(CLASSIFIER_IDS, ())))
    return family(read, dtype, device, method_of(quantization, config.get("quantization_config"))).eval()


def build_head(
    method: HeadMethod,
    config: Mapping[str, Any],
    target: DecoderConfig,
    names: Collection[str],
    dtype: torch.dtype,
    device: torch.device,
) -> DraftHead:
    """The draft head that a config.json describes, its weights not loaded yet. names: of the tensors that its
    checkpoint has.

    Raises ValueError naming the field that is missing, out of range, not supported, or not the target's.
    """
    family, known = _HEADS[method]
    said = config.get("architectures")
    if not isinstance(said, list) or not set(said) & set(known):
        raise ValueError(
            f"config field architectures={said!r} is not supported by speculative method {method!r}; "
            f"allowed: {', '.join(known)}"
        )
    return family(family.read_config(config, target), names, dtype, device).eval()


def model_facts(config: Mapping[str, Any]) -> ModelFacts:
    """What the configuration needs to know. Raises as build_model does."""
    read = _family(config)[0].read_config(config)
    return ModelFacts(
        max_position_embeddings=read.max_position_embeddings,
        vocab_size=read.vocab_size,
        num_layers=read.num_layers,
        num_kv_heads=read.num_kv_heads,
        head_dim=read.head_dim,
        num_heads=read.num_heads,
        hidden_size=read.hidden_size,
        intermediate_size=read.intermediate_size,
        qk_norm=read.qk_norm,
        sliding_window=max((window for window in read.layer_windows if window is not None), default=None),
    )


def _check_num_labels(config: Mapping[str, Any]) -> None:
    """Raises ValueError unless there is one label, or two tokens that stand for yes and no."""
    if config.get(CLASSIFIER_IDS):
        return
    labels = config.get("id2label")
    num_labels = len(labels) if isinstance(labels, Mapping) else config.get("num_labels", 2)
    if num_labels != 1:
        raise ValueError(f"config field num_labels={num_labels!r} is not supported; allowed: 1 (a score)")


def _family(config: Mapping[str, Any]) -> tuple[type[LlamaForCausalLM], OutputHead]:
    names = config.get("architectures") or []
    for name in names:
        if name in ARCHITECTURES:
            return ARCHITECTURES[name]
    near = difflib.get_close_matches(names[0], ARCHITECTURES, n=1, cutoff=0.8) if names else []
    hint = f"; did you mean {near[0]}?" if near else ""
    said = f"={names!r} is not supported" if names else " is missing"
    raise ValueError(f"config field architectures{said}; allowed: {', '.join(ARCHITECTURES)}{hint}")
