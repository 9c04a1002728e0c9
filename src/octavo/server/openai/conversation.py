"""What endpoints share that are chats in another dialect: their bodies become a ChatBody, and run as one."""

from __future__ import annotations

import contextlib
import re
from abc import abstractmethod
from collections.abc import Iterator
from typing import ClassVar, TypeVar

from octavo.server.openai.chat import ChatCompletions
from octavo.server.openai.decode import Ignored
from octavo.server.openai.endpoint import GenerationEndpoint
from octavo.server.openai.errors import APIError
from octavo.server.openai.runner import Run
from octavo.server.openai.schema import ChatBody
from octavo.server.openai.structured import Wish

B = TypeVar("B", bound=ChatBody)


class ConversationEndpoint(GenerationEndpoint[B]):
    """Subclasses translate in `read`, and give the two answers. There is one choice."""

    # Patterns of a chat's paths to fields, and what the dialect calls these.
    names: ClassVar[tuple[tuple[str, str], ...]]

    def __init__(self, chat: ChatCompletions) -> None:
        super().__init__(chat.state)
        self.chat = chat

    @abstractmethod
    def read(self, raw: bytes, ignored: Ignored) -> B:
        """The body of a request, translated. Raises APIError 400."""

    def num_prompts(self, body: B) -> int:  # noqa: ARG002 (completions have several)
        return 1

    def wish(self, body: B) -> Wish | None:
        return self.chat.wish(body)

    async def prepare(self, body: B, run: Run) -> None:
        await self.chat.prepare(body, run)

    async def num_prompt_tokens(self, body: ChatBody) -> int:
        """Tokens of the prompt. Raises APIError 400 that names the dialect's own field."""
        with self._own_names():
            self.chat.check(body)
            _, ids = await self.chat.prompt_of(body)
        return len(ids)

    async def _prepare(self, body: B, run: Run) -> None:
        with self._own_names():
            await super()._prepare(body, run)

    @contextlib.contextmanager
    def _own_names(self) -> Iterator[None]:
        """An APIError from the block names the field as the dialect does."""
        try:
            yield
        except APIError as error:
            for pattern, name in self.names:
                if error.param is not None and re.match(pattern, error.param):
                    own = re.sub(f"^{pattern}", name, error.param)
                    error.message = error.message.replace(error.param, own)
                    error.param = own
                    break
            raise
