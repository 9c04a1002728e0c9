"""EAGLE-3's draft head (Li et al., 2025), as its authors, SpecForge and AngelSlim publish it for Llama: one decoder
layer that attends to the token's embedding beside a mixture of the target's states in three depths, and a vocabulary
of its own."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from octavo.layers.attention import AttentionContext
from octavo.layers.linear import Linear
from octavo.layers.norm import RMSNorm
from octavo.layers.rotary import Rotation
from octavo.layers.slot import WeightSlot
from octavo.models.base import Drafted
from octavo.models.config import ConfigFields, DecoderConfig
from octavo.models.eagle import HeadConfig, LlamaHead, read_layer
from octavo.models.llama import MLP, Place, SelfAttention
from octavo.quantization.scheme import TensorSpec
from octavo.quantization.unquantized import PLAIN

_TAPS = "eagle_aux_hidden_state_layer_ids"


class Eagle3Layer(nn.Module):
    """A decoder layer whose queries, keys and values see the embedding beside the features."""

    def __init__(self, config: HeadConfig, place: Place) -> None:
        super().__init__()
        layer = config.layer
        norm = layer.hidden_size, layer.rms_norm_eps, *place
        self.input_layernorm, self.hidden_norm = RMSNorm(*norm), RMSNorm(*norm)
        self.self_attn = SelfAttention(layer, 0, place, 2 * layer.hidden_size)
        self.post_attention_layernorm = RMSNorm(*norm)
        self.mlp = MLP(layer, place)
        self._norm_before_residual = config.norm_before_residual

    def forward(
        self, embedded: Tensor, features: Tensor, rotation: Rotation, context: AttentionContext
    ) -> tuple[Tensor, Tensor]:
        """Both inputs: [T, hidden_size]; features may be overwritten. Returns the residual stream, and what is still to
        be added to it."""
        normed = self.hidden_norm(features)
        residual = normed if self._norm_before_residual else features
        attended = self.self_attn(torch.cat((self.input_layernorm(embedded), normed), -1), rotation, context)
        return residual, self.mlp(self.post_attention_layernorm(residual, attended))


class DraftVocabulary(nn.Module):
    """The target's ids of the tokens that a head can draft. A checkpoint has them as d2t: what is to be added to each
    token's place."""

    target_ids: Tensor  # int64 [draft vocabulary]

    def __init__(self, size: int, target_size: int, device: torch.device) -> None:
        super().__init__()
        self.register_buffer("target_ids", torch.arange(size, device=device), persistent=False)
        self._target_size = target_size

    def forward(self, draft_ids: Tensor) -> Tensor:
        return self.target_ids[draft_ids]

    def weight_slots(self, path: str) -> dict[str, WeightSlot]:  # noqa: ARG002
        size = len(self.target_ids)
        spec = TensorSpec(
            shape=(size,),
            dtypes=(torch.int64, torch.int32),
            required=size != self._target_size,
            dummy=lambda generator: torch.zeros(size, dtype=torch.int64, device=generator.device),
        )
        return {"d2t": WeightSlot(spec, self._load)}

    def _load(self, offsets: Tensor | None) -> None:
        if offsets is None:
            return
        self.target_ids += offsets.to(self.target_ids)
        least, most = int(self.target_ids.min()), int(self.target_ids.max())
        if least < 0 or most >= self._target_size:
            raise ValueError(f"d2t leads to token ids {least} to {most}; allowed: 0 to {self._target_size - 1}")


class Eagle3Head(LlamaHead):
    """Its residual stream goes on as the next token's features; normalised, it makes the logits."""

    def __init__(self, config: HeadConfig, names: Collection[str], dtype: torch.dtype, device: torch.device) -> None:
        place = Place(dtype, device)
        super().__init__(config, names, place)
        layer = config.layer
        num_states = len(config.tap_layers) * config.target_hidden_size
        has_bias = "fc.bias" in map(self.slot_name, names)
        self.fc = Linear(num_states, {"fc": layer.hidden_size}, has_bias, dtype, device)
        self.midlayer = Eagle3Layer(config, place)
        self.norm = RMSNorm(layer.hidden_size, layer.rms_norm_eps, dtype, device)
        self.vocabulary = DraftVocabulary(config.draft_vocab_size, layer.vocab_size, device)
        self.create_weights(PLAIN)

    @staticmethod
    def read_config(values: Mapping[str, Any], target: DecoderConfig) -> HeadConfig:
        """Raises as read_layer."""
        layer, fields = read_layer(values, target), ConfigFields(values)
        target_hidden_size = fields.integer("target_hidden_size", layer.hidden_size)
        if target_hidden_size != target.hidden_size:
            name = "target_hidden_size" if values.get("target_hidden_size") is not None else "hidden_size"
            raise ValueError(
                f"config field {name}={target_hidden_size} is not supported; "
                f"allowed: {target.hidden_size}, the target's"
            )
        draft_vocab_size = fields.integer("draft_vocab_size", layer.vocab_size)
        if draft_vocab_size > layer.vocab_size:
            raise ValueError(
                f"config field draft_vocab_size={draft_vocab_size} is out of range; "
                f"allowed: 1 to {layer.vocab_size} (vocab_size)"
            )
        return HeadConfig(
            layer=layer,
            target_hidden_size=target_hidden_size,
            draft_vocab_size=draft_vocab_size,
            tap_layers=_tap_layers(values, target.num_layers),
            norm_before_residual=fields.flag("norm_before_residual", False),
        )

    def slot_name(self, name: str) -> str:
        name = super().slot_name(name)
        return name.replace("layers.0.", "midlayer.", 1) if name.startswith("layers.0.") else name

    def ignores(self, name: str) -> bool:
        """t2d says which of the target's tokens are in the draft vocabulary, as d2t does."""
        return super().ignores(name) or self.slot_name(name) == "t2d"

    def fuse(self, states: Tensor) -> Tensor:
        return self.fc(states)

    def forward(self, input_ids: Tensor, positions: Tensor, features: Tensor, attention: AttentionContext) -> Drafted:
        embedded, rotation = self._embed(input_ids, positions, self.rotary)
        residual, delta = self.midlayer(embedded, features, rotation, attention)
        hidden = self.norm(residual, delta)  # adds delta to residual
        return Drafted(residual, hidden)

    def to_target_ids(self, draft_ids: Tensor) -> Tensor:
        return self.vocabulary(draft_ids)


def _tap_layers(values: Mapping[str, Any], num_layers: int) -> tuple[int, ...]:
    """The target's layers whose inputs the head takes: those of the authors' code, unless the config names some.

    Configs name them in one of two ways, by the layer that a state enters or by the one that it leaves. The authors'
    first is the state between layers 1 and 2, so lists that begin with 1 are read as of the second kind (as SGLang
    does).
    """
    eagle_config = values.get("eagle_config") or {}
    if not isinstance(eagle_config, Mapping) or eagle_config.get("use_aux_hidden_state", True) is not True:
        raise ValueError(
            f"config field eagle_config={eagle_config!r} is not supported; allowed: use_aux_hidden_state=true"
        )
    listed = values.get(_TAPS) or eagle_config.get(_TAPS)
    if listed is None:
        return 2, num_layers // 2, num_layers - 3
    if not isinstance(listed, list) or not all(type(layer) is int for layer in listed):
        raise ValueError(f"config field {_TAPS}={listed!r} is not supported; allowed: a list of layers")
    return tuple(layer + 1 for layer in listed) if listed[0] == 1 else tuple(listed)
