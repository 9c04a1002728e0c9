"""The values that a field may have. Each kind checks a value, says what is allowed in words, and as a JSON schema."""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from octavo.protocol import checks

INT64_MAX = 2**63 - 1
MAX_TOKEN_ID = 2**31 - 1
_IN_DIGITS = re.compile(r"^(0|[1-9][0-9]{0,9})$")  # one spelling of each token id

# JSON type -> the keywords that bound values of that type.
Keywords = dict[str, dict[str, Any]]


class Range(ABC):
    """The values of one field, besides null. The types of Python and of JSON are those of the struct that has it."""

    @abstractmethod
    def check(self, name: str, value: Any) -> None:
        """Raises ValueError with the name, the value and what is allowed."""

    def in_vocabulary(self, size: int) -> Range:  # noqa: ARG002 (that of token ids does)
        """The same, of a model with so many token ids."""
        return self

    @property
    @abstractmethod
    def words(self) -> str:
        """What is allowed, for people."""

    def keywords(self) -> Keywords:
        """The same as far as a JSON schema can say it."""
        return {}


@dataclass(frozen=True)
class Shape(Range):
    """Whatever the field's type takes: its own parts have their bounds where they are declared."""

    description: str

    def check(self, name: str, value: Any) -> None:
        pass

    @property
    def words(self) -> str:
        return self.description


@dataclass(frozen=True)
class Flag(Range):
    """True or false."""

    def check(self, name: str, value: Any) -> None:
        if not isinstance(value, bool):
            raise ValueError(f"{name}={value!r} is not a boolean; allowed: {self.words}")

    @property
    def words(self) -> str:
        return "true, false"


@dataclass(frozen=True)
class Integer(Range):
    """Whole numbers of low..high, except `hole`. within: what else bounds them from above, known at run time only."""

    low: int
    high: int = INT64_MAX
    hole: int | None = None
    within: str = ""

    def check(self, name: str, value: Any) -> None:
        limits = f", within {self.within}" if self.within else ""
        checks.integer(name, value, self.low, self.high, hole=self.hole, limits=limits)

    @property
    def words(self) -> str:
        span = f"{self.low}.." if self.high == INT64_MAX else f"{self.low}..{self.high}"
        span = "64 bits" if (self.low, self.high) == (-INT64_MAX - 1, INT64_MAX) else span
        hole = "" if self.hole is None else f" except {self.hole}"
        return f"{span}{hole}{f', within {self.within}' if self.within else ''}"

    def keywords(self) -> Keywords:
        bounds: dict[str, Any] = {"minimum": self.low, "maximum": self.high}
        if self.hole is not None:
            bounds["not"] = {"const": self.hole}
        return {"integer": bounds}


@dataclass(frozen=True)
class Real(Range):
    """Finite numbers of low..high, the ends included; open_low: without the lower one."""

    low: float
    high: float
    open_low: bool = False

    def check(self, name: str, value: Any) -> None:
        checks.real(name, value, self.low, self.high, open_low=self.open_low)

    @property
    def words(self) -> str:
        return checks.interval(self.low, self.high, open_low=self.open_low)

    def keywords(self) -> Keywords:
        bounds = {"exclusiveMinimum" if self.open_low else "minimum": self.low}
        return {"number": bounds if math.isinf(self.high) else {**bounds, "maximum": self.high}}


@dataclass(frozen=True)
class Text(Range):
    """Strings of low..high characters; not_blank: not all of them spaces."""

    low: int
    high: int
    not_blank: bool = False

    def check(self, name: str, value: Any) -> None:
        if not isinstance(value, str):
            raise ValueError(f"{name}={str(value)[:64]!r} is not a string; allowed: {self.words}")
        if not self.low <= len(value) <= self.high or (self.not_blank and not value.strip()):
            shown = repr(value) if len(value) <= 64 else f"{value[:64]!r}… ({len(value)} characters)"
            raise ValueError(f"{name}={shown} is out of range; allowed: {self.words}")

    @property
    def words(self) -> str:
        return f"{self.low}..{self.high} characters{', not all of them spaces' if self.not_blank else ''}"

    def keywords(self) -> Keywords:
        bounds: dict[str, Any] = {"minLength": self.low, "maxLength": self.high}
        return {"string": {**bounds, "pattern": r"\S"} if self.not_blank else bounds}


