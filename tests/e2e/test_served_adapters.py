"""Adapters over HTTP on a real engine: what each answers is what LLM answers with it, whatever runs beside it."""

from __future__ import annotations

import asyncio
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import msgspec
import openai
import pytest
from adapter_rig import LOAD, UNLOAD, refusal
from peft_folders import llama, saved
from server_rig import running

from octavo import LLM, LoRARequest, SamplingParams
from octavo.config import EngineOptions, OutputFacts, ServerOptions
from octavo.engine.process_client import ProcessEngineClient
from octavo.server.adapter_probe import serve_modules
from octavo.server.adapters import AdapterRegistry, read_modules
from octavo.serving import _ENGINE_COMMAND

PROMPTS = [[5, 9, 33, 2], [7, 7], [40, 1, 13]]
NAMES = ("base", "static", "dynamic")
NUM_TOKENS = 24


@dataclass
class Folders:
    model: str
    loras: Path


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """A tiny model, two adapters of different modules and ranks, and two that are no good."""
    folder = tmp_path_factory.mktemp("adapters")
    model = llama()
    model.save_pretrained(folder / "model")
    loras = folder / "loras"
    saved(loras / "static", r=4, target_modules=["q_proj", "v_proj", "down_proj"])
    saved(loras / "dynamic", r=2, target_modules="all-linear")
    saved(loras / "large", r=17, target_modules=["q_proj"])
    weights = saved(loras / "cut", r=2, target_modules=["q_proj"]) / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    return Folders(str(folder / "model"), loras)


@pytest.fixture(scope="module")
def options(folders: Folders) -> dict[str, Any]:
    return {
        "model": folders.model,
        "dtype": "float32",
        "max_model_len": 64,
        "max_num_seqs": 9,
        "kv_cache_memory": "1MiB",
        "skip_tokenizer_init": True,
        "enable_lora": True,
        "max_loras": 2,
        "threads": 1,
    }


@pytest.fixture(scope="module")
def expected(folders: Folders, options: dict[str, Any]) -> dict[str, list[list[int]]]:
    """Greedy tokens of each prompt, by adapter, from LLM."""
    llm = LLM(**options)
    loras = [None, *(LoRARequest(name, n, str(folders.loras / name)) for n, name in enumerate(NAMES[1:], 1))]
    params = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
    found = {
        name: [
            output.outputs[0].token_ids for output in llm.generate(PROMPTS, params, lora_request=lora, use_tqdm=False)
        ]
        for name, lora in zip(NAMES, loras)
    }
    assert len({str(tokens) for tokens in found.values()}) == 3
    return found


async def test_adapters_beside_each_other(
    folders: Folders, options: dict[str, Any], expected: dict[str, list[list[int]]]
) -> None:
    engine_options = EngineOptions(**options)
    server = ServerOptions(
        served_model_name=("base",),
        lora_modules=(f"static={folders.loras / 'static'}",),
        allow_runtime_lora=True,
        lora_dir=str(folders.loras),
    )
    engine: Any = ProcessEngineClient(
        _ENGINE_COMMAND, msgspec.json.encode({**asdict(engine_options), "log_level": "info"})
    )
    try:
        await engine.wait_ready()
        adapters = AdapterRegistry(("base",))
        await serve_modules(read_modules(engine_options, server), adapters, engine, OutputFacts())
        fields = {"served_model_names": ("base",), "max_model_len": 64, "tokenizer": None, "chat_template": None}
        async with running(engine, options=server, adapters=adapters, **fields) as rig:
            ask = Asking(rig.openai)
            answer = await rig.http.post(LOAD, json={"lora_name": "dynamic", "lora_path": "dynamic"})
            assert answer.status_code == 200, answer.text
            assert [card.id for card in (await rig.openai.models.list()).data] == list(NAMES)
            assert await ask.all_at_once() == expected
            # While others stream: adapters that are no good, one replaced by itself, one unloaded.
            streams = {name: asyncio.create_task(ask.stream(name, PROMPTS[0])) for name in NAMES}
            for name, words in (("large", "17"), ("cut", "safetensors")):
                answer = await rig.http.post(LOAD, json={"lora_name": name, "lora_path": name})
                assert words in refusal(answer, 400, None)
            body = {"lora_name": "dynamic", "lora_path": "dynamic", "load_inplace": True}
            assert (await rig.http.post(LOAD, json=body)).status_code == 200
            assert (await rig.http.post(UNLOAD, json={"lora_name": "static"})).status_code == 200
            assert {name: await task for name, task in streams.items()} == {n: expected[n][0] for n in NAMES}
            with pytest.raises(openai.NotFoundError):
                await ask.whole("static", PROMPTS[0])
            assert await ask.whole("dynamic", PROMPTS[1]) == expected["dynamic"][1]
            stats = (await engine.control("audit"))["stats"]
            assert (stats["num_running"], stats["num_waiting"]) == (0, 0)
            assert stats["num_free_blocks"] == stats["num_blocks"]
            assert (await rig.http.get("/metrics")).text.count('vllm:lora_requests_info{max_lora="2"') == 1
    finally:
        await engine.close()


@dataclass
class Asking:
    """Greedy tokens over the openai client."""

    client: openai.AsyncOpenAI

    async def whole(self, name: str, prompt: list[int]) -> list[int]:
        answer = await self.client.completions.create(**_fields(name, prompt))
        assert answer.model == name
        [choice] = answer.choices
        return choice.model_extra["token_ids"]  # type: ignore[index,no-any-return]

    async def stream(self, name: str, prompt: list[int]) -> list[int]:
        chunks = await self.client.completions.create(**_fields(name, prompt), stream=True)
        return [
            token async for chunk in chunks for choice in chunk.choices for token in choice.model_extra["token_ids"]
        ]

    async def all_at_once(self) -> dict[str, list[list[int]]]:
        found = await asyncio.gather(*(self.whole(name, prompt) for prompt in PROMPTS for name in NAMES))
        return {name: found[index :: len(NAMES)] for index, name in enumerate(NAMES)}


def _fields(name: str, prompt: list[int]) -> dict[str, Any]:
    extra = {"ignore_eos": True, "return_token_ids": True}
    return {"model": name, "prompt": prompt, "max_tokens": NUM_TOKENS, "temperature": 0, "extra_body": extra}
