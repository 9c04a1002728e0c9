"""From StructuredOutputsParams to the text of a grammar as llguidance reads it."""

from __future__ import annotations

import json
from typing import Any, cast

import llguidance
from llguidance.gbnf_to_lark import any_to_lark

from octavo.protocol.structured import StructuredOutputsParams
from octavo.structured.json_schema import closed, exact_bounds
from octavo.structured.structural_tags import structural_tag_grammar
from octavo.structured.vocabulary import Vocabulary

# Unbounded, a model that likes white space writes nothing else until max_tokens.
_WHITESPACE = r"[\x20\x0A\x0D\x09]{1,32}"


def grammar_of(params: StructuredOutputsParams, vocabulary: Vocabulary) -> str:
    """The grammar's text. Raises ValueError naming what cannot be read; more is found when the text is compiled."""
    kind = params.kind
    if kind == "regex":
        return str(llguidance.LLMatcher.grammar_from_regex(params.regex or ""))
    if kind == "choice":
        # A terminal, of which any number of texts may be: rules are held to 2,000 that are possible at a time.
        choices = " | ".join(json.dumps(choice, ensure_ascii=False) for choice in dict.fromkeys(params.choice or ()))
        return _lark(f"start: CHOICE\nCHOICE: {choices}")
    if kind == "grammar":
        return _lark(_lark_from(params.grammar or ""))
    options = json_options(params)
    if kind == "structural_tag":
        return structural_tag_grammar(params.structural_tag or "", vocabulary, options)
    schema = {"type": "object"} if kind == "json_object" else _schema(params.json)
    if params.disable_additional_properties:
        schema = closed(schema)
    text = json.dumps(exact_bounds(schema))
    return str(llguidance.LLMatcher.grammar_from_json_schema(text, overrides=cast(Any, options)))


def json_options(params: StructuredOutputsParams) -> dict[str, Any]:
    """llguidance's options for JSON. Keywords that it does not implement are errors."""
    if params.disable_any_whitespace:
        return {"lenient": False, "whitespace_flexible": False}
    return {"lenient": False, "whitespace_pattern": params.whitespace_pattern or _WHITESPACE}


def _lark(text: str) -> str:
    return str(llguidance.LLMatcher.grammar_from_lark(text))


def _lark_from(text: str) -> str:
    try:
        return any_to_lark(text)
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"neither Lark (no rule 'start') nor GBNF: {error}") from None


def _schema(given: dict[str, Any] | str | None) -> dict[str, Any]:
    schema = given
    if isinstance(given, str):
        try:
            schema = json.loads(given)
        except ValueError as error:
            raise ValueError(f"the schema is not valid JSON: {error}") from None
    if not isinstance(schema, dict):
        raise ValueError(f"the schema is a JSON {type(schema).__name__}; allowed: an object")
    if not schema:
        raise ValueError('the schema is empty; for any object give {"type": "object"}, or json_object')
    if "x-guidance" in schema:
        raise ValueError("the schema has x-guidance, which is not supported")
    return schema