@dataclass(frozen=True)
class OneOf(Range):
    """A few values: booleans and strings."""

    values: tuple[bool | str, ...]

    def check(self, name: str, value: Any) -> None:
        if not any(value == each and isinstance(value, bool) == isinstance(each, bool) for each in self.values):
            raise ValueError(f"{name}={repr(value)[:64]} is not known; allowed: {self.words}")

    @property
    def words(self) -> str:
        return ", ".join(str(value).lower() if isinstance(value, bool) else value for value in self.values)

    def keywords(self) -> Keywords:
        return {"string": {"enum": [value for value in self.values if isinstance(value, str)]}}


@dataclass(frozen=True)
class Items(Range):
    """Lists of low..high items that `each` allows; bare: a string of its own counts as a list of one."""

    each: Range
    low: int
    high: int
    bare: bool = False

    def check(self, name: str, value: Any) -> None:
        if self.bare and isinstance(value, str):
            self.each.check(name, value)
            return
        _check_length(name, value, "items", self.low, self.high)
        for index, item in enumerate(value):
            self.each.check(f"{name}[{index}]", item)

    @property
    def words(self) -> str:
        return f"{_count(self.low, self.high)} of: {self.each.words}"

    def keywords(self) -> Keywords:
        own = self.each.keywords()
        found: Keywords = {"array": _array(self.low, self.high, dict(*own.values()))}
        return {**found, **own} if self.bare else found


@dataclass(frozen=True)
class TokenIds(Range):
    """Lists of token ids. vocab_size: the model's, once it is known."""

    low: int
    high: int = INT64_MAX
    vocab_size: int | None = None

    def check(self, name: str, value: Any) -> None:
        _check_length(name, value, "token ids", self.low, self.high)
        _check_token_ids(name, value, self.vocab_size)

    def in_vocabulary(self, size: int) -> TokenIds:
        return replace(self, vocab_size=size)

    @property
    def words(self) -> str:
        return f"{_count(self.low, self.high)} token ids, within the vocabulary"

    def keywords(self) -> Keywords:
        return {"array": _array(self.low, self.high, {"minimum": 0, "maximum": MAX_TOKEN_ID})}


@dataclass(frozen=True)
class Biases(Range):
    """Token ids to numbers that `each` allows, at most `high` of them. Over HTTP, the ids are strings of digits without
    leading zeros: two spellings of one id would be two entries for it."""

    each: Real
    high: int
    vocab_size: int | None = None

    def check(self, name: str, value: Mapping[Any, Any]) -> None:
        _check_length(name, value, "entries", 0, self.high)
        for token_id, number in value.items():
            if isinstance(token_id, str):
                if not _IN_DIGITS.fullmatch(token_id):
                    allowed = "digits, without leading zeros"
                    raise ValueError(f"{name} has {token_id[:32]!r}, which is not a token id; allowed: {allowed}")
                token_id = int(token_id)
            _check_token_ids(name, (token_id,), self.vocab_size)
            self.each.check(f"{name}[{token_id}]", number)

    def in_vocabulary(self, size: int) -> Biases:
        return replace(self, vocab_size=size)

    @property
    def words(self) -> str:
        return f"{_count(0, self.high)}, token id to {self.each.words}"

    def keywords(self) -> Keywords:
        names = {"propertyNames": {"pattern": _IN_DIGITS.pattern}, "maxProperties": self.high}
        return {"object": {**names, "additionalProperties": {"type": "number", **self.each.keywords()["number"]}}}


def _check_token_ids(name: str, ids: Collection[int], vocab_size: int | None) -> None:
    if vocab_size is None:
        checks.token_ids(name, ids, MAX_TOKEN_ID, ", within the vocabulary")
    else:
        checks.token_ids(name, ids, vocab_size - 1)


def _check_length(name: str, value: Sequence[Any] | Mapping[Any, Any], what: str, low: int, high: int) -> None:
    if not isinstance(value, Sequence | Mapping) or isinstance(value, str):
        raise ValueError(f"{name}={str(value)[:64]!r} is not a list; allowed: {_count(low, high)} {what}")
    if not low <= len(value) <= high:
        raise ValueError(f"{name} has {len(value)} {what}; allowed: {_count(low, high)}")


def _count(low: int, high: int) -> str:
    return f"{low} or more" if high == INT64_MAX else f"{low}..{high}"


def _array(low: int, high: int, items: dict[str, Any]) -> dict[str, Any]:
    keywords: dict[str, Any] = {"minItems": low}
    if high != INT64_MAX:
        keywords["maxItems"] = high
    return {**keywords, "items": items} if items else keywords
