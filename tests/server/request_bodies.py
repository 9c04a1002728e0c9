"""A smallest good body for each struct that a route takes, and the routes themselves; those of adapters, which change
what is served, have their structs only."""

from __future__ import annotations

from typing import Any

import msgspec

from octavo.server.openapi import ADAPTER_OPERATIONS, OPERATIONS

USER = [{"role": "user", "content": "hi"}]
ROUTES = {op.body.__name__: op for op in reversed(OPERATIONS) if op.body is not None}
STRUCTS: dict[str, type[msgspec.Struct]] = {name: op.body for name, op in ROUTES.items() if op.body is not None}
ADAPTER_STRUCTS = [op.body for op in ADAPTER_OPERATIONS if op.body is not None]
BASE: dict[str, dict[str, Any]] = {
    "ChatBody": {"model": "fake", "messages": USER},
    "CompletionBody": {"model": "fake", "prompt": "hi"},
    "ResponsesBody": {"model": "fake", "input": "hi"},
    "MessagesBody": {"model": "fake", "messages": USER, "max_tokens": 8},
    "CountBody": {"model": "fake", "messages": USER},
    "EmbeddingsBody": {"model": "fake", "input": "hi"},
    "ScoreBody": {"model": "fake", "text_1": "a", "text_2": "b"},
    "RerankBody": {"model": "fake", "query": "a", "documents": ["b"]},
    "TokenizeBody": {"messages": USER},
    "DetokenizeBody": {"tokens": [5]},
}
