"""LoRA in a layer: what the adapters of a step's tokens add to its product (Hu et al., 2021)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from octavo.kernels import triton as device_kernels
from octavo.kernels.reference import lora as torch_kernels


@dataclass(slots=True)
class ActiveAdapters:
    """Which adapter each token has that comes to a layer now. One object for all layers of a model; the runner writes
    it before each pass over them.

    slots: int32 [T], -1 for a token without one; None where no token has one, which costs a layer nothing more.
    replaces: whether an adapter among them has whole tables of its own. side: on a GPU, the stream that computes beside
    that of the step.
    """

    slots: Tensor | None = None
    replaces: bool = False
    side: torch.cuda.Stream | None = None

    def replaced(self, y: Tensor, tables: Mapping[int, Tensor], compute: Callable[[Tensor], Tensor]) -> Tensor:
        """y: [T, N], but what `compute` makes of a table where an adapter has its own. tables: by slot."""
        if self.replaces and self.slots is not None:
            for slot, table in tables.items():
                y = torch.where((self.slots == slot)[:, None], compute(table), y)
        return y


@dataclass(frozen=True, slots=True)
class LinearAdapters:
    """The adapters of a linear layer with P parts, N rows in all, and K columns, one in each of S slots.

    a: [S, P, R, K] and b: [S, N, R] in the dtype of the activations, R the largest rank, rounded up: y += B (A x), each
    part with an A of its own; the scale is in B. ranks: int32 [P, S], 0 where an adapter leaves a part as it is.
    replaced: by slot, a weight [N, K] that an adapter has in place of the layer's.
    """

    active: ActiveAdapters
    parts: tuple[int, ...]
    a: Tensor
    b: Tensor
    ranks: Tensor
    replaced: dict[int, Tensor] = field(default_factory=dict)

    @property
    def are_active(self) -> bool:
        return self.active.slots is not None

    def add(self, product: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """x: [T, K], some of which has an adapter. product: the layer's own. Returns it with what adapters make of it.

        On a GPU, A x is computed beside the product, in a stream of its own: neither fills the device alone.
        """
        active, slots = self.active, self.active.slots
        assert slots is not None
        if active.side is None:
            y = active.replaced(product(x), self.replaced, partial(F.linear, x))
            torch_kernels.add_lora(y, x, self.a, self.b, self.ranks, self.parts, slots)
            return y
        kernels, stream = device_kernels.get(), torch.cuda.current_stream()
        active.side.wait_stream(stream)
        with torch.cuda.stream(active.side):
            hidden = kernels.shrink_lora(x, self.a, self.ranks, slots)
        y = active.replaced(product(x), self.replaced, partial(F.linear, x))
        # What frees hidden later needs no event: all that the side stream computes next waits for this stream first.
        stream.wait_stream(active.side)
        kernels.expand_lora(y, hidden, self.b, self.ranks, self.parts, slots)
        return y


@dataclass(frozen=True, slots=True)
class EmbeddingAdapters:
    """The adapters of an embedding of V tokens, as LinearAdapters. a: [S, V, R], b: [S, N, R], ranks: int32 [1, S];
    replaced: tables [V, N]."""

    active: ActiveAdapters
    a: Tensor
    b: Tensor
    ranks: Tensor
    replaced: dict[int, Tensor] = field(default_factory=dict)

    def add(self, y: Tensor, input_ids: Tensor) -> Tensor:
        """y: [T, N], the embeddings of input_ids [T]; it may be overwritten. Returns what the adapters make of it."""
        slots = self.active.slots
        if slots is None:
            return y
        y = self.active.replaced(y, self.replaced, partial(F.embedding, input_ids))
        kernels = device_kernels.get() if y.is_cuda else torch_kernels
        kernels.add_lora_embedding(y, input_ids, self.a, self.b, self.ranks, slots)
        return y
