"""What endpoints share that are chats in another dialect: their bodies become a ChatBody, and run as one."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar, TypeVar

from octavo.server.context import ServerState
from octavo.server.openai.chat import ChatCompletions
from octavo.server.openai.decode import Ignored
from octavo.server.openai.endpoint import GenerationEndpoint
from octavo.server.openai.errors import APIError
from octavo.server.openai.runner import Run
from octavo.server.openai.sampling import sampling_params, with_max_tokens
from octavo.server.openai.schema import ChatBody

B = TypeVar("B", bound=ChatBody)


class ConversationEndpoint(GenerationEndpoint[B]):
    """Subclasses translate in `read`, and give the two answers. One choice, text only."""

    # SamplingParams' fields, and "prompt", by the dialect's names for them.
    names: ClassVar[dict[str, str]]

    def __init__(self, state: ServerState) -> None:
        super().__init__(state)
        self._chat = ChatCompletions(state)

    @abstractmethod
    def read(self, raw: bytes, ignored: Ignored) -> B:
        """The body of a request, translated. Raises APIError 400."""

    def num_prompts(self, body: B) -> int:  # noqa: ARG002 (completions have several)
        return 1

    async def prepare(self, body: B, run: Run) -> None:
        params = sampling_params(body, self.context, self.names, run.wish, max_tokens=body.max_tokens)
        text, ids = await self.prompt_of(body)
        default = self.context.generation_defaults.get("max_tokens")
        params = with_max_tokens(params, len(ids), default, self.context, self.names)
        run.add(text, ids, params, self.names)

    async def prompt_of(self, body: ChatBody) -> tuple[str, list[int]]:
        """Text and token ids of the prompt. Raises APIError 400 that names the dialect's own field."""
        try:
            text = await self._chat.prompt_text(body)
        except APIError as error:
            if error.param is not None and error.param.startswith("messages"):
                error.param = self.names["prompt"]
            raise
        return text, await self.encode(text, False, self.names["prompt"])
