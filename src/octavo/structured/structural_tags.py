"""Structural tags: free text with parts that follow a schema, as a Lark grammar.

Two forms are read: {"structures": [{begin, schema, end}], "triggers": [...]}, and {"format": {...}} with the types of
format below (XGrammar's structural tags).
"""

from __future__ import annotations

import json
import re
from typing import Any

import llguidance
import msgspec

from octavo.structured.json_schema import exact_bounds
from octavo.structured.vocabulary import Vocabulary

_ANY_TEXT = r"/(.|\n)*/"


class ConstString(msgspec.Struct, tag="const_string", forbid_unknown_fields=True):
    value: str


class JsonSchema(msgspec.Struct, tag="json_schema", forbid_unknown_fields=True):
    json_schema: dict[str, Any]


class Regex(msgspec.Struct, tag="regex", forbid_unknown_fields=True):
    pattern: str


class AnyText(msgspec.Struct, tag="any_text", forbid_unknown_fields=True):
    """excludes: what the text may not contain."""

    excludes: list[str] = []


class Sequence(msgspec.Struct, tag="sequence", forbid_unknown_fields=True):
    elements: list[Format]


class Or(msgspec.Struct, tag="or", forbid_unknown_fields=True):
    elements: list[Format]


class Tag(msgspec.Struct, tag="tag", forbid_unknown_fields=True):
    begin: str
    content: Format
    end: str


class TriggeredTags(msgspec.Struct, tag="triggered_tags", forbid_unknown_fields=True):
    """Free text; after a trigger, one of the tags that begin with it."""

    triggers: list[str]
    tags: list[Tag]
    at_least_one: bool = False
    stop_after_first: bool = False


class TagsWithSeparator(msgspec.Struct, tag="tags_with_separator", forbid_unknown_fields=True):
    tags: list[Tag]
    separator: str
    at_least_one: bool = False
    stop_after_first: bool = False


Format = (
    ConstString | JsonSchema | Regex | AnyText | Sequence | Or | Tag | TriggeredTags | TagsWithSeparator
)  # fmt: skip


class _Structure(msgspec.Struct, forbid_unknown_fields=True):
    begin: str
    schema: dict[str, Any]
    end: str


class _Legacy(msgspec.Struct, forbid_unknown_fields=True):
    structures: list[_Structure]
    triggers: list[str]
    type: str = "structural_tag"


class _Modern(msgspec.Struct, forbid_unknown_fields=True):
    format: Format
    type: str = "structural_tag"


def structural_tag_grammar(text: str, vocabulary: Vocabulary, json_options: dict[str, Any]) -> str:
    """The grammar's text. Raises ValueError naming the part that is not understood."""
    try:
        given = msgspec.json.decode(text, type=dict[str, Any])
        if "format" in given:
            wish: Format = msgspec.convert(given, _Modern).format
        else:
            legacy = msgspec.convert(given, _Legacy)
            tags = [Tag(s.begin, JsonSchema(s.schema), s.end) for s in legacy.structures]
            wish = TriggeredTags(legacy.triggers, tags)
    except msgspec.DecodeError as error:
        raise ValueError(f"the structural tag cannot be read: {error}") from None
    writer = _Writer(vocabulary, json_options)
    writer.rules.insert(0, f"start: {writer.expression(wish)}")
    return str(llguidance.LLMatcher.grammar_from_lark("\n".join(["%llguidance {}", *writer.rules])))


