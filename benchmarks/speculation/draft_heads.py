"""EAGLE and EAGLE-3 heads for SmolLM2 in plain torch, to train: their parameters carry the published names."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

# Where training starts. The target's states are of the order of 20 deep down, and its last norm makes logits that are
# sure of what they say: an untrained draft had better not be.
_FEATURE_SCALE, _LAYER_SCALE, CONFIDENCE = 0.05, 0.1, 0.3


class Chain(NamedTuple):
    """What a head has made of a text so far. Keys and values: one pair of [heads, T, head_dim] a step of the chain."""

    features: Tensor
    keys: list[Tensor]
    values: list[Tensor]


class Attention(nn.Module):
    """Grouped-query attention along chains: anchor i's query of step s sees the keys of step 0 at the anchors up to i,
    and those that its own chain has made since."""

    def __init__(self, config: Any, in_features: int) -> None:
        super().__init__()
        dim = config.hidden_size // config.num_attention_heads
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.q_proj = nn.Linear(in_features, self.heads * dim, bias=False)
        self.k_proj = nn.Linear(in_features, self.kv_heads * dim, bias=False)
        self.v_proj = nn.Linear(in_features, self.kv_heads * dim, bias=False)
        self.o_proj = nn.Linear(self.heads * dim, config.hidden_size, bias=False)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor], chain: Chain) -> Tensor:
        """x: [T, in_features]. Adds its keys and values to the chain."""
        q, k, v = (
            proj(x).view(len(x), n, -1).transpose(0, 1)
            for proj, n in ((self.q_proj, self.heads), (self.k_proj, self.kv_heads), (self.v_proj, self.kv_heads))
        )
        q, k = (heads[0] for heads in apply_rotary_pos_emb(q[None], k[None], *rotation))
        chain.keys.append(k.repeat_interleave(self.heads // self.kv_heads, 0))
        chain.values.append(v.repeat_interleave(self.heads // self.kv_heads, 0))
        past = torch.ones(len(x), len(x), dtype=torch.bool).tril()
        scores = (q @ chain.keys[0].transpose(1, 2)).masked_fill(~past, -torch.inf)
        own = [(q * key).sum(-1, keepdim=True) for key in chain.keys[1:]]
        weights = (torch.cat((scores, *own), -1) * q.shape[-1] ** -0.5).softmax(-1)
        out = weights[..., : len(x)] @ chain.values[0]
        for step, value in enumerate(chain.values[1:]):
            out = out + weights[..., len(x) + step, None] * value
        return self.o_proj(out.transpose(0, 1).reshape(len(x), -1))


class Layer(nn.Module):
    """A decoder layer: with the norms of an EAGLE-3 head, or with that before the MLP alone."""

    def __init__(self, config: Any, is_eagle3: bool) -> None:
        super().__init__()
        size, norm = config.hidden_size, (config.hidden_size, config.rms_norm_eps)
        if is_eagle3:
            self.input_layernorm, self.hidden_norm = LlamaRMSNorm(*norm), LlamaRMSNorm(*norm)
        self.self_attn = Attention(config, (1 + is_eagle3) * size)
        self.post_attention_layernorm = LlamaRMSNorm(*norm)
        self.mlp = nn.ModuleDict(
            {
                "gate_proj": nn.Linear(size, config.intermediate_size, bias=False),
                "up_proj": nn.Linear(size, config.intermediate_size, bias=False),
                "down_proj": nn.Linear(config.intermediate_size, size, bias=False),
            }
        )

    def finish(self, residual: Tensor) -> Tensor:
        normed = self.post_attention_layernorm(residual)
        gated = F.silu(self.mlp["gate_proj"](normed)) * self.mlp["up_proj"](normed)
        return residual + self.mlp["down_proj"](gated)


class Head(nn.Module):
    """What both kinds of head do: chains of steps along a text, all anchors at once.

    Step s at anchor i reads token i + 1 + s, at position i + s, and predicts token i + 2 + s.
    """

    def __init__(self, target: Any) -> None:
        super().__init__()
        self.target = [target.model]  # in a list: the target is no part of the head

    def begin(self, states: Tensor) -> Chain:
        """states: of the target, [T, F]."""
        return Chain(self.fuse(states), [], [])

    def step(self, ids: Tensor, chain: Chain) -> tuple[Tensor, Chain]:
        """ids: of the tokens that the anchors read now, [T]. Returns what `logits` takes, and the chain."""
        (target,) = self.target
        positions = torch.arange(len(ids))[None] + len(chain.keys)
        rotation = target.rotary_emb(chain.features, positions)
        features = self.advance(target.embed_tokens(ids), rotation, chain)
        return features, Chain(features, chain.keys, chain.values)

    def fuse(self, states: Tensor) -> Tensor:
        raise NotImplementedError

    def advance(self, embedded: Tensor, rotation: tuple[Tensor, Tensor], chain: Chain) -> Tensor:
        raise NotImplementedError

    def logits(self, features: Tensor) -> Tensor:
        """Of the tokens that it is trained on."""
        raise NotImplementedError

    def draft(self, features: Tensor) -> Tensor:
        """The ids that it drafts, [T]."""
        raise NotImplementedError


class EagleHead(Head):
    """Starts close to handing its features through; drafts with the target's language head."""

    def __init__(self, target: Any, draft_ids: Tensor) -> None:
        super().__init__(target)
        config, last = target.config, target.model.layers[-1]
        size = config.hidden_size
        self.fc = nn.Linear(2 * size, size, bias=False)
        self.layers = nn.ModuleList([Layer(config, False)])
        _copy(self.layers[0], last)
        self.fc.weight.data.copy_(torch.cat((torch.eye(size), torch.eye(size)), 1))
        self.table = [target.model.embed_tokens.weight[draft_ids]]

    def fuse(self, states: Tensor) -> Tensor:
        return states

    def advance(self, embedded: Tensor, rotation: tuple[Tensor, Tensor], chain: Chain) -> Tensor:
        x = self.fc(torch.cat((embedded, chain.features), -1))
        (layer,) = self.layers
        return layer.finish(x + layer.self_attn(x, rotation, chain))

    def logits(self, features: Tensor) -> Tensor:
        return features @ self.table[0].T

    def draft(self, features: Tensor) -> Tensor:
        (target,) = self.target
        return (features @ target.embed_tokens.weight.T).argmax(-1)


