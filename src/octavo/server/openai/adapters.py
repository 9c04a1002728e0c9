"""POST /v1/load_lora_adapter and /v1/unload_lora_adapter (vLLM's shape)."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any, ClassVar

import msgspec

from octavo.server.adapter_probe import probe
from octavo.server.adapters import ServedModel
from octavo.server.openai.errors import APIError, invalid
from octavo.server.openai.json_endpoint import JsonEndpoint

logger = logging.getLogger("octavo.server")

_FILES = ("adapter_config.json", "adapter_model.safetensors")
_MAX_PATH = 4096


class LoadAdapterBody(msgspec.Struct, kw_only=True, frozen=True):
    UNSUPPORTED: ClassVar[dict[str, tuple[Any, ...]]] = {"is_3d_lora_weight": (False,)}

    lora_name: str
    lora_path: str
    load_inplace: bool | None = None


class UnloadAdapterBody(msgspec.Struct, kw_only=True, frozen=True):
    UNSUPPORTED: ClassVar[dict[str, tuple[Any, ...]]] = {}

    lora_name: str
    lora_int_id: int | None = None


class LoadAdapter(JsonEndpoint[LoadAdapterBody]):
    """The endpoint. Until the adapter has computed a token, nothing changes; nor does it where the client leaves."""

    body_type = LoadAdapterBody

    async def answer(self, body: LoadAdapterBody, model: ServedModel) -> str:  # noqa: ARG002 (a body has none)
        lora_dir = self.context.options.lora_dir
        assert lora_dir is not None
        folder = await self.state.in_thread(adapter_folder, lora_dir, body.lora_path)
        name, replaces = body.lora_name, bool(body.load_inplace)
        with self.context.adapters.loading(name, str(folder), replaces=replaces) as lora:
            await probe(self.context.engine, lora, self.context.outputs)
        logger.info("adapter %s is served from %s as number %d", name, folder, lora.lora_int_id)
        return f"Success: LoRA adapter '{name}' added successfully."


class UnloadAdapter(JsonEndpoint[UnloadAdapterBody]):
    """The endpoint. Requests that are under way end as they would have."""

    body_type = UnloadAdapterBody

    async def answer(self, body: UnloadAdapterBody, model: ServedModel) -> str:  # noqa: ARG002 (a body has none)
        name = body.lora_name
        found = self.context.adapters.find(name)
        if found is None:
            message = f"the adapter {name[:128]!r} does not exist"
            raise APIError(404, message, param="lora_name", code="adapter_not_found")
        number = found.lora.lora_int_id
        if body.lora_int_id not in (None, number):
            message = f"lora_int_id={body.lora_int_id} is not that of the adapter {name!r}; allowed: {number}"
            raise invalid(message, "lora_int_id")
        self.context.adapters.remove(name)
        logger.info("adapter %s is no longer served", name)
        return f"Success: LoRA adapter '{name}' removed successfully."


def adapter_folder(lora_dir: str, path: str) -> Path:
    """The folder that `path` names, relative to lora_dir, with every symlink resolved. It and the files that are read
    from it lie inside lora_dir, as long as nobody changes what lies there.

    Raises APIError 400 naming lora_path; of what lies outside, it says nothing.
    """
    shown = repr(path) if len(path) <= 200 else f"{path[:200]!r}… ({len(path)} characters)"
    if not path or len(path) > _MAX_PATH or "\0" in path:
        raise invalid(
            f"lora_path={shown} is no path; allowed: 1..{_MAX_PATH} characters, none of them NUL", "lora_path"
        )
    root = Path(os.path.realpath(lora_dir))
    folder = Path(os.path.realpath(root / path))
    if not all(Path(os.path.realpath(each)).is_relative_to(root) for each in (folder, *(folder / f for f in _FILES))):
        raise invalid(f"lora_path={shown} leads out of the server's lora_dir; allowed: a folder inside it", "lora_path")
    if not os.path.isdir(folder):
        raise invalid(f"lora_path={shown} is no folder of the server's lora_dir", "lora_path")
    return folder