class _Writer:
    """Turns formats into Lark expressions; `rules` are those that the expressions refer to."""

    def __init__(self, vocabulary: Vocabulary, json_options: dict[str, Any]) -> None:
        self.rules: list[str] = []
        self._json_options = json_options
        names = {vocabulary.tokens[i].decode(errors="replace"): i for i in vocabulary.special_ids}
        self._special = {name: token_id for name, token_id in names.items() if name}
        by_length = sorted(self._special, key=len, reverse=True)
        self._split = re.compile("(" + "|".join(map(re.escape, by_length)) + ")")

    def expression(self, wish: Format) -> str:
        if isinstance(wish, ConstString):
            return self._literal(wish.value)
        if isinstance(wish, JsonSchema):
            return "%json " + json.dumps({**exact_bounds(wish.json_schema), "x-guidance": self._json_options})
        if isinstance(wish, Regex):
            return f"/{llguidance.regex_to_lark(wish.pattern)}/"
        if isinstance(wish, AnyText):
            return self._text(wish)
        if isinstance(wish, (Sequence, Or)):
            if not wish.elements:
                raise ValueError("the structural tag has a sequence or an 'or' without elements")
            parts = [self._rule(self.expression(element)) for element in wish.elements]
            return (" " if isinstance(wish, Sequence) else " | ").join(parts)
        if isinstance(wish, Tag):
            return self._tag(wish, wish.begin)
        return self._triggered(wish) if isinstance(wish, TriggeredTags) else self._separated(wish)

    def _rule(self, body: str, attributes: str = "") -> str:
        name = f"r{len(self.rules)}"
        self.rules.append(f"{name}{attributes}: {body}")
        return name

    def _text(self, wish: AnyText) -> str:
        """Free text, as a terminal where it excludes something."""
        if not wish.excludes:
            return _ANY_TEXT
        if not all(wish.excludes):
            raise ValueError("the structural tag's any_text excludes an empty string")
        name = f"TEXT{len(self.rules)}"
        excluded = " | ".join(json.dumps(text, ensure_ascii=False) for text in wish.excludes)
        self.rules.append(f"{name}: {_ANY_TEXT} & ~({_ANY_TEXT} ({excluded}) {_ANY_TEXT})")
        return name

    def _literal(self, text: str) -> str:
        """Special tokens in a text are those tokens, not their spelling."""
        parts = [
            f"<[{self._special[part]}]>" if part in self._special else json.dumps(part, ensure_ascii=False)
            for part in self._split.split(text)
            if part
        ]
        return " ".join(parts) or '""'

    def _tag(self, tag: Tag, begin: str) -> str:
        """`begin`: what is left of the tag's beginning."""
        opening = self._literal(begin) if begin else ""
        if not isinstance(tag.content, AnyText):
            return f"{opening} {self._rule(self.expression(tag.content))} {self._literal(tag.end)}"
        if not tag.end or self._split.fullmatch(tag.end):
            return f"{opening} {self._rule(self._text(tag.content))} {self._literal(tag.end)}"
        if self._split.search(tag.end):
            raise ValueError(f"the structural tag's end {tag.end!r} mixes text and special tokens after any_text")
        return f"{opening} {self._rule(f'{self._text(tag.content)} {self._literal(tag.end)}', '[lazy]')}"

    def _triggered(self, wish: TriggeredTags) -> str:
        if not wish.tags or not wish.triggers or not all(wish.triggers):
            raise ValueError("the structural tag needs at least one tag, and triggers that are not empty")
        branches = []
        unclaimed = list(wish.tags)
        for trigger in wish.triggers:
            own = [tag for tag in unclaimed if tag.begin.startswith(trigger)]
            unclaimed = [tag for tag in unclaimed if tag not in own]
            if not own:
                continue
            bodies = [self._rule(self._tag(tag, tag.begin[len(trigger) :])) for tag in own]
            opening = self._trigger(trigger)
            branches.append(self._rule(f"{opening} ({' | '.join(bodies)})"))
        if unclaimed:
            raise ValueError(f"the structural tag's begin {unclaimed[0].begin!r} starts with none of its triggers")
        tags, tail = f"({' | '.join(branches)})", self._rule(self._rule_text())
        if wish.stop_after_first:
            return tags if wish.at_least_one else f"{tags} | {tail}"
        return f"{tags}{'+' if wish.at_least_one else '*'} {tail}"

    def _trigger(self, trigger: str) -> str:
        """Any text up to and with the trigger."""
        if self._split.fullmatch(trigger):
            return f"{self._rule_text()} {self._literal(trigger)}"
        if self._split.search(trigger):
            raise ValueError(f"the structural tag's trigger {trigger!r} mixes text and special tokens")
        return self._rule(f"{self._rule_text()} {self._literal(trigger)}", "[lazy]")

    def _rule_text(self) -> str:
        """One terminal for all free text: the lexer then need not choose between equals."""
        text = f"FREE_TEXT: {_ANY_TEXT}"
        if text not in self.rules:
            self.rules.append(text)
        return "FREE_TEXT"

    def _separated(self, wish: TagsWithSeparator) -> str:
        if not wish.tags:
            raise ValueError("the structural tag needs at least one tag")
        tags = f"({' | '.join(self._rule(self.expression(tag)) for tag in wish.tags)})"
        many = tags if wish.stop_after_first else f"{tags} ({self._literal(wish.separator)} {tags})*"
        return many if wish.at_least_one else f"({many})?"
