"""docs/api.md, from the table of fields: `python -m octavo.server.api_page > docs/api.md`."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import msgspec

from octavo.protocol.fields import REQUIRED, Field, fields_of
from octavo.server.openai.schema import UNSUPPORTED
from octavo.server.openapi import ADAPTER_OPERATIONS, OPERATIONS, Operation

_HEAD = """\
# Requests

Every route and every field of its body. Made by `make docs` from `src/octavo/protocol/fields.py`; a server says the
same, with its own names of models, at `/openapi.json`.

`null` means "not given". A value out of range is a 400 whose `param` names the field, and so is a field listed as
refused. A field that is not known, or a parameter of the query, is ignored and named in the answer's header
`X-Octavo-Ignored-Fields`, or a 400 where the server runs with `--strict`; inside objects it is always a 400.

*Cost* is what a field makes the server do more of. `--max-request-cost` bounds completions x output x (1 + logprobs),
and prompt x (1 + prompt_logprobs), in tokens; `step` is work at every step of that sequence, `host` once in the API
process.
"""


def page() -> str:
    """The whole page."""
    bodies: dict[str, list[Operation]] = {}
    for operation in OPERATIONS + ADAPTER_OPERATIONS:
        if operation.body is not None:
            bodies.setdefault(operation.body.__name__, []).append(operation)
    parts = [_HEAD, *("\n".join(_section(operations)) + "\n" for operations in bodies.values())]
    plain = [f"| `{_route(operation)}` | {operation.summary} |" for operation in OPERATIONS if operation.body is None]
    parts.append("\n".join(["## Without a body", "", "| route | answer |", "|---|---|", *plain]) + "\n")
    return "\n".join(parts)


def _section(operations: list[Operation]) -> Iterator[str]:
    body = operations[0].body
    assert body is not None
    yield "## " + ", ".join(map(_route, operations))
    yield ""
    needs = ", where the server runs with `--allow-runtime-lora`" if operations[0] in ADAPTER_OPERATIONS else ""
    yield f"{operations[0].summary}{needs}."
    yield ""
    yield "| field | meaning | allowed | default | from | cost |"
    yield "|---|---|---|---|---|---|"
    yield from (_row(row) for row in fields_of(body.__name__).values())
    refused = [name for name in getattr(body, "UNSUPPORTED", UNSUPPORTED) if name not in body.__struct_fields__]
    if refused:
        yield ""
        yield "Refused, but for values that ask for nothing: " + ", ".join(f"`{name}`" for name in refused) + "."


def _route(operation: Operation) -> str:
    return f"{operation.method.upper()} {operation.path}"


def _row(row: Field) -> str:
    default = "" if row.default is None else row.default if row.default is REQUIRED else _json(row.default)
    source = f"{row.source}; old name of `{row.new_name}`" if row.new_name else row.source
    cells = (f"`{row.name}`", row.meaning, row.range.words, default, source, row.cost)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _json(value: object) -> str:
    return f"`{msgspec.json.encode(value).decode()}`"


if __name__ == "__main__":
    sys.stdout.write(page())
