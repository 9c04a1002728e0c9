"""StructuredOutputsParams: what shape the text of an output must have."""

from __future__ import annotations

from typing import Any

import msgspec

KINDS = ("json", "regex", "choice", "grammar", "json_object", "structural_tag")
MAX_TEXT_BYTES = 256 * 1024

# Names of what llguidance is called elsewhere; no other engine of grammars is there.
_BACKENDS = ("auto", "guidance", "llguidance")


class StructuredOutputsParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A constraint on the output's text. Exactly one kind is given:

    json: a JSON schema, as a dict or as its text. json_object: True for any JSON object.
    regex: the whole text matches it (Rust's regex syntax, no look-around). choice: the text is one of these.
    grammar: in Lark's syntax as llguidance reads it, with a rule `start`, or in GBNF (EBNF with ::=), with `root`.
    structural_tag: JSON text; parts of a free text that follow a schema ({"structures", "triggers"} or {"format"}).
    Of JSON (json, json_object) alone: disable_any_whitespace writes it compactly; disable_additional_properties
    allows named properties only, where the schema does not say; whitespace_pattern: a regex for what may stand
    between its parts, in place of up to 32 spaces, tabs and line ends.
    Raises ValueError naming the field, the value and what is allowed.
    """

    json: dict[str, Any] | str | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    structural_tag: str | None = None
    disable_any_whitespace: bool = False
    disable_additional_properties: bool = False
    whitespace_pattern: str | None = None

    def __post_init__(self) -> None:
        given = [name for name in KINDS if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"structured_outputs has {_listed(given)}; allowed: exactly one of {', '.join(KINDS)}")
        kind = given[0]
        getattr(self, f"_check_{kind}", self._check_text)(kind, getattr(self, kind))
        self._check_options(kind)
        try:
            size = len(msgspec.json.encode(self))
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"structured_outputs.{kind} cannot be written as JSON: {error}") from None
        if size > MAX_TEXT_BYTES:
            raise ValueError(f"structured_outputs.{kind} has {size} bytes; at most {MAX_TEXT_BYTES} are allowed")
        if isinstance(self.json, dict):
            # Between processes it goes as MessagePack, whose integers have 64 bits; a text holds any.
            try:
                msgspec.msgpack.encode(self.json)
            except OverflowError:
                msgspec.structs.force_setattr(self, "json", msgspec.json.encode(self.json).decode())

    @property
    def kind(self) -> str:
        return next(name for name in KINDS if getattr(self, name) is not None)

    def _check_text(self, kind: str, value: object) -> None:
        if not isinstance(value, str) or not value:
            raise ValueError(f"structured_outputs.{kind}={value!r} is not allowed: it must be a non-empty string")

    def _check_json(self, kind: str, value: object) -> None:
        if not isinstance(value, dict):
            self._check_text(kind, value)

    def _check_json_object(self, kind: str, value: object) -> None:
        if value is not True:
            raise ValueError(f"structured_outputs.{kind}={value!r} is not allowed; allowed: True, or None")

    def _check_choice(self, kind: str, value: object) -> None:
        good = isinstance(value, (list, tuple)) and value and all(isinstance(c, str) and c for c in value)
        if not good:
            raise ValueError(
                f"structured_outputs.{kind}={value!r} is not allowed: it must be a non-empty list of non-empty strings"
            )

    def _check_options(self, kind: str) -> None:
        for name in ("disable_any_whitespace", "disable_additional_properties"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"structured_outputs.{name}={getattr(self, name)!r} is not allowed; allowed: a bool")
            if getattr(self, name) and kind not in ("json", "json_object"):
                raise ValueError(f"structured_outputs.{name}=True needs json or json_object; given: {kind}")
        pattern = self.whitespace_pattern
        if pattern is None:
            return
        self._check_text("whitespace_pattern", pattern)
        if kind not in ("json", "json_object"):
            raise ValueError(f"structured_outputs.whitespace_pattern needs json or json_object; given: {kind}")
        if self.disable_any_whitespace:
            raise ValueError("structured_outputs has disable_any_whitespace and whitespace_pattern; allowed: one")


class GuidedDecodingParams(StructuredOutputsParams, frozen=True, kw_only=True, omit_defaults=True):
    """The name by which older programs call StructuredOutputsParams.

    backend: None or "auto", "guidance", "llguidance", which are one and the same here.
    """

    backend: str | None = None

    def __post_init__(self) -> None:
        check_backend("guided_decoding.backend", self.backend)
        super().__post_init__()

    def renamed(self) -> StructuredOutputsParams:
        """The same constraint under its new name."""
        return StructuredOutputsParams(
            **{name: getattr(self, name) for name in StructuredOutputsParams.__struct_fields__}
        )


def check_backend(name: str, value: str | None) -> None:
    """Raises ValueError for an engine of grammars that is not here."""
    if value is not None and value not in _BACKENDS:
        raise ValueError(f"{name}={value!r} is not available; allowed: {', '.join(_BACKENDS)}")


def _listed(names: list[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names) or "no constraint"
