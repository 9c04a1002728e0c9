"""The rig's server with adapters: some from its start, and a folder to load others from."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
from server_rig import READY, FakeEngine, Rig, running

from octavo.config import ServerOptions
from octavo.server.adapters import AdapterRegistry, ServedAdapter

LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
MAX_LORAS = 2


def adapter_engine(**fields: Any) -> FakeEngine:
    """One that takes adapters."""
    return FakeEngine(ready=msgspec.structs.replace(READY, max_loras=MAX_LORAS), **fields)


def registry(*names: str) -> AdapterRegistry:
    """Where these adapters are served already."""
    made = AdapterRegistry(("fake", "org/alias"))
    for name in names:
        with made.loading(name, f"/adapters/{name}"):
            pass
    return made


@contextlib.asynccontextmanager
async def serving_adapters(
    lora_dir: Path, *names: str, engine: FakeEngine | None = None, **options: Any
) -> AsyncIterator[Rig]:
    """A server that loads adapters from lora_dir by request."""
    fields: dict[str, Any] = {"max_waiting_requests": 8, "drain_timeout": 5.0, "strict": True, **options}
    chosen = ServerOptions(allow_runtime_lora=True, lora_dir=str(lora_dir), **fields)
    async with running(engine or adapter_engine(), options=chosen, adapters=registry(*names)) as rig:
        yield rig


def put_adapter(folder: Path) -> Path:
    """A folder with the files of an adapter, whose content the fake engine does not read."""
    folder.mkdir(parents=True)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (folder / name).write_text("{}")
    return folder


def served(rig: Rig) -> dict[str, ServedAdapter]:
    return {adapter.lora.lora_name: adapter for adapter in rig.context.adapters.served}


def refusal(answer: httpx.Response, status: int, param: str | None) -> str:
    """The message of an answer that must be this one."""
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["param"] == param, error
    return str(error["message"])
