"""CausalLM: what the worker runs, and how it is filled from a checkpoint."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable

import torch
from torch import Tensor, nn

from octavo.layers.attention import AttentionContext
from octavo.layers.linear import Linear
from octavo.layers.score import ScoreHead
from octavo.layers.slot import HoldsWeights, WeightSlot
from octavo.models.config import DecoderConfig
from octavo.quantization.scheme import QuantizationMethod
from octavo.quantization.unquantized import PLAIN

# The scales are of queries and probabilities, which stay in the model's dtype.
_IGNORED = "rotary_emb.inv_freq", ".q_scale", ".prob_scale"
_NAMED = 8  # tensors of each kind that an error names before it counts


class CausalLM(nn.Module, ABC):
    """A language model over a flat batch: T tokens of many sequences, with no batch dimension."""

    config: DecoderConfig
    score: ScoreHead | None  # of a model that scores texts

    @abstractmethod
    def forward(self, input_ids: Tensor, positions: Tensor, attention: AttentionContext) -> Tensor:
        """input_ids, positions: int64 [T]. Returns the last hidden states [T, hidden_size], normalised."""

    @abstractmethod
    def compute_logits(self, hidden: Tensor) -> Tensor:
        """hidden: [R, hidden_size]. Returns [R, vocab_size] in the model's dtype; of a model without a language head,
        whose requests' tokens mean nothing, zeros for a few."""

    @abstractmethod
    def finish_loading(self) -> None:
        """Called once all weights are in: ties what shares weights."""

    def ignores(self, name: str) -> bool:
        """Whether a checkpoint tensor is known and not needed."""
        return name.endswith(_IGNORED)

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
            known = set(names)
            optional = [name for name, slot in slots.items() if not slot.spec.required]
            self._skip(slots, [name for name in optional if known.isdisjoint((name, name.removeprefix("model.")))])
        for name, tensor in weights:
            slot = slots.pop(name, None)
            if slot is None and self.config.head == "embeddings":
                slot = slots.pop(f"model.{name}", None)  # saved without the part that had the head
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


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
