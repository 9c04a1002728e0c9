"""CausalLM and DraftHead: what the worker runs, and how they are filled from a checkpoint."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from octavo.layers.attention import AttentionContext
from octavo.layers.embedding import Embedding
from octavo.layers.linear import Linear
from octavo.layers.score import ScoreHead
from octavo.layers.slot import HoldsWeights, WeightSlot
from octavo.models.config import DecoderConfig
from octavo.quantization.scheme import QuantizationMethod
from octavo.quantization.unquantized import PLAIN

# The scales are of queries and probabilities, which stay in the model's dtype.
_IGNORED = "rotary_emb.inv_freq", ".q_scale", ".prob_scale"
_NAMED = 8  # tensors of each kind that an error names before it counts


class LoadedModel(nn.Module, ABC):
    """What is filled from a checkpoint: each layer says which tensors it takes."""

    config: DecoderConfig

    @abstractmethod
    def finish_loading(self) -> None:
        """Called once all weights are in: ties what shares weights."""

    def ignores(self, name: str) -> bool:
        """Whether a checkpoint tensor is known and not needed."""
        return name.endswith(_IGNORED)

    def slot_name(self, name: str) -> str:
        """The name among the weight slots of what a checkpoint calls `name`."""
        return name

    def weight_slots(self) -> dict[str, WeightSlot]:
        """Every tensor that a checkpoint must have, by name."""
        slots: dict[str, WeightSlot] = {}
        for path, module in self.named_modules():
            if module is not self and isinstance(module, HoldsWeights):
                slots |= module.weight_slots(path)
        return slots

    def create_weights(self, method: QuantizationMethod) -> None:
        """Give every linear layer its weights, in the format that the method says; a language head that shares the
        embedding's has none of its own. Raises ValueError naming a layer whose size its format cannot have."""
        for path, module in list(self.named_modules()):
            if isinstance(module, Linear):
                tied = path == "lm_head" and self.config.tie_word_embeddings
                module.create_weights(path, PLAIN if tied else method)

    @torch.no_grad()
    def load_weights(self, weights: Iterable[tuple[str, Tensor]], names: Collection[str] | None = None) -> None:
        """Fill the model from (checkpoint name, tensor) pairs, each tensor once. names: of all that will come, where
        that is known before: what may be missing is then not waited for.

        Raises ValueError naming the tensors that are missing, not expected, of the wrong shape or dtype, or of values
        that cannot be; the model is of no use then.
        """
        slots = self.weight_slots()
        wrong: list[str] = []
        unexpected: list[str] = []
        if names is not None:
            known = {self.slot_name(name) for name in names}
            self._skip(slots, [name for name, slot in slots.items() if not slot.spec.required and name not in known])
        for name, tensor in weights:
            slot = slots.pop(self.slot_name(name), None)
            if slot is None:
                if not self.ignores(name):
                    unexpected.append(name)
                continue
            problem = slot.spec.problem(name, tensor)
            if problem is None:
                slot.load(tensor)
            else:
                wrong.append(problem)
        missing = [name for name, slot in slots.items() if slot.spec.required]
        problems = [("missing", missing), ("not expected", unexpected), ("wrong", wrong)]
        said = [f"{kind}: {_some(names)}" for kind, names in problems if names]
        if said:
            raise ValueError("the checkpoint does not fit the model; " + "; ".join(said))
        self._skip(slots, list(slots))
        self.finish_loading()

    @staticmethod
    def _skip(slots: dict[str, WeightSlot], names: list[str]) -> None:
        for name in names:
            slots.pop(name).load(None)

    @property
    def weight_bytes(self) -> int:
        """Memory that the loaded weights take, packed copies included."""
        plain = {p.data_ptr(): p.nbytes for p in self.parameters()}
        return sum(plain.values()) + sum(m.num_bytes() for m in self.modules() if isinstance(m, Linear))

    @property
    def linear_bits(self) -> float:
        """Memory that the linear layers take, in bits for each of their weights, scales and biases included: fewer than
        those of the model's dtype where a quantized checkpoint's stay packed."""
        layers = [module for module in self.modules() if isinstance(module, Linear)]
        num_bytes = sum(m.num_bytes() + sum(p.nbytes for p in m.parameters()) for m in layers)
        return 8 * num_bytes / sum(m.in_features * m.out_features for m in layers)


