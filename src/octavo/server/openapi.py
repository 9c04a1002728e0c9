"""GET /openapi.json: the routes, with bodies and answers from their structs and ranges from the table of fields."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

import msgspec

from octavo.protocol.fields import REQUIRED, Field, fields_of
from octavo.server.anthropic.errors import MessagesErrorBody
from octavo.server.anthropic.schema import CountBody, MessageAnswer, MessagesBody, TokenCount
from octavo.server.middleware import PUBLIC_PATHS
from octavo.server.openai.adapters import LoadAdapterBody, UnloadAdapterBody
from octavo.server.openai.chat import ChatCompletion
from octavo.server.openai.completions import Completion
from octavo.server.openai.embeddings import EmbeddingList, EmbeddingsBody
from octavo.server.openai.errors import ErrorBody
from octavo.server.openai.models import ModelCard, ModelList
from octavo.server.openai.response_schema import DeletedResponse, InputItemList, Response, ResponsesBody
from octavo.server.openai.schema import ChatBody, CompletionBody
from octavo.server.openai.scoring import Ranking, RerankBody, ScoreBody, ScoreList
from octavo.server.openai.tokenize import DetokenizeBody, Text, TokenizeBody, Tokens

_REF = "#/components/schemas/{name}"
_JSON, _PLAIN, _EVENTS, _EMPTY = "application/json", "text/plain", "text/event-stream", ""
_OF_GET = (400, 404, 431, 503)
_OF_POST = (400, 404, 408, 413, 415, 429, 431, 500, 503)
_IN_PATH = re.compile(r"{(\w+)}")
_PAGE: dict[str, dict[str, Any]] = {
    "order": {"type": "string", "enum": ["asc", "desc"], "default": "desc"},
    "limit": {"type": "integer", "minimum": 1, "maximum": 100, "default": 20},
    "after": {"type": "string", "description": "The id of the item before the page."},
}
_IGNORED = "Names of parameters of the query and of fields of the body that are not known and were ignored."


class Version(msgspec.Struct, frozen=True):
    version: str


@dataclass(frozen=True)
class Operation:
    """One route. answer: the struct of its 200, or the media type of one that has no struct. streams: as events too.
    query: schemas of its query's parameters."""

    method: str
    path: str
    summary: str
    body: type[msgspec.Struct] | None
    answer: type[msgspec.Struct] | str
    streams: bool = False
    error: type[msgspec.Struct] = ErrorBody
    query: Mapping[str, dict[str, Any]] = field(default_factory=dict)


OPERATIONS = (
    Operation("post", "/v1/chat/completions", "The next message of a chat", ChatBody, ChatCompletion, True),
    Operation("post", "/v1/completions", "What follows a text", CompletionBody, Completion, True),
    Operation("post", "/v1/responses", "A response (OpenAI's Responses API)", ResponsesBody, Response, True),
    Operation("post", "/v1/messages", "A message (Anthropic's)", MessagesBody, MessageAnswer, True, MessagesErrorBody),
    Operation("post", "/v1/messages/count_tokens", "A prompt's tokens", CountBody, TokenCount, error=MessagesErrorBody),
    Operation("post", "/v1/embeddings", "Embeddings of texts", EmbeddingsBody, EmbeddingList),
    *(Operation("post", path, "How near texts are", ScoreBody, ScoreList) for path in ("/v1/score", "/score")),
    *(
        Operation("post", path, "Documents by how near they are", RerankBody, Ranking)
        for path in ("/v1/rerank", "/v2/rerank", "/rerank")
    ),
    Operation("post", "/tokenize", "Token ids of a text or a chat", TokenizeBody, Tokens),
    Operation("post", "/detokenize", "The text of token ids", DetokenizeBody, Text),
    Operation("get", "/v1/responses/{response_id}", "A stored response", None, Response),
    Operation("delete", "/v1/responses/{response_id}", "Forget a stored response", None, DeletedResponse),
    Operation(
        "get",
        "/v1/responses/{response_id}/input_items",
        "A stored response's own input, by pages",
        None,
        InputItemList,
        query=_PAGE,
    ),
    Operation("get", "/v1/models", "The models", None, ModelList),
    Operation("get", "/v1/models/{model}", "One model", None, ModelCard),
    Operation("get", "/health", "200 while requests are taken", None, _EMPTY),
    Operation("get", "/ping", "200 while requests are taken", None, _EMPTY),
    Operation("get", "/version", "The server's version", None, Version),
    Operation("get", "/metrics", "Prometheus metrics", None, _PLAIN),
    Operation("get", "/openapi.json", "This document", None, _JSON),
)
# Of a server that runs with --allow-runtime-lora.
ADAPTER_OPERATIONS = (
    Operation("post", "/v1/load_lora_adapter", "Load a LoRA adapter from --lora-dir", LoadAdapterBody, _PLAIN),
    Operation("post", "/v1/unload_lora_adapter", "Serve a LoRA adapter no longer", UnloadAdapterBody, _PLAIN),
)


