"""Hermes 2 and 3, Qwen2.5, Qwen3: <tool_call>{"name": …, "arguments": {…}}</tool_call>, one after another."""

from __future__ import annotations

from octavo.structured.incremental import Markers, Script
from octavo.structured.tools.base import ToolParser

_OPENING = Markers("<tool_call>")


class HermesParser(ToolParser):
    """A call without a closing tag counts, if its arguments are complete."""

    def _parse(self) -> Script[None]:
        while (yield from self._content_until(_OPENING)):
            yield from self._spaces()
            complete = (yield from self._accept("{")) and (yield from self._json_call())
            self._settle(complete)
            if complete:
                yield from self._skip("</tool_call>")
        self._all_is_read()

    def _is_known(self, name: str) -> bool:  # noqa: ARG002 (the tag says that it is a call)
        return True
