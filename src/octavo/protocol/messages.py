"""What crosses between an API process and an engine process: msgpack, a closed set of types."""

from __future__ import annotations

from typing import Any

import msgspec

from octavo.protocol.outputs import SchedulerStats, TokenOutput
from octavo.protocol.request import Request


class AddRequest(msgspec.Struct, frozen=True, tag="add"):
    request: Request


class AbortRequests(msgspec.Struct, frozen=True, tag="abort"):
    """Idempotent: ids that are unknown or finished are ignored."""

    request_ids: list[str]


class Control(msgspec.Struct, frozen=True, tag="control"):
    """A question or command beside the requests: "audit", "reset_prefix_cache", "stats", "shutdown"; or "hello", which
    Ready answers."""

    control_id: int
    name: str


class Ready(msgspec.Struct, frozen=True, tag="ready"):
    """The engine can serve. Facts that only the engine knows once it is up. max_loras: 0 where it takes no adapters."""

    max_model_len: int
    max_num_seqs: int
    num_blocks: int
    block_size: int
    vocab_size: int
    max_loras: int = 0


class Outputs(msgspec.Struct, frozen=True, tag="outputs"):
    """What one step brought. num_step_tokens: tokens computed in it (0 when none ran)."""

    outputs: list[TokenOutput]
    stats: SchedulerStats
    num_step_tokens: int = 0


class ControlReply(msgspec.Struct, frozen=True, tag="reply"):
    control_id: int
    value: dict[str, Any] | None = None
    error: str | None = None


class Fatal(msgspec.Struct, frozen=True, tag="fatal"):
    """The engine cannot go on; the process ends after it."""

    message: str


ToEngine = AddRequest | AbortRequests | Control
FromEngine = Ready | Outputs | ControlReply | Fatal
