"""A checkpoint's quantization_config, read field by field: each one is used, known to change nothing, or refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class Declared:
    """Every reader takes the fields that it uses and then calls `finish`. ValueErrors name the field, its value and
    what is allowed."""

    def __init__(self, values: Mapping[str, Any], path: str = "quantization_config") -> None:
        """path: how errors call `values`."""
        self._values, self._path = dict(values), path
        self._taken = {"quant_method"}

    def get(self, name: str) -> Any:
        """None for a field that is null or missing."""
        self._taken.add(name)
        return self._values.get(name)

    def choice(self, name: str, default: Any, allowed: tuple[Any, ...]) -> Any:
        """One of the allowed values, of its type; the default where the field is null or missing."""
        given = self.get(name)
        value = default if given is None else given
        if not any(type(value) is type(one) and value == one for one in allowed):
            raise self.refusal(name, given, ", ".join(map(repr, allowed)))
        return value

    def names(self, name: str) -> tuple[str, ...]:
        """A list of strings; () where the field is null or missing."""
        given = self.get(name)
        if given is None:
            return ()
        if not isinstance(given, list) or not all(isinstance(one, str) and one for one in given):
            raise self.refusal(name, given, "a list of names")
        return tuple(given)

    def section(self, name: str) -> Declared | None:
        """An object; None where the field is null or missing."""
        given = self.get(name)
        if given is None:
            return None
        if not isinstance(given, Mapping):
            raise self.refusal(name, given, "an object, or null")
        return Declared(given, f"{self._path}.{name}")

    def finish(self, *idle: str) -> None:
        """idle: fields that tell how the checkpoint came to be and change nothing. Refuses what is neither of these
        nor taken, unless it is null."""
        for name, value in self._values.items():
            if name not in self._taken and name not in idle and value is not None:
                raise self.refusal(name, value, "no such field")

    def refusal(self, name: str, value: Any, allowed: str) -> ValueError:
        said = repr(value)
        shown = said if len(said) <= 200 else f"{said[:200]}..."
        return ValueError(f"config field {self._path}.{name}={shown} is not supported; allowed: {allowed}")