class Eagle3Head(Head):
    """Starts close to handing the deepest of its taps to the target's language head, unsure of what it says."""

    def __init__(self, target: Any, draft_ids: Tensor, num_taps: int) -> None:
        super().__init__(target)
        self.draft_ids = draft_ids
        config, last = target.config, target.model.layers[-1]
        size = config.hidden_size
        self.fc = nn.Linear(num_taps * size, size, bias=False)
        self.midlayer = Layer(config, True)
        self.norm = LlamaRMSNorm(size, config.rms_norm_eps)
        self.lm_head = nn.Linear(size, len(draft_ids), bias=False)
        _copy(self.midlayer, last)
        self.midlayer.hidden_norm.weight.data.copy_(last.input_layernorm.weight)
        self.midlayer.input_layernorm.weight.data.copy_(target.model.layers[0].input_layernorm.weight)
        self.norm.weight.data.copy_(CONFIDENCE * target.model.norm.weight)
        self.lm_head.weight.data.copy_(target.model.embed_tokens.weight[draft_ids])
        self.fc.weight.data.normal_(0, 1e-3)
        self.fc.weight.data[:, -size:] += _FEATURE_SCALE * torch.eye(size)

    def fuse(self, states: Tensor) -> Tensor:
        return self.fc(states)

    def advance(self, embedded: Tensor, rotation: tuple[Tensor, Tensor], chain: Chain) -> Tensor:
        layer = self.midlayer
        x = torch.cat((layer.input_layernorm(embedded), layer.hidden_norm(chain.features)), -1)
        return layer.finish(chain.features + layer.self_attn(x, rotation, chain))

    def logits(self, features: Tensor) -> Tensor:
        return self.lm_head(self.norm(features))

    def draft(self, features: Tensor) -> Tensor:
        return self.draft_ids[self.logits(features).argmax(-1)]


def _copy(layer: Layer, source: Any) -> None:
    """Start from a layer of the target, whose part in the residual stream is small at first. What reads the embedding
    beside the features starts from the same weights."""
    for name in ("q_proj", "k_proj", "v_proj"):
        weight, given = getattr(layer.self_attn, name).weight.data, getattr(source.self_attn, name).weight
        weight.copy_(given.repeat(1, weight.shape[1] // given.shape[1]))
    layer.self_attn.o_proj.weight.data.copy_(_LAYER_SCALE * source.self_attn.o_proj.weight)
    for name, linear in layer.mlp.items():
        linear.weight.data.copy_(getattr(source.mlp, name).weight)
    layer.mlp["down_proj"].weight.data.mul_(_LAYER_SCALE)
    layer.post_attention_layernorm.weight.data.copy_(source.post_attention_layernorm.weight)
