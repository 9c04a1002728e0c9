"""JSON schemas rewritten before llguidance reads them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeGuard

_LITERAL = frozenset({"const", "enum", "default", "examples"})  # whose values are no schemas
_MAPS = frozenset({"properties", "patternProperties", "$defs", "definitions"})  # from names to schemas
_NUDGE = 1e-9
_MAX_MOVED = 1_000_000  # beyond, the move is lost in a float


def closed(schema: Any) -> Any:
    """The schema with additionalProperties false wherever it names properties and does not say."""
    return _rewritten(schema, _close)


def exact_bounds(schema: Any) -> Any:
    """The schema with exclusive integer bounds moved inwards by 1e-9 where less than the next integer is left: there
    llguidance 1.9 lets the bound itself through (0 in the open interval from 0 to 0.5)."""
    return _rewritten(schema, _move_bounds)


def _rewritten(schema: Any, rewrite: Callable[[dict[str, Any]], None]) -> Any:
    """A copy, on each subschema of which, from the innermost out, `rewrite` was called."""
    if isinstance(schema, list):
        return [_rewritten(item, rewrite) for item in schema]
    if not isinstance(schema, dict):
        return schema
    copy: dict[str, Any] = {}
    for key, value in schema.items():
        if key in _MAPS and isinstance(value, dict):
            copy[key] = {name: _rewritten(part, rewrite) for name, part in value.items()}
        else:
            copy[key] = value if key in _LITERAL else _rewritten(value, rewrite)
    rewrite(copy)
    return copy


def _close(schema: dict[str, Any]) -> None:
    if isinstance(schema.get("properties"), dict) and schema.get("type", "object") == "object":
        schema.setdefault("additionalProperties", False)


def _move_bounds(schema: dict[str, Any]) -> None:
    given = {name: value for name, value in schema.items() if _is_number(value)}
    for exclusive, sign, others in (
        ("exclusiveMinimum", 1, ("maximum", "exclusiveMaximum")),
        ("exclusiveMaximum", -1, ("minimum", "exclusiveMinimum")),
    ):
        bound = given.get(exclusive)
        if bound is None or bound != round(bound) or abs(bound) > _MAX_MOVED:
            continue
        room = min((sign * (given[other] - bound) for other in others if other in given), default=1)
        if 2 * _NUDGE < room < 1:
            schema[exclusive] = bound + sign * _NUDGE


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < math.inf
