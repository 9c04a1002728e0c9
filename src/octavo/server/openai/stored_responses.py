"""GET and DELETE /v1/responses/{id}, and GET /v1/responses/{id}/input_items: what the store has of a response."""

from __future__ import annotations

import msgspec
from starlette.requests import Request
from starlette.responses import Response as HTTPResponse

from octavo.server.openai.decode import read_query
from octavo.server.openai.errors import APIError, invalid
from octavo.server.openai.response_schema import DeletedResponse, InputItemList
from octavo.server.openai.response_store import ResponseStore, StoredResponse

_MAX_ITEMS = 100
_DEFAULT_ITEMS = 20


class StoredResponses:
    """The routes. Any parameter of theirs that is not used is refused."""

    def __init__(self, store: ResponseStore | None) -> None:
        """store: None where the server keeps none."""
        self._store = store

    async def get(self, request: Request) -> HTTPResponse:
        """The response as it was answered."""
        read_query(request.scope, strict=True)
        return _json(self._find(request).response)

    async def delete(self, request: Request) -> HTTPResponse:
        """Forget the response."""
        read_query(request.scope, strict=True)
        stored = self._find(request)
        assert self._store is not None
        self._store.delete(stored.response.id)
        return _json(DeletedResponse(stored.response.id))

    async def input_items(self, request: Request) -> HTTPResponse:
        """A page of the response's own input, the last item first.

        order: "asc" or "desc". limit: 1..100 items, by default 20. after: the id of the item before the page.
        """
        read_query(request.scope, strict=True, known=("order", "limit", "after"))
        stored, query = self._find(request), request.query_params
        order = query.get("order", "desc")
        if order not in ("asc", "desc"):
            raise invalid(f"order={order[:64]!r} is unknown; allowed: asc, desc", "order")
        items = stored.items if order == "asc" else stored.items[::-1]
        begin = 0
        if "after" in query:
            ids = [item["id"] for item in items]
            if query["after"] not in ids:
                raise invalid(f"after={query['after'][:64]!r} is not the id of an item", "after")
            begin = ids.index(query["after"]) + 1
        page = items[begin : begin + _limit(query.get("limit"))]
        has_more = begin + len(page) < len(items)
        ends = (page[0]["id"], page[-1]["id"]) if page else (None, None)
        return _json(InputItemList(data=page, first_id=ends[0], last_id=ends[1], has_more=has_more))

    def _find(self, request: Request) -> StoredResponse:
        name = request.path_params["response_id"]
        found = None if self._store is None else self._store.get(name)
        if found is not None:
            return found
        why = "it was not stored, or it has made room for others"
        if self._store is None:
            why = "a server with several API processes stores none"
        message = f"there is no response {name[:128]!r} here: {why}"
        raise APIError(404, message, param="response_id", code="response_not_found")


def _limit(given: str | None) -> int:
    if given is None:
        return _DEFAULT_ITEMS
    if not given.isascii() or not given.isdigit() or len(given) > 9 or not 1 <= int(given) <= _MAX_ITEMS:
        raise invalid(f"limit={given[:64]!r} is not allowed; allowed: 1..{_MAX_ITEMS}", "limit")
    return int(given)


def _json(value: msgspec.Struct) -> HTTPResponse:
    return HTTPResponse(msgspec.json.encode(value), media_type="application/json")
