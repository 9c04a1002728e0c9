"""The responses that ended, for requests that go on from one or ask for it."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import msgspec

from octavo.server.openai.response_schema import Response
from octavo.server.openai.schema import Message

MAX_RESPONSES = 4096
MAX_BYTES = 64 * 1024**2


class StoredResponse(msgspec.Struct, frozen=True):
    """Nothing of it is to be changed. conversation: up to and with the response, without its instructions.
    items: the response's own input, as `shown_items` has it."""

    response: Response
    conversation: list[Message]
    items: list[dict[str, Any]]


class ResponseStore:
    """Keeps what was used last, bounded in responses and in bytes, in memory: it ends with the process.

    Whoever knows an id may read it and go on from it, so ids must not be guessable.
    """

    def __init__(self, max_responses: int = MAX_RESPONSES, max_bytes: int = MAX_BYTES) -> None:
        self._max_responses = max_responses
        self._max_bytes = max_bytes
        self._entries: OrderedDict[str, tuple[StoredResponse, int]] = OrderedDict()  # in the order of last use
        self.num_bytes = 0  # written by `put` and `delete` only

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, response_id: str) -> StoredResponse | None:
        """None for one that is not, or no longer, here."""
        entry = self._entries.get(response_id)
        if entry is None:
            return None
        self._entries.move_to_end(response_id)
        return entry[0]

    def put(self, stored: StoredResponse) -> None:
        """Keep a new response, in place of those that were not used for the longest time.

        One that is larger than all the room there is, is not kept.
        """
        size = _size(stored)
        if size > self._max_bytes:
            return
        self._entries[stored.response.id] = (stored, size)
        self.num_bytes += size
        while self.num_bytes > self._max_bytes or len(self._entries) > self._max_responses:
            _, (_, freed) = self._entries.popitem(last=False)
            self.num_bytes -= freed

    def delete(self, response_id: str) -> bool:
        """Forget a response; False where it is not here. What went on from it keeps its conversation."""
        entry = self._entries.pop(response_id, None)
        if entry is None:
            return False
        self.num_bytes -= entry[1]
        return True


def _size(stored: StoredResponse) -> int:
    return len(msgspec.json.encode(stored))
