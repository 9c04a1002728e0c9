"""AdapterSlots: which adapter lies in which of the device's slots, and which sequences run with it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from octavo.protocol.plan import NO_ADAPTER
from octavo.scheduler.adapter_cache import AdapterCache
from octavo.scheduler.audit import require
from octavo.scheduler.sequence import Sequence


class AdapterSlots:
    """A sequence with an adapter holds a slot while it runs; one without needs none."""

    def __init__(self, num_slots: int) -> None:
        self._cache = AdapterCache(num_slots)
        self._num_slots = num_slots
        self.num_loads = 0  # times that an adapter was brought in; written by `start`

    def begin_round(self) -> None:
        """Before a pass over the waiting sequences, first ones first."""
        if self._num_slots:
            self._cache.begin_round()

    def can_start(self, sequence: Sequence) -> bool:
        """Whether its adapter has a slot, or finds one now."""
        return sequence.adapter_id is None or self._cache.can_take(sequence.adapter_id)

    def start(self, sequence: Sequence) -> list[tuple[int, int]]:
        """It runs from now on. Returns the (slot, adapter id) that has to be brought in for it, if one has."""
        adapter_id = sequence.adapter_id
        if adapter_id is None:
            return []
        new_slot = self._cache.take(adapter_id)
        sequence.adapter_slot = self._cache.place(adapter_id)
        if new_slot is None:
            return []
        self.num_loads += 1
        return [(new_slot, adapter_id)]

    def stop(self, sequence: Sequence) -> None:
        """It no longer runs."""
        if sequence.adapter_id is not None:
            self._cache.release(sequence.adapter_id)
            sequence.adapter_slot = NO_ADAPTER

    def names(self, sequences: Iterable[Sequence]) -> tuple[str, ...]:
        """Of the adapters that they have. O(sequences)."""
        if not self._num_slots:
            return ()
        return tuple(sorted({s.request.lora.lora_name for s in sequences if s.request.lora is not None}))

    def audit(self, running: list[Sequence]) -> None:
        """I27: an adapter that runs is in the slot where its sequences look for it."""
        self._cache.audit()
        users = Counter(s.adapter_id for s in running if s.adapter_id is not None)
        counted = {adapter_id: count for adapter_id, count in self._cache.users().items() if count}
        require(users == counted, "I27: users of adapters are miscounted")
        for sequence in running:
            adapter_id = sequence.adapter_id
            slot = NO_ADAPTER if adapter_id is None else self._cache.place(adapter_id)
            name = sequence.request.request_id
            require(sequence.adapter_slot == slot, f"I27: {name!r} runs with the adapter of another")