def document(
    version: str,
    model_names: Sequence[str] = (),
    has_keys: bool = False,
    operations: Sequence[Operation] = OPERATIONS,
) -> dict[str, Any]:
    """The OpenAPI 3.1 document of a server. model_names: those it answers to; has_keys: it asks for an API key;
    operations: its routes."""
    bodies = {operation.body for operation in operations if operation.body is not None}
    answers = {op.answer for op in operations if isinstance(op.answer, type)} | {ErrorBody, MessagesErrorBody}
    structs = sorted(bodies | answers, key=lambda struct: struct.__name__)
    _, schemas = msgspec.json.schema_components(structs, ref_template=_REF)
    for body in bodies:
        _overlay(schemas[body.__name__], fields_of(body.__name__), model_names)
    paths: dict[str, dict[str, Any]] = {}
    for operation in operations:
        paths.setdefault(operation.path, {})[operation.method] = _operation(operation, has_keys)
    components: dict[str, Any] = {"schemas": schemas}
    if has_keys:
        bearer, key = {"type": "http", "scheme": "bearer"}, {"type": "apiKey", "in": "header", "name": "x-api-key"}
        components["securitySchemes"] = {"bearer": bearer, "key": key}
    return {
        "openapi": "3.1.0",
        "info": {"title": "Octavo", "version": version},
        "paths": paths,
        "components": components,
    }


def _operation(operation: Operation, has_keys: bool) -> dict[str, Any]:
    answer = operation.answer
    content: dict[str, Any]
    if answer == _EMPTY:
        content = {}
    elif isinstance(answer, str):
        content = {answer: {"schema": {"type": "object" if answer == _JSON else "string"}}}
    else:
        content = {_JSON: {"schema": {"$ref": _REF.format(name=answer.__name__)}}}
    if operation.streams:
        content[_EVENTS] = {"schema": {"type": "string"}}
    headers: dict[str, Any] = {"X-Request-Id": _header("The request's id.")}
    if operation.body is not None:
        headers["X-Octavo-Ignored-Fields"] = _header(_IGNORED)
    responses: dict[str, Any] = {"200": {"description": "The answer.", "headers": headers, "content": content}}
    error = {_JSON: {"schema": {"$ref": _REF.format(name=operation.error.__name__)}}}
    closed = has_keys and operation.path not in PUBLIC_PATHS
    for status in (*(_OF_GET if operation.body is None else _OF_POST), *((401,) if closed else ())):
        responses[str(status)] = {"description": HTTPStatus(status).phrase, "content": error}
    found: dict[str, Any] = {"summary": operation.summary, "responses": responses}
    if operation.body is not None:
        schema = {"$ref": _REF.format(name=operation.body.__name__)}
        found["requestBody"] = {"required": True, "content": {_JSON: {"schema": schema}}}
    parameters = [_parameter("path", name, {"type": "string"}) for name in _IN_PATH.findall(operation.path)]
    parameters += [_parameter("query", name, schema) for name, schema in operation.query.items()]
    if parameters:
        found["parameters"] = parameters
    if closed:
        found["security"] = [{"bearer": []}, {"key": []}]
    return found


def _parameter(where: str, name: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"name": name, "in": where, "required": where == "path", "schema": schema}


def _header(description: str) -> dict[str, Any]:
    return {"description": description, "schema": {"type": "string"}}


def _overlay(schema: dict[str, Any], rows: Mapping[str, Field], model_names: Sequence[str]) -> None:
    """Say in a body's schema what its rows say."""
    for name, own in schema["properties"].items():
        row = rows[name]
        own["description"] = row.meaning
        if row.new_name:
            own["deprecated"] = True
            own["description"] += f" The old name of {row.new_name}."
        own.pop("default", None)
        if row.default is not REQUIRED and row.default is not None:
            own["default"] = row.default
        keywords = row.range.keywords()
        for branch in own.get("anyOf", [own]):
            bounds = dict(keywords.get(branch.get("type", ""), {}))
            items = bounds.pop("items", None)
            branch.update(bounds)
            if items:
                branch["items"] = {**branch["items"], **items}
    if model_names and "model" in schema["properties"]:
        for branch in schema["properties"]["model"].get("anyOf", [schema["properties"]["model"]]):
            if branch["type"] == "string":
                branch["enum"] = list(model_names)
