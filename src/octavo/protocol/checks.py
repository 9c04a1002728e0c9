"""Checks of single values. Each raises ValueError with the name, the value and the allowed range."""

from __future__ import annotations

import math
from collections.abc import Collection

_INFINITIES = (math.inf, -math.inf)


def integer(name: str, value: object, low: int, high: int, *, hole: int | None = None, limits: str = "") -> None:
    """A whole number of low..high, but `hole`; True and False are none. limits: what else is to be said of them."""
    allowed = f"{low}..{high}{'' if hole is None else f' except {hole}'}{limits}"
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name}={value!r} is not an integer; allowed: {allowed}")
    if not low <= value <= high or value == hole:
        raise ValueError(f"{name}={value} is out of range; allowed: {allowed}")


def real(name: str, value: object, low: float, high: float, *, open_low: bool = False) -> None:
    """A finite number of low..high, the ends included; open_low: without the lower one."""
    bracket = interval(low, high, open_low=open_low)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != value or value in _INFINITIES:
        raise ValueError(f"{name}={value!r} is not a finite number; allowed: {bracket}")
    if not low <= value <= high or (open_low and value == low):
        raise ValueError(f"{name}={shown(value)} is out of range; allowed: {bracket}")


def shown(number: float) -> str:
    """All its digits: one just out of a range is not to be read as its end."""
    return repr(number).removesuffix(".0")


def interval(low: float, high: float, *, open_low: bool = False) -> str:
    """Real numbers of low..high in words: an open end has a round bracket."""
    return f"{'(' if open_low else '['}{low:g}, {high:g}{')' if math.isinf(high) else ']'}"


def token_ids(name: str, ids: Collection[int], high: int, limits: str = "") -> None:
    """Whole numbers of 0..high; there may be a vocabulary of them. limits: what else is to be said of them."""
    if ids and not (set(map(type, ids)) == {int} and min(ids) >= 0 and max(ids) <= high):
        for token_id in ids:
            integer(name, token_id, 0, high, limits=limits)
