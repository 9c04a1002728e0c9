"""Puts together what makes guesses (speculative decoding). A composition root."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from octavo.attention.cpu import CpuAttention
from octavo.config import EngineConfig, LoadFormat, ModelFacts
from octavo.loading.source import ModelSource, resolve_source
from octavo.loading.weights import load_draft
from octavo.models.base import CausalLM, DraftHead
from octavo.models.config import ConfigFields
from octavo.models.registry import model_facts
from octavo.protocol.speculation import LOOKUPS, SpeculationConfig
from octavo.worker.drafters.draft_head import HeadDrafter
from octavo.worker.drafters.draft_model import ModelDrafter
from octavo.worker.drafters.drafter import Drafter
from octavo.worker.drafters.lookup import LookupDrafter, LookupSettings
from octavo.worker.slots import Slots

_log = logging.getLogger(__name__)

_MAX_DRAFT_ROWS = 512


@dataclass(frozen=True, kw_only=True)
class Draft:
    """What is to make guesses. source, facts: of its model, where it is one; kv_bytes_per_token: its own."""

    config: SpeculationConfig
    source: ModelSource | None = None
    facts: ModelFacts | None = None
    kv_bytes_per_token: int = 0

    @property
    def lookup(self) -> LookupSettings:
        """Of a method that looks for guesses in text."""
        config = self.config
        return LookupSettings(
            config.prompt_lookup_min,
            config.prompt_lookup_max,
            config.num_speculative_tokens,
            config.suffix_cached_tokens if config.method == "suffix" else 0,
        )

    def num_draft_rows(self, max_num_seqs: int) -> int:
        """Guesses that a step verifies at most."""
        return min(max_num_seqs * self.config.num_speculative_tokens, _MAX_DRAFT_ROWS)

    def scheduling(self, max_num_seqs: int) -> dict[str, Any]:
        """The fields of SchedulerConfig."""
        return {
            "num_speculative_tokens": self.config.num_speculative_tokens,
            "adaptive_speculation": self.config.adaptive,
            "drafts_are_free": self.config.method in LOOKUPS,
            "max_step_rows": max_num_seqs + self.num_draft_rows(max_num_seqs),
            "levels_prompts": False,  # how many steps there will be is not known
        }


def find_draft(wanted: SpeculationConfig, config: EngineConfig) -> Draft:
    """Find the model that makes guesses, if it takes one. Raises ValueError for what there is not."""
    if wanted.synthetic_acceptance is not None and config.device == "cpu":
        raise ValueError(f"speculative_config: synthetic_acceptance={wanted.synthetic_acceptance} needs a GPU")
    if wanted.quantization is not None and config.device == "cpu":
        raise ValueError(f"speculative_config: quantization={wanted.quantization} needs a GPU")
    if wanted.draft_sample_method != "greedy" and config.device == "cpu":
        raise ValueError(f"speculative_config: draft_sample_method={wanted.draft_sample_method} needs a GPU")
    if config.options.attention_backend == "torch" and config.device != "cpu":
        raise ValueError("attention_backend=torch has no speculation; allowed: auto, triton, flashinfer")
    if wanted.method in LOOKUPS:
        return Draft(config=wanted)
    assert wanted.model is not None
    load_format: LoadFormat = "dummy" if config.options.load_format == "dummy" else "auto"
    source = resolve_source(wanted.model, revision=wanted.revision, load_format=load_format)
    itemsize = 4 if config.dtype == "float32" else 2
    facts = model_facts(source.config) if wanted.method == "draft_model" else _head_facts(source.config)
    num_bytes = 2 * facts.num_layers * facts.num_kv_heads * facts.head_dim * itemsize
    return Draft(config=wanted, source=source, facts=facts, kv_bytes_per_token=num_bytes)


def _head_facts(values: Mapping[str, Any]) -> ModelFacts:
    """What is needed of a draft head: its KV, and what its kernels are compiled for. Raises ValueError naming the field
    that is missing or wrong."""
    fields = ConfigFields(values)
    heads, hidden = fields.integer("num_attention_heads"), fields.integer("hidden_size")
    vocab_size = fields.integer("vocab_size")
    return ModelFacts(
        max_position_embeddings=1,
        vocab_size=fields.integer("draft_vocab_size", vocab_size),
        num_layers=1,
        num_kv_heads=fields.integer("num_key_value_heads", heads),
        head_dim=fields.integer("head_dim", hidden // heads),
        num_heads=heads,
        hidden_size=hidden,
        intermediate_size=fields.integer("intermediate_size"),
    )


def load_drafter(
    draft: Draft, target: CausalLM, dtype: torch.dtype, device: torch.device
) -> CausalLM | DraftHead | None:
    """The model that makes guesses, loaded, where there is one. Raises ValueError where it does not fit the target."""
    method = draft.config.method
    if draft.source is None or method == "ngram" or method == "suffix":
        return None
    model = load_draft(draft.source, method, target, dtype, device, 0, draft.config.quantization)
    _log.info("draft model: %.0f MiB", model.weight_bytes / 1024**2)
    return model


def cpu_drafter(draft: Draft, target: CausalLM, slots: Slots, num_blocks: int) -> tuple[Drafter, int | None]:
    """What makes guesses on a CPU, over a KV cache of so many blocks; and, of a draft head, how
    many layers of the target it taps."""
    dtype = target.embed_tokens.weight.dtype
    model = load_drafter(draft, target, dtype, torch.device("cpu"))
    if model is None or draft.facts is None:
        return LookupDrafter(draft.lookup, slots.token_ids), None
    facts = draft.facts
    attention = CpuAttention(facts.num_layers, num_blocks, slots.block_size, facts.num_kv_heads, facts.head_dim, dtype)
    if isinstance(model, DraftHead):
        return HeadDrafter(model, attention, slots), len(model.tap_layers)
    return ModelDrafter(model, attention, slots), None