class Narrow(Protocol):
    """Picks, of all T tokens of a pass, the N whose last hidden states are wanted."""

    def __call__(self, heads: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """heads, residual: [T, size], contiguous, each of a size of its own. Returns those tokens' rows of both."""
        ...


def narrow_to(at: Tensor) -> Narrow:
    """Picks the tokens at these places, int32 or int64 [N]."""
    return lambda heads, residual: (heads.index_select(0, at), residual.index_select(0, at))


class CausalLM(LoadedModel):
    """A language model over a flat batch: T tokens of many sequences, with no batch dimension."""

    score: ScoreHead | None  # of a model that scores texts

    @property
    @abstractmethod
    def embed_tokens(self) -> Embedding: ...

    @abstractmethod
    def tap(self, layers: tuple[int, ...]) -> None:
        """Choose what `forward` writes to `taps`: the residual stream that enters each of these layers; the number of
        layers stands for what leaves the last one. Raises ValueError naming a layer that there is not."""

    @abstractmethod
    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        attention: AttentionContext,
        taps: Tensor | None = None,
        narrow: Narrow | None = None,
    ) -> Tensor:
        """input_ids: int32 or int64 [T]; positions: int64 [T]; taps: [T, number of tapped layers * hidden_size] in the
        model's dtype, for the tapped layers' states, one layer's beside the other's. narrow: called once, when the last
        layer has written keys and values and attended: all that follows is computed for the tokens that it picks. None:
        for all; so it must be with taps.

        Returns the last hidden states [T, hidden_size], or [N, hidden_size], normalised."""

    @abstractmethod
    def compute_logits(self, hidden: Tensor) -> Tensor:
        """hidden: [R, hidden_size]. Returns [R, vocab_size] in the model's dtype; of a model without a language head,
        whose requests' tokens mean nothing, zeros for a few."""

    def slot_name(self, name: str) -> str:
        """An embedding model may be saved without the part that has the head."""
        is_bare = self.config.head == "embeddings" and not name.startswith("model.")
        return f"model.{name}" if is_bare else name


class Drafted(NamedTuple):
    """What a draft head makes of T tokens. features: [T, hidden_size], what the next token is drafted with; hidden:
    [T, hidden_size], for the logits. They may be one tensor."""

    features: Tensor
    hidden: Tensor


class DraftHead(LoadedModel):
    """A small model that drafts a target's next tokens from the target's own hidden states (EAGLE: Li et al., 2024).

    At position i it reads token i + 1 and the features of token i, and says what token i + 2 may be. A chain goes on by
    itself: the features that it made at i stand in for the target's at i + 1. It has one layer of attention, of index
    0, and keeps that layer's keys and values at the positions i.
    """

    tap_layers: tuple[int, ...]
    """The target's layers whose states `fuse` takes, as CausalLM.tap has them; (): it takes the last hidden states."""

    @abstractmethod
    def share(self, target: CausalLM) -> None:
        """Use the target's embedding and language head where the checkpoint brought none, or the same; adapters that
        are active then apply to them as they do in the target. Called once all weights are in."""

    @abstractmethod
    def fuse(self, states: Tensor) -> Tensor:
        """states: of the target, [T, F]: those of `tap_layers` beside one another, or the last hidden ones. Returns
        features [T, hidden_size]."""

    @abstractmethod
    def forward(self, input_ids: Tensor, positions: Tensor, features: Tensor, attention: AttentionContext) -> Drafted:
        """input_ids: int32 or int64 [T], the tokens that follow positions, in the target's ids; positions: int64 [T];
        features: [T, hidden_size], contiguous, of the tokens at positions; they may be overwritten."""

    @abstractmethod
    def compute_logits(self, hidden: Tensor) -> Tensor:
        """hidden: [R, hidden_size]. Returns [R, draft vocabulary] in the head's dtype."""

    @abstractmethod
    def to_target_ids(self, draft_ids: Tensor) -> Tensor:
        """The target's ids of tokens of the draft vocabulary; int64, of any shape."""


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
