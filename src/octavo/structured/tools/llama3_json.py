"""Llama 3.1 to 3.3: {"name": …, "parameters": {…}}, maybe after <|python_tag|>, several separated by ";"."""

from __future__ import annotations

from octavo.structured.incremental import Markers, Script
from octavo.structured.tools.base import ToolParser

_OPENING = Markers("<|python_tag|>", "{")


class Llama3JsonParser(ToolParser):
    """Nothing but its form tells a call from other JSON, so it counts only if there is a function of its name."""

    def _parse(self) -> Script[None]:
        while opening := (yield from self._content_until(_OPENING)):
            if opening != "{":
                yield from self._spaces()
                if not (yield from self._accept("{")):
                    self._degrade()
                    continue
            complete = yield from self._json_call()
            self._settle(complete)
            if complete:
                yield from self._skip(";")
        self._all_is_read()
