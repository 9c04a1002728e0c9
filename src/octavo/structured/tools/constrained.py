"""Outputs that were held to a schema of `schema.py`: required calls, and a named call's arguments."""

from __future__ import annotations

from octavo.structured.incremental import Script
from octavo.structured.tools.base import Functions, ToolParser


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
