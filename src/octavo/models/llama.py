"""Llama (Touvron et al., 2023) and the decoder that its relatives share; they differ in what their config says."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from octavo.layers.activation import silu_and_mul
from octavo.layers.attention import Attention, AttentionContext
from octavo.layers.embedding import Embedding
from octavo.layers.linear import Linear
from octavo.layers.norm import QueryKeyNorm, RMSNorm
from octavo.layers.rotary import RotaryEmbedding, Rotation
from octavo.layers.score import ScoreHead
from octavo.models.base import CausalLM, Narrow
from octavo.models.config import ConfigFields, DecoderConfig
from octavo.quantization.scheme import Fp8Tokens, QuantizationMethod
from octavo.quantization.unquantized import PLAIN

_NO_TOKENS = 16  # logits of a model without a language head


class Place(NamedTuple):
    """What a layer computes in, and where; what Linear takes last."""

    dtype: torch.dtype
    device: torch.device


class SelfAttention(nn.Module):
    """Grouped-query attention between its projections."""

    def __init__(self, config: DecoderConfig, layer_index: int, place: Place, in_features: int | None = None) -> None:
        """in_features: of what the queries, keys and values are made of; None for hidden_size."""
        super().__init__()
        heads, kv_heads, dim = config.num_heads, config.num_kv_heads, config.head_dim
        parts = {"q_proj": heads * dim, "k_proj": kv_heads * dim, "v_proj": kv_heads * dim}
        self.qkv_proj = Linear(in_features or config.hidden_size, parts, config.qkv_bias, *place)
        self.qk_norm: QueryKeyNorm | None = None
        if config.qk_norm:
            self.qk_norm = QueryKeyNorm(heads, kv_heads, dim, config.rms_norm_eps, place.dtype, place.device)
        self.attn = Attention(layer_index, heads, kv_heads, dim, config.layer_windows[layer_index])
        self.o_proj = Linear(heads * dim, {"o_proj": config.hidden_size}, config.output_bias, *place)

    def forward(self, x: Tensor | Fp8Tokens, rotation: Rotation, context: AttentionContext) -> Tensor:
        return self.o_proj(self.attend(x, rotation, context))

    def attend(self, x: Tensor | Fp8Tokens, rotation: Rotation, context: AttentionContext) -> Tensor:
        """What the heads have found, [T, num_heads * head_dim]."""
        return self.attn(self.qkv_proj(x), rotation, self.qk_norm, context)


class MLP(nn.Module):
    """The gated feed-forward network."""

    def __init__(self, config: DecoderConfig, place: Place) -> None:
        super().__init__()
        hidden, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_up_proj = Linear(hidden, {"gate_proj": inner, "up_proj": inner}, bias, *place)
        self.down_proj = Linear(inner, {"down_proj": hidden}, bias, *place)

    def forward(self, x: Tensor | Fp8Tokens) -> Tensor:
        gated: Tensor | Fp8Tokens | None = self.gate_up_proj.gated(x)
        if gated is None:
            gate_up = self.gate_up_proj(x)
            gated = silu_and_mul(gate_up, self.down_proj.takes_fp8(gate_up))
        return self.down_proj(gated)


class DecoderLayer(nn.Module):
    """Attention, then the feed-forward network, each on the normalised residual stream and added to it."""

    def __init__(self, config: DecoderConfig, layer_index: int, place: Place) -> None:
        super().__init__()
        norm = config.hidden_size, config.rms_norm_eps, place.dtype, place.device
        self.input_layernorm = RMSNorm(*norm)
        self.self_attn = SelfAttention(config, layer_index, place)
        self.post_attention_layernorm = RMSNorm(*norm)
        self.mlp = MLP(config, place)

    def forward(
        self,
        residual: Tensor,
        delta: Tensor | None,
        rotation: Rotation,
        context: AttentionContext,
        narrow: Narrow | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Adds to `residual` [T, hidden_size] in place: `delta`, then the attention. Returns it, and what is still to
        be added: each norm adds what came before it, in one pass. narrow: both are of the tokens that it picks."""
        normed = self.input_layernorm(residual, delta, self.self_attn.qkv_proj.takes_fp8(residual))
        heads = self.self_attn.attend(normed, rotation, context)
        if narrow is not None:
            heads, residual = narrow(heads, residual)
        attended = self.self_attn.o_proj(heads)
        normed = self.post_attention_layernorm(residual, attended, self.mlp.gate_up_proj.takes_fp8(residual))
        return residual, self.mlp(normed)


