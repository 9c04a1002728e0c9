"""Mistral: [TOOL_CALLS][{"name": …, "arguments": {…}}, …], or since the v11 tokenizer [TOOL_CALLS]name[ARGS]{…}."""

from __future__ import annotations

import re
from collections.abc import Callable

from octavo.structured.incremental import Markers, Script
from octavo.structured.tools.base import NAME_RUN, Functions, ToolParser, new_short_call_id

_OPENING = Markers("[TOOL_CALLS]")
_ID_RUN = re.compile(r"[A-Za-z0-9]*")


class MistralParser(ToolParser):
    """[CALL_ID]id may stand before [ARGS]. Ids are nine letters and digits, which the templates insist on."""

    def __init__(self, functions: Functions, new_id: Callable[[], str] = new_short_call_id) -> None:
        super().__init__(functions, new_id)

    def _parse(self) -> Script[None]:
        while (yield from self._content_until(_OPENING)):
            yield from self._spaces()
            if (yield from self._accept("[")):
                yield from self._array()
            else:
                yield from self._named()
        self._all_is_read()

    def _array(self) -> Script[None]:
        while True:
            yield from self._spaces()
            complete = (yield from self._accept("{")) and (yield from self._json_call())
            self._settle(complete)
            if not complete:
                return
            space = yield from self._spaces()
            if (yield from self._accept(",")):
                self._source.clear()
                continue
            if not (yield from self._accept("]")):  # space before the array's end is the array's
                self._content(space)
            self._source.clear()
            return

    def _named(self) -> Script[None]:
        name = yield from self._run(NAME_RUN)
        call_id = None
        if (yield from self._accept("[CALL_ID]")):
            call_id = yield from self._run(_ID_RUN)
        yield from self._accept("[ARGS]")
        self._settle((yield from self._json_arguments(name, call_id)))

    def _is_known(self, name: str) -> bool:  # noqa: ARG002 (the token says that it is a call)
        return True
