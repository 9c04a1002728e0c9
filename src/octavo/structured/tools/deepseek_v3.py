"""DeepSeek-V3, R1 and V3.1: calls between <｜tool▁calls▁begin｜> and <｜tool▁calls▁end｜>."""

from __future__ import annotations

from octavo.structured.incremental import Markers, Script
from octavo.structured.tools.base import NAME_RUN, ToolParser

_CALLS_BEGIN = "<｜tool▁calls▁begin｜>"
_CALL_BEGIN = "<｜tool▁call▁begin｜>"
_SEPARATOR = "<｜tool▁sep｜>"
_CALL_END = "<｜tool▁call▁end｜>"
_CALLS_END = "<｜tool▁calls▁end｜>"
_OPENING = Markers(_CALLS_BEGIN, _CALL_BEGIN)


class DeepSeekV3Parser(ToolParser):
    """V3 and R1 write "function", the separator, the name and a fenced block of JSON; V3.1 the name, the separator
    and JSON. What follows the separator tells them apart."""

    def _parse(self) -> Script[None]:
        while opening := (yield from self._content_until(_OPENING)):
            if opening == _CALLS_BEGIN:
                yield from self._spaces()
                if not (yield from self._accept(_CALL_BEGIN)):
                    self._degrade()
                    continue
            while (yield from self._call()):
                if not (yield from self._skip(_CALL_BEGIN)):
                    yield from self._skip(_CALLS_END)
                    break
        self._all_is_read()

    def _call(self) -> Script[bool]:
        """One call, its opening consumed, and its end."""
        name = yield from self._run(NAME_RUN)
        fenced = False
        complete = yield from self._accept(_SEPARATOR)
        if complete and (yield from self._peek()) != "{":
            name = yield from self._run(NAME_RUN)
            yield from self._spaces()
            complete = fenced = yield from self._accept("```json")
        complete = complete and (yield from self._json_arguments(name))
        self._settle(complete)
        if complete:
            if fenced:
                yield from self._skip("```")
            yield from self._skip(_CALL_END)
        return complete
