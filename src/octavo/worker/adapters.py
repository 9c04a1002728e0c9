"""AdapterBank: the bytes of LoRA adapters, on the host and in the slots of the device."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from octavo.config import EngineConfig, LoRASizes
from octavo.layers.embedding import Embedding
from octavo.layers.linear import Linear
from octavo.layers.lora import ActiveAdapters, EmbeddingAdapters, LinearAdapters
from octavo.lora.adapter import Adapter, read_adapter
from octavo.lora.source import adapter_folder
from octavo.lora.targeting import Target
from octavo.models.base import CausalLM
from octavo.protocol.lora import LoRARequest
from octavo.protocol.plan import NO_ADAPTER

_log = logging.getLogger(__name__)

_RANK_STEP = 16  # what tensor cores multiply at once
_ROWS_COMPARED = 4096
_ALIGNMENT = 64  # elements: every stack starts on 128 bytes or more


@dataclass(frozen=True, slots=True)
class _Part:
    """One module of the model as adapters name it: where its A and B lie in a slot, as words of the slot.

    index: of its rank in a slot's ranks. a_shape, b_shape: with the storage rank R; A of an embedding is transposed.
    """

    index: int
    target: Target
    a_at: int
    a_shape: tuple[int, int]
    b_at: int
    b_shape: tuple[int, int]


@dataclass(frozen=True, slots=True)
class _HostAdapter:
    """words: a slot's content; ranks: int32, one for each part; replaced: whole tables by module."""

    words: Tensor
    ranks: Tensor
    replaced: Mapping[str, Tensor]


