"""EAGLE's draft head (Li et al., 2024; EAGLE-2 drafts with the same), as its authors publish it for Llama: one decoder
layer without its first norm, on the token's embedding and the target's last hidden state."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from octavo.layers.attention import AttentionContext
from octavo.layers.embedding import Embedding
from octavo.layers.linear import Linear
from octavo.layers.norm import RMSNorm
from octavo.layers.rotary import RotaryEmbedding, Rotation
from octavo.models.base import CausalLM, Drafted, DraftHead
from octavo.models.config import ConfigFields, DecoderConfig
from octavo.models.llama import MLP, Place, SelfAttention
from octavo.quantization.unquantized import PLAIN

# Fields of relatives whose heads compute something else, and the only value that is supported.
_VARIANTS = {"add_para_norm": False, "norm_before_fc": False}


@dataclass(frozen=True, kw_only=True)
class HeadConfig:
    """layer: the decoder of one layer that a head is, with the target's vocabulary. target_hidden_size: of the target.
    draft_vocab_size: tokens that it can draft. tap_layers, norm_before_residual: of EAGLE-3."""

    layer: DecoderConfig
    target_hidden_size: int
    draft_vocab_size: int
    tap_layers: tuple[int, ...] = ()
    norm_before_residual: bool = False


def read_layer(values: Mapping[str, Any], target: DecoderConfig) -> DecoderConfig:
    """What a head's config.json says of its decoder layer. Raises ValueError naming the field that is missing, out of
    range, not supported, or not the target's."""
    fields = ConfigFields(values)
    bias = fields.flag("attention_bias", False)
    layer = fields.decoder(
        qkv_bias=fields.flag("qkv_bias", bias),
        output_bias=bias,
        mlp_bias=fields.flag("mlp_bias", False),
        tie_word_embeddings=False,  # a head without its own language head has the target's
    )
    wanted = {"num_hidden_layers": (layer.num_layers, 1), "vocab_size": (layer.vocab_size, target.vocab_size)}
    for name, (value, allowed) in wanted.items():
        if value != allowed:
            whose = ", the target's" if name == "vocab_size" else ""
            raise ValueError(f"config field {name}={value} is not supported; allowed: {allowed}{whose}")
    for name, supported in _VARIANTS.items():
        if fields.flag(name, supported) != supported:
            raise ValueError(f"config field {name}={values[name]!r} is not supported; allowed: {supported}")
    if values.get("quantization_config") is not None:
        raise ValueError("config field quantization_config is not supported of a draft head; allowed: none")
    return layer


class LlamaHead(DraftHead):
    """What EAGLE's heads share: the embedding and the language head may be the target's."""

    def __init__(self, config: HeadConfig, names: Collection[str], place: Place) -> None:
        """names: of the tensors that the checkpoint has; what is optional is made where they are there."""
        super().__init__()
        layer, (dtype, device) = config.layer, place
        held = {self.slot_name(name) for name in names}
        differs = layer.hidden_size != config.target_hidden_size
        self.config = layer
        self.tap_layers = config.tap_layers
        # None, once all is loaded, where they are the target's.
        self.embed_tokens: Embedding | None = None
        self.lm_head: Linear | None = None
        if differs or "embed_tokens.weight" in held:
            self.embed_tokens = Embedding(layer.vocab_size, layer.hidden_size, dtype, device)
        if differs or config.draft_vocab_size != layer.vocab_size or "lm_head.weight" in held:
            self.lm_head = Linear(layer.hidden_size, {"lm_head": config.draft_vocab_size}, False, dtype, device)
        self.rotary = RotaryEmbedding(layer.rope, layer.head_dim, layer.max_position_embeddings, dtype, device)
        # Methods, not modules: the target is no part of the head. Written by `share`.
        self._embed: Callable[[Tensor, Tensor, RotaryEmbedding], tuple[Tensor, Rotation]]
        self._logits: Callable[[Tensor], Tensor]

    def slot_name(self, name: str) -> str:
        return name.removeprefix("model.")

    def finish_loading(self) -> None:
        """Nothing within the head shares weights."""

    def share(self, target: CausalLM) -> None:
        table, theirs = self.embed_tokens, target.embed_tokens
        if table is not None and torch.equal(table.weight, theirs.weight):
            table = self.embed_tokens = None  # EAGLE's authors save the target's own, which training leaves alone
        self._embed = theirs.forward if table is None else table.forward
        self._logits = target.compute_logits if self.lm_head is None else self.lm_head.forward

    def compute_logits(self, hidden: Tensor) -> Tensor:
        return self._logits(hidden)

    def to_target_ids(self, draft_ids: Tensor) -> Tensor:
        return draft_ids


class EagleLayer(nn.Module):
    """A decoder layer that attends to its input as it comes."""

    def __init__(self, config: DecoderConfig, place: Place) -> None:
        super().__init__()
        self.self_attn = SelfAttention(config, 0, place)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, *place)
        self.mlp = MLP(config, place)

    def forward(self, residual: Tensor, rotation: Rotation, context: AttentionContext) -> Tensor:
        """Adds to `residual` [T, hidden_size] in place, and returns it."""
        attended = self.self_attn(residual, rotation, context)
        return residual.add_(self.mlp(self.post_attention_layernorm(residual, attended)))


class EagleHead(LlamaHead):
    """Its outputs stand for the target's last hidden states: they are the next token's features, and the target's
    language head makes logits of them."""

    def __init__(self, config: HeadConfig, names: Collection[str], dtype: torch.dtype, device: torch.device) -> None:
        place = Place(dtype, device)
        super().__init__(config, names, place)
        size = config.layer.hidden_size
        has_bias = "fc.bias" in map(self.slot_name, names)
        self.fc = Linear(2 * size, {"fc": size}, has_bias, dtype, device)
        self.layers = nn.ModuleList([EagleLayer(config.layer, place)])
        self.create_weights(PLAIN)

    @staticmethod
    def read_config(values: Mapping[str, Any], target: DecoderConfig) -> HeadConfig:
        """Raises as read_layer."""
        layer = read_layer(values, target)
        if layer.hidden_size != target.hidden_size:
            raise ValueError(
                f"config field hidden_size={layer.hidden_size} is not supported; "
                f"allowed: {target.hidden_size}, the target's"
            )
        return HeadConfig(layer=layer, target_hidden_size=target.hidden_size, draft_vocab_size=layer.vocab_size)

    def fuse(self, states: Tensor) -> Tensor:
        return states

    def forward(self, input_ids: Tensor, positions: Tensor, features: Tensor, attention: AttentionContext) -> Drafted:
        embedded, rotation = self._embed(input_ids, positions, self.rotary)
        residual = self.fc(torch.cat((embedded, features), -1))
        (layer,) = self.layers
        hidden = layer(residual, rotation, attention)
        return Drafted(hidden, hidden)
