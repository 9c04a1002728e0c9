"""The LoRA adapters that a front end answers to, by name."""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Collection, Iterator
from typing import NamedTuple

import msgspec

from octavo.config import EngineOptions, ServerOptions
from octavo.protocol.lora import LoRARequest
from octavo.server.openai.errors import invalid

_NAME = re.compile(r"[A-Za-z0-9._-]{1,128}")
NAMES = "1..128 of the characters A-Z a-z 0-9 . _ -"


class ServedModel(NamedTuple):
    """What a request's model stands for. name: what answers call it."""

    name: str
    lora: LoRARequest | None


class ServedAdapter(NamedTuple):
    """parent: the model's name that it is listed under; None for the first. created: seconds since 1970."""

    lora: LoRARequest
    parent: str | None
    created: int


class AdapterModule(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One of ServerOptions.lora_modules."""

    name: str
    path: str
    base_model_name: str | None = None


class AdapterRegistry:
    """Numbers of adapters count from 1, and none is used again: for the engine a number stands for certain weights."""

    def __init__(self, model_names: Collection[str] = ()) -> None:
        """model_names: those that adapters may not have."""
        self._model_names = model_names
        self._served: dict[str, ServedAdapter] = {}  # written by `loading` and `remove` only
        self._coming: set[str] = set()  # names in `loading`
        self._last_number = 0

    @property
    def served(self) -> list[ServedAdapter]:
        """In the order in which their names first came."""
        return list(self._served.values())

    def find(self, name: str) -> ServedAdapter | None:
        """None for a name that no adapter has."""
        return self._served.get(name)

    @contextlib.contextmanager
    def loading(
        self, name: str, path: str, *, parent: str | None = None, replaces: bool = False
    ) -> Iterator[LoRARequest]:
        """An adapter that the block tries out; `name` stands for it once the block ends well, and until then for what
        it stood for before. replaces: the name may be in use.

        Raises APIError 400 for a name that is not allowed, in use, or in another such block.
        """
        taken = self._model_names if replaces else {*self._model_names, *self._served}
        try:
            _check_name("lora_name", name, taken)
        except ValueError as error:
            raise invalid(str(error), "lora_name") from None
        if name in self._coming:
            raise invalid(f"lora_name={name!r} is being loaded by another request", "lora_name")
        self._coming.add(name)
        self._last_number += 1
        lora = LoRARequest(name, self._last_number, path)
        try:
            yield lora
            self._served[name] = ServedAdapter(lora, parent, int(time.time()))
        finally:
            self._coming.discard(name)

    def remove(self, name: str) -> None:
        """Requests that are under way keep the adapter. Raises KeyError for a name that no adapter has."""
        del self._served[name]


def read_modules(options: EngineOptions, server: ServerOptions) -> list[AdapterModule]:
    """What lora_modules says, of options that are allowed together.

    Raises ValueError naming the option, its value and what is allowed.
    """
    _check_together(options, server)
    model_names = server.served_model_name or (options.model,)
    taken = set(model_names)
    modules = []
    for text in server.lora_modules:
        module = _read_module(text)
        _check_name(f"lora_modules={text!r}: name", module.name, taken)
        if not module.path:
            raise ValueError(f"lora_modules={text!r} has an empty path; allowed: a folder, or a hub id")
        if module.base_model_name not in (None, *model_names):
            raise ValueError(
                f"lora_modules={text!r}: base_model_name is no name of the model; allowed: {', '.join(model_names)}"
            )
        taken.add(module.name)
        modules.append(module)
    return modules


def _check_together(options: EngineOptions, server: ServerOptions) -> None:
    if server.lora_modules and not options.enable_lora:
        raise ValueError(f"lora_modules={' '.join(server.lora_modules)} needs enable_lora")
    if server.allow_runtime_lora:
        if not options.enable_lora:
            raise ValueError("allow_runtime_lora=true needs enable_lora")
        if server.lora_dir is None:
            raise ValueError("allow_runtime_lora=true needs lora_dir, the folder that adapters may be loaded from")
        if server.api_server_count > 1:
            raise ValueError(
                f"allow_runtime_lora=true is refused with api_server_count={server.api_server_count}: one API process "
                "would not know what another has loaded; allowed: 1"
            )
    if server.lora_dir is not None:
        if not server.allow_runtime_lora:
            raise ValueError(f"lora_dir={server.lora_dir} has no meaning without allow_runtime_lora")
        if not os.path.isdir(server.lora_dir):
            raise ValueError(f"lora_dir={server.lora_dir} is no folder")


def _read_module(text: str) -> AdapterModule:
    if not text.lstrip().startswith("{"):
        name, equals, path = text.partition("=")
        if not equals:
            raise ValueError(f"lora_modules={text!r} is refused; allowed: name=path, or a JSON object")
        return AdapterModule(name, path)
    try:
        return msgspec.json.decode(text, type=AdapterModule)
    except msgspec.DecodeError as error:
        raise ValueError(
            f"lora_modules={text!r} is refused: {error}; allowed: an object with name, path and base_model_name"
        ) from None


def _check_name(what: str, name: str, taken: Collection[str]) -> None:
    if not _NAME.fullmatch(name):
        shown = repr(name) if len(name) <= 200 else f"{name[:200]!r}… ({len(name)} characters)"
        raise ValueError(f"{what}={shown} is no name of an adapter; allowed: {NAMES}")
    if name in taken:
        raise ValueError(f"{what}={name!r} is in use")
