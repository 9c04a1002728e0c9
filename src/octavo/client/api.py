"""A small client of an OpenAI-compatible server: the list of models, and streamed answers.

Over http.client, so that a terminal chat needs nothing that is not installed with Octavo, and starts at once.
"""

from __future__ import annotations

import http.client
import json
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

CONNECT_SECONDS = 10.0
_CONNECTIONS = {"http": http.client.HTTPConnection, "https": http.client.HTTPSConnection}


class ServerError(OSError):
    """What the server answered in place of a result, or that it went away."""


class ApiClient:
    """One server. Each request has a connection of its own, which ends with it: closing it stops the answer."""

    def __init__(self, url: str, api_key: str | None = None) -> None:
        """url: as clients of OpenAI take it, with or without the final /v1. Raises ValueError for no such URL."""
        refusal = f"url={url} is not the address of a server; allowed: such as http://127.0.0.1:8000/v1"
        try:
            parts = urlsplit(url)
            self._port = parts.port
        except ValueError:
            raise ValueError(refusal) from None
        if parts.scheme not in _CONNECTIONS or not parts.hostname or parts.query or parts.fragment:
            raise ValueError(refusal)
        self._scheme, self._host = parts.scheme, parts.hostname
        self._base = parts.path.rstrip("/") or "/v1"
        self.address = f"{parts.scheme}://{parts.netloc}{self._base}"
        self._headers = {"Content-Type": "application/json", "Accept": "application/json, text/event-stream"}
        if api_key is not None:
            self._headers["Authorization"] = f"Bearer {api_key}"

    def models(self) -> list[str]:
        """Names of the models that are served. Raises ServerError."""
        with self._request("GET", "/models", None) as response:
            try:
                return [str(card["id"]) for card in json.loads(response.read())["data"]]
            except (ValueError, KeyError, TypeError):
                raise ServerError(f"{self.address} is not an OpenAI-compatible server") from None

    def stream(self, path: str, body: dict[str, Any]) -> Generator[dict[str, Any], None, None]:
        """The events of a streamed answer, up to [DONE]. Raises ServerError, also in the middle.

        Closing the iterator closes the connection, and the server stops working on the answer.
        """
        with self._request("POST", path, {**body, "stream": True}) as response:
            for data in _event_data(response):
                if data == "[DONE]":
                    return
                event = json.loads(data)
                if "error" in event:
                    raise ServerError(_message(event))
                yield event
        raise ServerError("the connection ended before the answer was complete")

    @contextmanager
    def _request(self, method: str, path: str, body: dict[str, Any] | None) -> Iterator[http.client.HTTPResponse]:
        connection = _CONNECTIONS[self._scheme](self._host, self._port, timeout=CONNECT_SECONDS)
        try:
            connection.connect()
            connection.sock.settimeout(None)  # a long queue is no error: the user can stop waiting
            connection.request(method, self._base + path, json.dumps(body) if body is not None else None, self._headers)
            response = connection.getresponse()
            if response.status != 200:
                raise ServerError(_refusal(response))
            yield response
        except ServerError:
            raise
        except (OSError, http.client.HTTPException) as error:
            raise ServerError(f"no answer from {self.address}: {error or type(error).__name__}") from None
        finally:
            connection.close()


def _event_data(lines: Iterator[bytes] | http.client.HTTPResponse) -> Iterator[str]:
    """The data of each server-sent event; comments and other fields are passed over (WHATWG HTML, 9.2)."""
    data: list[str] = []
    for raw in lines:
        line = raw.decode(errors="replace").rstrip("\r\n")
        if line.startswith("data:"):
            data.append(line[5:].removeprefix(" "))
        elif not line and data:
            yield "\n".join(data)
            data = []


def _refusal(response: http.client.HTTPResponse) -> str:
    text = response.read(2**16)
    try:
        message = _message(json.loads(text))
    except (ValueError, AttributeError):
        message = response.reason
    return f"the server answered {response.status}: {message}"


def _message(body: dict[str, Any]) -> str:
    error = body.get("error")
    return str(error.get("message") if isinstance(error, dict) else error)
