"""Draft heads: they compute what a plain reading of their papers computes, and refuse what does not fit by name."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from draft_folders import (
    DRAFT_VOCAB,
    EAGLE,
    EAGLE3,
    HIDDEN,
    VOCAB,
    eagle3_reference,
    eagle3_tensors,
    eagle_reference,
    eagle_tensors,
    write,
)
from tiny_models import NUM_TOKENS, SIZES, save, token_ids
from torch import Tensor
from transformers import LlamaConfig

from octavo.attention.backend import AttentionBatch
from octavo.attention.cpu import CpuAttention
from octavo.loading.source import resolve_source
from octavo.loading.weights import load_draft, load_model
from octavo.models.base import CausalLM, DraftHead

CPU = torch.device("cpu")
NUM_DRAFTED = 3


class Target(NamedTuple):
    """A tiny Llama here and in transformers."""

    model: CausalLM
    reference: Any


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Target:
    folder = tmp_path_factory.mktemp("target")
    reference = save(LlamaConfig(**SIZES), folder)
    return Target(load_model(resolve_source(str(folder)), torch.float32, CPU, 0), reference)


def load(folder: Path, method: Any, target: Target) -> DraftHead:
    head = load_draft(resolve_source(str(folder)), method, target.model, torch.float32, CPU, 0)
    assert isinstance(head, DraftHead)
    return head


def dense(target: Target, dense_context: Any, taps: Tensor | None = None) -> Tensor:
    with torch.inference_mode():
        return target.model(token_ids(VOCAB), torch.arange(NUM_TOKENS), dense_context, taps)


class Cache:
    """One layer's paged cache of one sequence: what a runner gives a head."""

    def __init__(self, head: DraftHead) -> None:
        config = head.config
        self.attention = CpuAttention(config.num_layers, 9, 8, config.num_kv_heads, config.head_dim, torch.float32)
        self.held = 0

    def prepare(self, length: int) -> Tensor:
        """The positions of so many more tokens."""
        positions = torch.arange(self.held, self.held + length)
        tables = torch.arange(1, 9)[None]  # block 0 is the null block
        batch = AttentionBatch([self.held], [length], tables, tables[0, positions // 8] * 8 + positions % 8)
        self.attention.prepare(batch)
        self.held += length
        return positions


@torch.inference_mode()
def chain(head: DraftHead, states: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Features and logits of the last position: of the text, then of each token that the head drafts greedily."""
    cache, ids = Cache(head), token_ids(VOCAB)[1:]
    features, made, logits = head.fuse(states[:-1]), [], []
    for _ in range(NUM_DRAFTED):
        out = head(ids, cache.prepare(len(ids)), features.clone(), cache.attention)
        made.append(out.features[-1:].clone())
        logits.append(head.compute_logits(out.hidden[-1:]))
        ids, features = head.to_target_ids(logits[-1].argmax(-1)), made[-1]
    return made, logits


@pytest.mark.parametrize("layers", [(0, 1, 3), (2,), (), (0, 1, 2, 3)])
def test_taps_are_the_states_that_enter_layers(layers: tuple[int, ...], target: Target, dense_context: Any) -> None:
    taps = torch.full((NUM_TOKENS, len(layers) * HIDDEN), torch.nan)
    plain = dense(target, dense_context)
    target.model.tap(layers)
    torch.testing.assert_close(dense(target, dense_context, taps), plain)
    with torch.inference_mode():
        states = list(target.reference(token_ids(VOCAB)[None], output_hidden_states=True).hidden_states)
        for place, layer in enumerate(layers):
            tap = taps[:, place * HIDDEN : (place + 1) * HIDDEN]
            if layer == SIZES["num_hidden_layers"]:  # transformers hands the last out normalised
                tap = target.reference.model.norm(tap)
            torch.testing.assert_close(tap, states[layer][0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("layers", [(2, 1), (1, 1), (-1,), (0, 4)])
def test_taps_that_there_are_not(layers: tuple[int, ...], target: Target) -> None:
    with pytest.raises(ValueError, match=re.escape(f"tapped layers {list(layers)} are not supported; allowed: asc")):
        target.model.tap(layers)


@pytest.mark.parametrize("extra", ["", "bias", "embedding", "prefix"])
def test_an_eagle_head_and_its_chain(extra: str, target: Target, tmp_path: Path, dense_context: Any) -> None:
    tensors = eagle_tensors()
    table = target.reference.model.embed_tokens.weight.detach()
    if extra == "bias":
        tensors["fc.bias"] = torch.linspace(-1, 1, HIDDEN)
    if extra == "embedding":
        tensors["embed_tokens.weight"] = table = table.flip(0)
    saved = {f"model.{name}" if extra == "prefix" else name: tensor for name, tensor in tensors.items()}
    head = load(write(tmp_path, EAGLE, saved), "eagle", target)
    assert (head.tap_layers, head.config.num_layers) == ((), 1)
    states = dense(target, dense_context)
    made, logits = chain(head, states)
    ids, features = token_ids(VOCAB)[1:], states[:-1]
    for feature, scores in zip(made, logits, strict=True):
        expected = eagle_reference(table[ids], features, tensors)[-1:]
        # Rounding grows along the chain, and differs with the CPU's instructions; features are about 1.
        torch.testing.assert_close(feature, expected, atol=5e-4, rtol=1e-4)
        torch.testing.assert_close(scores, target.reference.lm_head(expected).detach(), atol=2e-3, rtol=1e-4)
        ids, features = torch.cat((ids, scores.argmax(-1))), torch.cat((features, expected))


EAGLE3_CASES: dict[str, dict[str, Any]] = {
    "published": {},
    "layers.0": {},
    "norm-before-residual": {"norm_before_residual": True},
    "narrow": {"hidden_size": 32, "num_attention_heads": 4, "target_hidden_size": HIDDEN},
}


@pytest.mark.parametrize("case", EAGLE3_CASES)
def test_an_eagle3_head_and_its_chain(case: str, target: Target, tmp_path: Path, dense_context: Any) -> None:
    config = EAGLE3 | EAGLE3_CASES[case]
    tensors = eagle3_tensors(config)
    table = target.reference.model.embed_tokens.weight.detach()
    if case == "narrow":
        tensors["embed_tokens.weight"] = table = torch.randn(VOCAB, 32)
    saved = {name.replace("midlayer", "layers.0") if case == "layers.0" else name: t for name, t in tensors.items()}
    head = load(write(tmp_path, config, saved), "eagle3", target)
    assert head.tap_layers == (0, 2, 3)
    taps = torch.empty(NUM_TOKENS, 3 * HIDDEN)
    dense(target, dense_context, taps)
    made, logits = chain(head, taps)
    ids, features = token_ids(VOCAB)[1:], taps[:-1] @ tensors["fc.weight"].T
    offsets = torch.arange(DRAFT_VOCAB) + tensors["d2t"]
    for feature, scores in zip(made, logits, strict=True):
        next_features, expected = eagle3_reference(table[ids], features, tensors, config)
        torch.testing.assert_close(feature, next_features[-1:], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(scores, expected[-1:], atol=1e-3, rtol=1e-4)
        ids = torch.cat((ids, offsets[scores.argmax(-1)]))
        features = torch.cat((features, next_features[-1:]))


def test_a_head_with_all_tokens_needs_no_table(target: Target, tmp_path: Path) -> None:
    """Without a language head of its own, it uses the target's."""
    config = {name: value for name, value in EAGLE3.items() if name != "draft_vocab_size"}
    tensors = {name: t for name, t in eagle3_tensors().items() if name not in ("lm_head.weight", "d2t", "t2d")}
    head = load(write(tmp_path, config, tensors), "eagle3", target)
    hidden = torch.randn(2, HIDDEN)
    torch.testing.assert_close(head.compute_logits(hidden), target.model.compute_logits(hidden))
    assert head.to_target_ids(torch.tensor([0, 7])).tolist() == [0, 7]


def test_an_embedding_that_is_the_targets_is_held_once(target: Target, tmp_path: Path) -> None:
    tensors = eagle_tensors()
    alone = load(write(tmp_path / "a", EAGLE, tensors), "eagle", target)
    tensors["embed_tokens.weight"] = target.model.embed_tokens.weight.data
    same = load(write(tmp_path / "b", EAGLE, tensors), "eagle", target)
    assert same.weight_bytes == alone.weight_bytes
    tensors["embed_tokens.weight"] = tensors["embed_tokens.weight"] + 1
    other = load(write(tmp_path / "c", EAGLE, tensors), "eagle", target)
    assert other.weight_bytes == alone.weight_bytes + 4 * VOCAB * HIDDEN


@pytest.mark.parametrize(
    ("fields", "taps"),
    [
        ({"eagle_aux_hidden_state_layer_ids": [2, 3]}, (2, 3)),
        ({"eagle_config": {"eagle_aux_hidden_state_layer_ids": [0, 1, 3]}}, (0, 1, 3)),
        ({"eagle_aux_hidden_state_layer_ids": [1, 2]}, (2, 3)),  # the layers that the states leave
        ({}, (2, 10, 17)),
    ],
)
def test_which_layers_are_tapped(fields: dict[str, Any], taps: tuple[int, ...], tmp_path: Path) -> None:
    save(LlamaConfig(**SIZES | {"num_hidden_layers": 20}), tmp_path / "target")
    target = Target(load_model(resolve_source(str(tmp_path / "target")), torch.float32, CPU, 0), None)
    config = {name: value for name, value in EAGLE3.items() if name != "eagle_aux_hidden_state_layer_ids"} | fields
    tensors = eagle3_tensors()
    tensors["fc.weight"] = torch.zeros(HIDDEN, len(taps) * HIDDEN)
    assert load(write(tmp_path / "draft", config, tensors), "eagle3", target).tap_layers == taps


def test_a_plain_model_is_an_ordinary_one(target: Target, tmp_path: Path) -> None:
    save(LlamaConfig(**SIZES | {"num_hidden_layers": 1}), tmp_path)
    source = resolve_source(str(tmp_path))
    draft = load_draft(source, "draft_model", target.model, torch.float32, CPU, 0)
    assert isinstance(draft, CausalLM)
    assert draft.config.num_layers == 1


def test_dummy_heads_run(target: Target, tmp_path: Path, dense_context: Any) -> None:
    write(tmp_path, EAGLE3, {})
    source = resolve_source(str(tmp_path), load_format="dummy")
    head = load_draft(source, "eagle3", target.model, torch.float32, CPU, 0)
    taps = torch.empty(NUM_TOKENS, 3 * HIDDEN)
    dense(target, dense_context, taps)
    assert isinstance(head, DraftHead)
    assert all(scores.isfinite().all() for scores in chain(head, taps)[1])


@pytest.mark.parametrize(
    ("method", "change", "said"),
    [
        ("eagle", {"architectures": ["Eagle3LlamaForCausalLM"]}, r"\['Eagle3LlamaForCausalLM'\].*method 'eagle'"),
        ("eagle3", {"architectures": ["Qwen3ForCausalLM"]}, r"\['Qwen3ForCausalLM'\].*method 'eagle3'; allowed: Llama"),
        ("eagle3", {"architectures": None}, "architectures=None is not supported"),
        ("eagle", {"vocab_size": 99}, "vocab_size=99 is not supported; allowed: 101, the target's"),
        ("draft_model", {"vocab_size": 99}, "vocab_size=99 is not supported of a draft; allowed: 101, the target's"),
        ("draft_model", {"architectures": ["LlamaForCausalLMEagle3"]}, "architectures=.*LlamaForCausalLMEagle3"),
        ("eagle", {"hidden_size": 60}, "hidden_size=60 is not supported; allowed: 48, the target's"),
        ("eagle3", {"hidden_size": 60}, "hidden_size=60 is not supported; allowed: 48, the target's"),
        ("eagle3", {"target_hidden_size": 60}, "target_hidden_size=60 is not supported; allowed: 48"),
        ("eagle", {"num_hidden_layers": 2}, "num_hidden_layers=2 is not supported; allowed: 1"),
        ("eagle3", {"draft_vocab_size": 102}, r"draft_vocab_size=102 is out of range; allowed: 1 to 101"),
        ("eagle", {"add_para_norm": True}, "add_para_norm=True is not supported; allowed: False"),
        ("eagle3", {"quantization_config": {}}, "quantization_config is not supported of a draft head"),
        ("eagle3", {"eagle_config": {"use_aux_hidden_state": False}}, "eagle_config=.* is not supported"),
        ("eagle3", {"eagle_aux_hidden_state_layer_ids": ["1"]}, r"layer_ids=\['1'\] is not supported"),
        ("eagle3", {"eagle_aux_hidden_state_layer_ids": [0, 2, 9]}, r"tapped layers \[0, 2, 9\] are not supported"),
    ],
)
def test_a_config_that_does_not_fit_is_named(
    method: str, change: dict[str, Any], said: str, target: Target, tmp_path: Path
) -> None:
    is_eagle = method == "eagle"
    config = (EAGLE if is_eagle else EAGLE3) | change
    write(tmp_path, config, eagle_tensors() if is_eagle else eagle3_tensors())
    with pytest.raises(ValueError, match=said) as caught:
        load(tmp_path, method, target)
    assert str(tmp_path) in str(caught.value)


WRONG_OFFSETS = torch.zeros(DRAFT_VOCAB, dtype=torch.int64).fill_(VOCAB - DRAFT_VOCAB + 1)


@pytest.mark.parametrize(
    ("method", "change", "said"),
    [
        ("eagle", {"fc.weight": None}, "missing: fc.weight"),
        ("eagle", {"layers.0.input_layernorm.weight": torch.ones(HIDDEN)}, "not expected: layers.0.input_layernorm"),
        ("eagle", {"norm.weight": torch.ones(HIDDEN)}, "not expected: norm.weight"),
        ("eagle", {"fc.bias": torch.ones(3)}, r"wrong: fc.bias has shape \[3\], expected \[48\]"),
        ("eagle3", {"midlayer.hidden_norm.weight": None}, "missing: midlayer.hidden_norm.weight"),
        ("eagle3", {"lm_head.weight": None}, "missing: lm_head.weight"),
        ("eagle3", {"d2t": None}, "missing: d2t"),
        ("eagle3", {"d2t": torch.zeros(DRAFT_VOCAB)}, "d2t has dtype torch.float32, expected torch.int64"),
        ("eagle3", {"d2t": WRONG_OFFSETS}, "d2t leads to token ids 65 to 101; allowed: 0 to 100"),
        ("eagle3", {"midlayer.self_attn.q_norm.weight": torch.ones(8)}, "not expected: midlayer.self_attn.q_norm"),
        ("eagle3", {"lm_head.weight": torch.ones(VOCAB, HIDDEN)}, r"lm_head.weight has shape \[101, 48\]"),
    ],
)
def test_tensors_that_do_not_fit_are_named(
    method: str, change: dict[str, Tensor | None], said: str, target: Target, tmp_path: Path
) -> None:
    is_eagle = method == "eagle"
    tensors = (eagle_tensors() if is_eagle else eagle3_tensors()) | change
    write(tmp_path, EAGLE if is_eagle else EAGLE3, {name: t for name, t in tensors.items() if t is not None})
    with pytest.raises(ValueError, match=said) as caught:
        load(tmp_path, method, target)
    assert str(tmp_path) in str(caught.value)
