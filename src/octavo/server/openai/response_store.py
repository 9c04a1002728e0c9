"""The conversations that responses ended, for requests that go on from one."""

from __future__ import annotations

from collections import OrderedDict

import msgspec

from octavo.server.openai.schema import Message

MAX_RESPONSES = 4096
MAX_BYTES = 64 * 1024**2


class ResponseStore:
    """Keeps what was used last, bounded in responses and in bytes, in memory: it ends with the process.

    Whoever knows an id may go on from it, so ids must not be guessable.
    """

    def __init__(self, max_responses: int = MAX_RESPONSES, max_bytes: int = MAX_BYTES) -> None:
        self._max_responses = max_responses
        self._max_bytes = max_bytes
        self._entries: OrderedDict[str, tuple[list[Message], int]] = OrderedDict()  # in the order of last use
        self.num_bytes = 0  # written by `put` only

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, response_id: str) -> list[Message] | None:
        """The conversation up to and with that response, without its instructions. None for one not, or no longer,
        here. It is not to be changed."""
        entry = self._entries.get(response_id)
        if entry is None:
            return None
        self._entries.move_to_end(response_id)
        return entry[0]

    def put(self, response_id: str, messages: list[Message]) -> None:
        """Keep a new response's conversation, in place of those that were not used for the longest time.

        One that is larger than all the room there is, is not kept.
        """
        size = len(msgspec.json.encode(messages))
        if size > self._max_bytes:
            return
        self._entries[response_id] = (messages, size)
        self.num_bytes += size
        while self.num_bytes > self._max_bytes or len(self._entries) > self._max_responses:
            _, (_, freed) = self._entries.popitem(last=False)
            self.num_bytes -= freed
