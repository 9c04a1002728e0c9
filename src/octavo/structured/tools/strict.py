"""What an output must look like in which calls are optional, and correct where they are made: a structural tag.

Text is free up to the mark of a call; what follows it is one of the functions and arguments of its schema, spelled as
the format's models spell them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from typing import Any

from octavo.structured.tools.base import Functions
from octavo.structured.tools.parameter_tags import parameter_tags

_Format = dict[str, Any]
_Schemas = Mapping[str, dict[str, Any]]
_ANY_OBJECT: dict[str, Any] = {"type": "object"}


def strict_calls_tag(parser: str, functions: Functions, strict: Collection[str]) -> str:
    """The tag's JSON text, for StructuredOutputsParams.structural_tag.

    parser: the name of the tool parser that reads the output. strict: those of the functions whose arguments follow
    their schema; those of the others are any object. Raises ValueError naming what cannot be held to a schema.
    """
    write = _FORMATS.get(parser)
    if write is None:
        allowed = ", ".join(sorted(_FORMATS))
        raise ValueError(f"calls in the format {parser!r} cannot be held to a schema; allowed formats: {allowed}")
    schemas = {name: dict((schema if name in strict else None) or _ANY_OBJECT) for name, schema in functions.items()}
    return json.dumps({"format": write(schemas)})


def llama3_opening(name: str) -> str:
    """What stands ahead of the arguments of a call."""
    return f'{{"name": {json.dumps(name)}, "parameters": '


def _hermes(schemas: _Schemas) -> _Format:
    tags = [
        _tag(f'<tool_call>\n{{"name": "{name}", "arguments": ', _json(schema), "}\n</tool_call>")
        for name, schema in schemas.items()
    ]
    return _triggered(["<tool_call>"], tags)


def _llama3_json(schemas: _Schemas) -> _Format:
    """No mark tells a call from other JSON, so only the whole opening does; StrictLlama3Parser reads no other."""
    tags = [_tag(llama3_opening(name), _json(schema), "}") for name, schema in schemas.items()]
    return _triggered([tag["begin"] for tag in tags], tags)


def _mistral(schemas: _Schemas) -> _Format:
    """Both spellings: an array, and since the v11 tokenizer a name with its arguments."""
    mark = "[TOOL_CALLS]"
    entries = [_tag(f'{{"name": "{name}", "arguments": ', _json(schema), "}") for name, schema in schemas.items()]
    array = {"type": "tags_with_separator", "tags": entries, "separator": ", ", "at_least_one": True}
    named = [_tag(f"{mark}{name}[ARGS]", _json(schema), "") for name, schema in schemas.items()]
    return _triggered([mark], [_tag(f"{mark}[", array, "]"), *named])


def _deepseek_v3(schemas: _Schemas) -> _Format:
    """The spelling of V3 and R1, and that of V3.1."""
    mark, separator, end = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"
    fenced = [
        _tag(f"{mark}function{separator}{name}\n```json\n", _json(schema), f"\n```{end}")
        for name, schema in schemas.items()
    ]
    bare = [_tag(f"{mark}{name}{separator}", _json(schema), end) for name, schema in schemas.items()]
    return _triggered([mark], [*fenced, *bare])


def _qwen3_coder(schemas: _Schemas) -> _Format:
    tags = [
        _tag(f"<function={name}>\n", parameter_tags(name, schema), "</function>") for name, schema in schemas.items()
    ]
    return _triggered(["<function="], tags)


_FORMATS: dict[str, Callable[[_Schemas], _Format]] = {
    "deepseek_v3": _deepseek_v3,
    "hermes": _hermes,
    "llama3_json": _llama3_json,
    "mistral": _mistral,
    "qwen3_coder": _qwen3_coder,
    "qwen3_xml": _qwen3_coder,
}


def _json(schema: dict[str, Any]) -> _Format:
    return {"type": "json_schema", "json_schema": schema}


def _tag(begin: str, content: _Format, end: str) -> _Format:
    return {"type": "tag", "begin": begin, "content": content, "end": end}


def _triggered(triggers: list[str], tags: list[_Format]) -> _Format:
    return {"type": "triggered_tags", "triggers": triggers, "tags": tags}