class AdapterBank:
    """One row of `words` is a slot: a layer's stacks are views of all rows, so that one copy brings an adapter in.

    `load` may be called from any thread; all else belongs to the thread that runs steps.
    """

    def __init__(self, model: CausalLM, sizes: LoRASizes, dtype: torch.dtype, device: torch.device) -> None:
        """Gives every linear layer and embedding of the model its stacks. dtype: of the activations."""
        self.active = ActiveAdapters(side=torch.cuda.Stream(device) if device.type == "cuda" else None)
        self.broken: dict[int, str] = {}  # by slot: why its adapter could not be brought in
        self._max_rank, self._dtype, self._device = sizes.max_lora_rank, dtype, device
        self._rank = storage_rank(sizes.max_lora_rank)
        self._parts: dict[str, _Part] = {}
        self._num_words = 0
        layers = [(path, m) for path, m in model.named_modules() if isinstance(m, Linear | Embedding)]
        spans = [self._add_linear(p, m) if isinstance(m, Linear) else self._add_embedding(p, m) for p, m in layers]
        self._words = torch.zeros(sizes.max_loras, self._num_words, dtype=dtype, device=device)
        self._ranks = torch.zeros(len(self._parts), sizes.max_loras, dtype=torch.int32, device=device)
        self._layers: dict[str, LinearAdapters | EmbeddingAdapters] = {}  # by name of a part that is all of its layer
        self._tables = _plain_tables(model)
        for (_, layer), names in zip(layers, spans):
            self._attach(layer, names)
        self._host: dict[int, _HostAdapter] = {}
        self._wanted: dict[int, int] = {}  # by slot: the id of an adapter that is yet to be brought in
        self._in_slots: list[Mapping[str, Tensor]] = [{} for _ in range(sizes.max_loras)]  # tables that are replaced

    @property
    def slot_bytes(self) -> int:
        """Memory of one slot."""
        return self._num_words * self._dtype.itemsize

    def load(self, request: LoRARequest) -> bytes:
        """Read an adapter into host memory. Returns the digest, 32 bytes, of its weights.

        Raises ValueError naming the adapter, its file and what is wrong with it.
        """
        targets = {name: part.target for name, part in self._parts.items()}
        adapter = read_adapter(adapter_folder(request.lora_path), targets, self._max_rank, self._dtype)
        # PEFT saves the base model's tables, unchanged, beside what it trained of them.
        own = {n: t for n, t in adapter.replaced.items() if n not in self._tables or not _equal(self._tables[n], t)}
        self._host[request.lora_int_id] = self._pack(replace(adapter, replaced=own))
        _log.info("loaded adapter %s from %s", request.lora_name, request.lora_path)
        return bytes.fromhex(adapter.digest)

    def drop(self, adapter_id: int) -> None:
        """Forget the host's copy."""
        del self._host[adapter_id]

    def bring_in(self, adapters: Sequence[tuple[int, int]]) -> None:
        """Copy adapters into slots, each (slot, id), in the stream of the steps. What cannot be copied is tried again
        before the next step; meanwhile `broken` says why."""
        self._wanted |= dict(adapters)
        for slot, adapter_id in list(self._wanted.items()):
            adapter = self._host.get(adapter_id)  # None where all that wanted it have ended meanwhile
            try:
                if adapter is not None:
                    self._copy(slot, adapter)
                    del self._wanted[slot]
                    self.broken.pop(slot, None)
                else:
                    self.broken[slot] = f"adapter {adapter_id} is no longer loaded"
            except torch.OutOfMemoryError as error:
                reason = str(error).partition(". ")[0]
                self.broken[slot] = f"the device has too little memory for the tables of adapter {adapter_id}: {reason}"

    def activate(self, slots: Tensor | None) -> None:
        """What the next tokens that come to the model's layers have: see ActiveAdapters."""
        self.active.slots = slots

    def set_replaces(self, slots: Sequence[int]) -> bool:
        """slots: of all rows of a step. Whether an adapter among them has whole tables of its own, which a recorded
        graph does not know."""
        self.active.replaces = any(slot != NO_ADAPTER and self._in_slots[slot] for slot in slots)
        return self.active.replaces

    def _copy(self, slot: int, adapter: _HostAdapter) -> None:
        for name in self._in_slots[slot]:
            del self._layers[name].replaced[slot]
        self._in_slots[slot] = {}
        self._words[slot].copy_(adapter.words, non_blocking=True)
        self._ranks[:, slot].copy_(adapter.ranks, non_blocking=True)
        tables = {name: table.to(self._device, non_blocking=True) for name, table in adapter.replaced.items()}
        for name, table in tables.items():
            self._layers[name].replaced[slot] = table
        self._in_slots[slot] = tables

    def _pack(self, adapter: Adapter) -> _HostAdapter:
        pins = self._device.type == "cuda"
        words = torch.zeros(self._num_words, dtype=self._dtype, pin_memory=pins)
        ranks = torch.zeros(len(self._parts), dtype=torch.int32, pin_memory=pins)
        for name, delta in adapter.deltas.items():
            part, rank = self._parts[name], len(delta.a)
            a = words[part.a_at :][: part.a_shape[0] * part.a_shape[1]].view(part.a_shape)
            b = words[part.b_at :][: part.b_shape[0] * part.b_shape[1]].view(part.b_shape)
            if part.target.kind == "embedding":
                a[:, :rank] = delta.a.T
            else:
                a[:rank] = delta.a
            b[:, :rank] = delta.b
            ranks[part.index] = rank
        tables = {name: table.pin_memory() if pins else table for name, table in adapter.replaced.items()}
        return _HostAdapter(words, ranks, tables)

    def _room(self, num_words: int) -> int:
        """Where so many more words lie."""
        at = self._num_words
        self._num_words += -(-num_words // _ALIGNMENT) * _ALIGNMENT
        return at

    def _add_linear(self, path: str, layer: Linear) -> list[str]:
        parts, columns, rank = layer.part_rows(path), layer.in_features, self._rank
        a_at = self._room(len(parts) * rank * columns)
        b_at = self._room(layer.out_features * rank)
        for name, num_rows in parts.items():
            target = Target(columns, num_rows, "linear")
            index = len(self._parts)
            self._parts[name] = _Part(index, target, a_at, (rank, columns), b_at, (num_rows, rank))
            a_at += rank * columns
            b_at += num_rows * rank
        return list(parts)

    def _add_embedding(self, path: str, layer: Embedding) -> list[str]:
        vocab_size, width = layer.weight.shape
        a_at, b_at = self._room(vocab_size * self._rank), self._room(width * self._rank)
        target = Target(vocab_size, width, "embedding")
        shapes = (vocab_size, self._rank), (width, self._rank)
        self._parts[path] = _Part(len(self._parts), target, a_at, shapes[0], b_at, shapes[1])
        return [path]

    def _attach(self, layer: Linear | Embedding, names: list[str]) -> None:
        parts = [self._parts[name] for name in names]
        first, num_slots = parts[0], len(self._words)
        rows = tuple(part.b_shape[0] for part in parts)
        num_a = len(parts) * first.a_shape[0] * first.a_shape[1]
        a = self._words[:, first.a_at : first.a_at + num_a]
        b = self._words[:, first.b_at : first.b_at + sum(rows) * self._rank].view(num_slots, sum(rows), self._rank)
        ranks = self._ranks[first.index : first.index + len(parts)]
        adapters: LinearAdapters | EmbeddingAdapters
        if isinstance(layer, Linear):
            stack = a.view(num_slots, len(parts), *first.a_shape)
            layer.adapters = adapters = LinearAdapters(self.active, rows, stack, b, ranks)
        else:
            layer.adapters = adapters = EmbeddingAdapters(self.active, a.view(num_slots, *first.a_shape), b, ranks)
        if len(names) == 1:
            self._layers[names[0]] = adapters


def _plain_tables(model: CausalLM) -> dict[str, Tensor]:
    """The embedding, and the language head where it can be read, by name."""
    found: dict[str, Tensor] = {}
    for path, module in model.named_modules():
        if isinstance(module, Embedding):
            found[path] = module.weight.data
            if model.config.tie_word_embeddings:
                found["lm_head"] = module.weight.data
        elif path == "lm_head" and isinstance(module, Linear) and (weight := module.layers[0].weight) is not None:
            found[path] = weight.data
    return found


def _equal(held: Tensor, given: Tensor) -> bool:
    """Compared piece by piece where `held` lies, which takes little memory there."""
    pieces = zip(held.split(_ROWS_COMPARED), given.split(_ROWS_COMPARED))
    return held.shape == given.shape and all(torch.equal(a, b.to(a.device, a.dtype)) for a, b in pieces)


def storage_rank(max_rank: int) -> int:
    """What ranks are padded to in memory."""
    return -(-max_rank // _RANK_STEP) * _RANK_STEP


def adapter_bank(config: EngineConfig, model: CausalLM, dtype: torch.dtype, device: torch.device) -> AdapterBank | None:
    """The bank that the configuration asks for, if it does."""
    return None if config.lora is None else AdapterBank(model, config.lora, dtype, device)