class Decoder(nn.Module):
    """Token ids to the last hidden states."""

    def __init__(self, config: DecoderConfig, place: Place) -> None:
        super().__init__()
        dtype, device = place
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, dtype, device)
        self.layers = nn.ModuleList(DecoderLayer(config, i, place) for i in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype, device)
        self.rotary = RotaryEmbedding(config.rope, config.head_dim, config.max_position_embeddings, dtype, device)
        self.tapped: dict[int, int] = {}  # the place among the taps of each tapped layer; written by `tap`

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        context: AttentionContext,
        taps: Tensor | None,
        narrow: Narrow | None,
    ) -> Tensor:
        """See CausalLM."""
        last = len(self.layers) - 1
        residual, rotation = self.embed_tokens(input_ids, positions, self.rotary)
        delta: Tensor | None = None
        for index, layer in enumerate(self.layers):
            if taps is not None:
                self._write_tap(index, residual, delta, taps)
            residual, delta = layer(residual, delta, rotation, context, narrow if index == last else None)
        if taps is not None:
            self._write_tap(len(self.layers), residual, delta, taps)
        return self.norm(residual, delta)

    def _write_tap(self, layer: int, residual: Tensor, delta: Tensor | None, taps: Tensor) -> None:
        """The state that enters a layer is residual + delta: its first norm will add the two in place."""
        place = self.tapped.get(layer)
        if place is None:
            return
        size = residual.shape[-1]
        tap = taps[:, place * size : (place + 1) * size]
        if delta is None:
            tap.copy_(residual)
        else:
            torch.add(residual, delta, out=tap)


class LlamaForCausalLM(CausalLM):
    """Llama 1 to 3.x, SmolLM2 and others that carry the name."""

    def __init__(
        self, config: DecoderConfig, dtype: torch.dtype, device: torch.device, method: QuantizationMethod = PLAIN
    ) -> None:
        """method: how the linear layers keep their weights."""
        super().__init__()
        self.config = config
        self.model = Decoder(config, Place(dtype, device))
        self.lm_head: Linear | None = None
        if config.head == "tokens":
            self.lm_head = Linear(config.hidden_size, {"lm_head": config.vocab_size}, False, dtype, device)
        self.score = ScoreHead(config.hidden_size, device) if config.head == "scores" else None
        self.create_weights(method)

    @staticmethod
    def read_config(values: Mapping[str, Any]) -> DecoderConfig:
        """Raises ValueError naming the field that is missing, out of range or not supported."""
        fields = ConfigFields(values)
        bias = fields.flag("attention_bias", False)
        return fields.decoder(qkv_bias=bias, output_bias=bias, mlp_bias=fields.flag("mlp_bias", False))

    @property
    def embed_tokens(self) -> Embedding:
        return self.model.embed_tokens

    def tap(self, layers: tuple[int, ...]) -> None:
        num_layers = self.config.num_layers
        if list(layers) != sorted(set(layers)) or not all(0 <= layer <= num_layers for layer in layers):
            raise ValueError(f"tapped layers {list(layers)} are not supported; allowed: ascending, 0 to {num_layers}")
        self.model.tapped = {layer: place for place, layer in enumerate(layers)}

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        attention: AttentionContext,
        taps: Tensor | None = None,
        narrow: Narrow | None = None,
    ) -> Tensor:
        return self.model(input_ids, positions, attention, taps, narrow)

    def compute_logits(self, hidden: Tensor) -> Tensor:
        return self.lm_head(hidden) if self.lm_head is not None else hidden.new_zeros(hidden.shape[0], _NO_TOKENS)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], names: Collection[str] | None = None) -> None:
        super().load_weights(self._with_score(weights) if self.config.classifier_token_ids else weights, names)

    def _with_score(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """The weights with that of the score: the row of the language head for "yes", less that for "no" where both
        are given. So its sigmoid is the probability of "yes" among the two."""
        head = "embed_tokens.weight" if self.config.tie_word_embeddings else "lm_head.weight"
        for name, tensor in weights:
            if name.removeprefix("model.") == head:
                *no, yes = tensor[list(self.config.classifier_token_ids)].float()
                yield "score.weight", (yes - no[0] if no else yes)[None]
            yield name, tensor

    def weight_slots(self) -> dict[str, Any]:
        slots = super().weight_slots()
        if self.config.tie_word_embeddings:
            slots.pop("lm_head.weight", None)
        return slots

    def ignores(self, name: str) -> bool:
        is_unused = self.config.tie_word_embeddings or self.lm_head is None
        return super().ignores(name) or (name == "lm_head.weight" and is_unused)

    def finish_loading(self) -> None:
        if self.config.tie_word_embeddings and self.lm_head is not None:
            self.lm_head.tie(self.model.embed_tokens.weight)
