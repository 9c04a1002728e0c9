"""The commands that talk to a running server."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import tyro

from octavo.client.api import ApiClient, ServerError
from octavo.client.terminal import Console, Session, chat, complete
from octavo.config import ServerOptions, api_keys

_URL = f"http://{ServerOptions.host}:{ServerOptions.port}/v1"


@dataclass(frozen=True, kw_only=True)
class Server:
    """Which server, and which of its models."""

    url: Annotated[str, tyro.conf.arg(aliases=["--base-url"])] = _URL
    """Address of the server."""
    model: Annotated[str | None, tyro.conf.arg(aliases=["--model-name"])] = None
    """Name of the model. None: the first that the server lists."""
    api_key: str | None = None
    """Key that the server asks for. Else the first in $OCTAVO_API_KEY."""
    quick: Annotated[str | None, tyro.conf.arg(aliases=["-q"])] = None
    """Ask this, print the answer, and end."""
    stats: bool = False
    """Print tokens, seconds to the first, and tokens per second after each answer."""

    def session(self) -> Session:
        """Raises ValueError for a bad URL or an unknown model, ServerError for a server that does not answer."""
        keys = api_keys(ServerOptions(api_key=() if self.api_key is None else (self.api_key,)))
        client = ApiClient(self.url, keys[0] if keys else None)
        names = client.models()
        if not names:
            raise ServerError(f"{client.address} serves no model")
        if self.model is not None and self.model not in names:
            raise ValueError(f"model={self.model} is not served at {client.address}; allowed: {', '.join(names)}")
        return Session(client, self.model or names[0], Console(), self.stats)


@dataclass(frozen=True, kw_only=True)
class Chat(Server):
    """Chat with a running server in the terminal. Ctrl-C stops an answer; /help lists the commands."""

    system_prompt: str | None = None
    """What the conversation starts with, as the system's message."""

    def run(self) -> int:
        """Chat, and return the exit status. Raises ValueError, ServerError."""
        return chat(self.session(), self.system_prompt, self.quick)


@dataclass(frozen=True, kw_only=True)
class Complete(Server):
    """Have a running server continue texts, one a line."""

    max_tokens: int = 128
    """Most tokens of a continuation."""

    def run(self) -> int:
        """Complete, and return the exit status. Raises ValueError, ServerError."""
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens={self.max_tokens} is out of range; allowed: >= 1")
        return complete(self.session(), self.max_tokens, self.quick)
