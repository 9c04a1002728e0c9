"""Outputs that were held to a schema: required calls and a named call's arguments (`schema.py`), and strict calls as
Llama 3 writes them (`strict.py`)."""

from __future__ import annotations

from octavo.structured.incremental import Markers, Script
from octavo.structured.tools.base import Functions, ToolParser
from octavo.structured.tools.strict import llama3_opening


class RequiredCallsParser(ToolParser):
    """[{"name": …, "parameters": {…}}, …]. What the end cuts off, or follows the array, is content."""

    def _parse(self) -> Script[None]:
        yield from self._spaces()
        complete = yield from self._accept("[")
        if not complete:
            self._degrade()
        while complete:
            yield from self._spaces()
            complete = (yield from self._accept("{")) and (yield from self._json_call())
            self._settle(complete)
            if complete and not (yield from self._skip(",")):
                yield from self._skip("]")
                break
        yield from self._rest()


class NamedCallParser(ToolParser):
    """The whole output is the arguments of one function."""

    def __init__(self, functions: Functions, name: str) -> None:
        super().__init__(functions)
        self._name = name

    def _parse(self) -> Script[None]:
        self._settle((yield from self._json_arguments(self._name)))
        yield from self._rest()


class StrictLlama3Parser(ToolParser):
    """What was held to a schema is a call; JSON that only looks like one was not, and is content."""

    def _parse(self) -> Script[None]:
        names = {llama3_opening(name): name for name in self._functions}
        openings = Markers(*names)
        while opening := (yield from self._content_until(openings)):
            complete = (yield from self._json_arguments(names[opening])) and (yield from self._accept("}"))
            self._settle(complete)
            if complete:
                yield from self._skip(";")
        self._all_is_read()
