"""Adapters that come and go by request: what is loaded, what is refused, and who meets whom on the way."""

from __future__ import annotations

import asyncio
import json
import os
import socket
from pathlib import Path
from typing import Any

import pytest
from adapter_rig import LOAD, UNLOAD, adapter_engine, put_adapter, refusal, served, serving_adapters
from server_rig import FakeEngine, Rig, Script, running, until

from octavo.lora.adapter import CONFIG_NAME, WEIGHTS_NAME
from octavo.protocol.request import Request
from octavo.server.openai import adapters

PATH = "/v1/completions"


async def load(rig: Rig, name: str, path: str | None = None, **fields: Any) -> Any:
    return await rig.http.post(LOAD, json={"lora_name": name, "lora_path": path or name, **fields})


async def unload(rig: Rig, name: str, **fields: Any) -> Any:
    return await rig.http.post(UNLOAD, json={"lora_name": name, **fields})


async def complete(rig: Rig, model: str, prompt: str = "a") -> Any:
    return await rig.http.post(PATH, json={"model": model, "prompt": prompt})


def test_the_files_are_those_that_the_engine_reads() -> None:
    assert adapters._FILES == (CONFIG_NAME, WEIGHTS_NAME)


async def test_an_adapter_comes_serves_and_goes(tmp_path: Path) -> None:
    folder = put_adapter(tmp_path / "team" / "a")
    async with serving_adapters(tmp_path, "static") as rig:
        for path in ("team/a", str(folder), "team/../team/./a", "./team//a/"):
            answer = await load(rig, "a", path)
            assert (answer.status_code, answer.text) == (200, "Success: LoRA adapter 'a' added successfully.")
            assert answer.headers["content-type"].startswith("text/plain")
            probe = rig.engine.requests[-1]
            assert (probe.prompt_token_ids, probe.max_tokens) == ([0], 1)
            lora = served(rig)["a"].lora
            assert probe.lora == lora
            assert lora.lora_path == str(folder)
            listed = {card.id: card for card in (await rig.openai.models.list()).data}
            assert listed["a"].model_dump()["root"] == str(folder)
            assert (await complete(rig, "a")).json()["model"] == "a"
            assert rig.engine.requests[-1].lora == lora
            wrong = await unload(rig, "a", lora_int_id=lora.lora_int_id + 1)
            assert refusal(wrong, 400, "lora_int_id").endswith(f"allowed: {lora.lora_int_id}")
            answer = await unload(rig, "a", lora_int_id=lora.lora_int_id)
            assert (answer.status_code, answer.text) == (200, "Success: LoRA adapter 'a' removed successfully.")
            refusal(await complete(rig, "a"), 404, "model")
            refusal(await unload(rig, "a"), 404, "lora_name")
        assert lora.lora_int_id == 5  # none is used twice
        assert (await unload(rig, "static")).status_code == 200
        assert [card.id for card in (await rig.openai.models.list()).data] == ["fake", "org/alias"]


async def test_without_the_flag_there_are_no_such_routes(tmp_path: Path) -> None:
    put_adapter(tmp_path / "a")
    async with running(adapter_engine()) as rig:
        for path in (LOAD, UNLOAD):
            answer = await rig.http.post(path, json={"lora_name": "a", "lora_path": "a"})
            assert answer.status_code == 404
            assert answer.json()["error"]["code"] == "not_found"
            assert answer.json() == json.loads((await rig.http.post("/v1/x")).text.replace("/v1/x", path))
            assert path not in (await rig.http.get("/openapi.json")).json()["paths"]


async def test_a_key_is_needed_where_there_is_one(tmp_path: Path) -> None:
    put_adapter(tmp_path / "a")
    async with serving_adapters(tmp_path, api_key=("secret",)) as rig:
        assert (await load(rig, "a")).status_code == 401
        assert (await unload(rig, "a")).status_code == 401
        assert served(rig) == {}
        key = {"Authorization": "Bearer secret"}
        body = {"lora_name": "a", "lora_path": "a"}
        assert (await rig.http.post(LOAD, json=body, headers=key)).status_code == 200


async def test_bodies_that_are_refused(tmp_path: Path) -> None:
    put_adapter(tmp_path / "a")
    good: dict[str, Any] = {"lora_name": "a", "lora_path": "a"}
    names = ["", "fake", "org/alias", "a/b", "../a", "a b", "é", "a\0", "a\n", "x" * 129, "static"]
    cases = [
        *((LOAD, {**good, "lora_name": name}, "lora_name") for name in names),
        (LOAD, {"lora_path": "a"}, "lora_name"),
        (LOAD, {"lora_name": "a"}, "lora_path"),
        (LOAD, {**good, "lora_path": None}, "lora_path"),
        (LOAD, {**good, "lora_name": 5}, "lora_name"),
        (LOAD, {**good, "load_inplace": "yes"}, "load_inplace"),
        (LOAD, {**good, "is_3d_lora_weight": True}, "is_3d_lora_weight"),
        (LOAD, {**good, "lora_int_id": 5}, "lora_int_id"),
        (UNLOAD, {}, "lora_name"),
        (UNLOAD, {"lora_name": "static", "lora_int_id": 0}, "lora_int_id"),
        (UNLOAD, {"lora_name": "static", "lora_int_id": True}, "lora_int_id"),
        (UNLOAD, {"lora_name": "static", "lora_path": "a"}, "lora_path"),
    ]
    async with serving_adapters(tmp_path, "static") as rig:
        for path, body, param in cases:
            refusal(await rig.http.post(path, json=body), 400, param)
        assert rig.engine.requests == []
        assert set(served(rig)) == {"static"}
        unchanged = {**good, "load_inplace": None, "is_3d_lora_weight": False}
        assert (await rig.http.post(LOAD, json=unchanged)).status_code == 200


def outside_and_inside(folder: Path) -> tuple[Path, Path]:
    """A folder for adapters, full of ways out of it, and an adapter beside it that must not be reached."""
    inside, outside = folder / "loras", put_adapter(folder / "loras-secret")
    good = put_adapter(inside / "good")
    (inside / "folder").symlink_to(outside)
    (inside / "parent").symlink_to("..")
    (inside / "loop").symlink_to("loop")
    (inside / "near").symlink_to("good")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        made = put_adapter(inside / f"file-{name}")
        (made / name).unlink()
        (made / name).symlink_to(outside / name)
    half = put_adapter(inside / "shared")
    (half / "adapter_config.json").unlink()
    (half / "adapter_config.json").symlink_to(good / "adapter_config.json")
    return inside, outside


async def test_no_path_leads_out_of_the_folder(tmp_path: Path) -> None:
    inside, outside = outside_and_inside(tmp_path)
    leads_out = [
        "..", "../loras-secret", "good/../../loras-secret", str(outside), f"{inside}-secret",
        f"{inside}/../loras-secret", "/", "/etc", "/proc/self/cwd",
        "folder", "folder/.", "good/../folder", "parent", "parent/loras-secret",
        "file-adapter_config.json", "file-adapter_model.safetensors", "../loras-none", "/none",
        f"/proc/self/root{outside}", f"//{outside}",
    ]  # fmt: skip
    no_folder = [
        "none", "good/adapter_config.json", "good/adapter_config.json/", "loop", "loop/x", "~", "~root",
        "~/../loras-secret/x",
        "%2e%2e", "..%2floras-secret", "%2e%2e%2floras-secret", "..\\loras-secret", "C:\\adapters", "\\\\host\\share",
        "file:///etc", "$HOME", "good\n", " good", "x" * 300, "a/" * 2000, "．．/loras-secret", "..;/loras-secret",
        "none/../none",
    ]  # fmt: skip
    no_path = ["", "good\0", "\0", "good\0/../../loras-secret", "x" * 4097]
    async with serving_adapters(inside) as rig:
        for path in leads_out:
            answer = await rig.http.post(LOAD, json={"lora_name": "x", "lora_path": path})
            message = refusal(answer, 400, "lora_path")
            assert "leads out of the server's lora_dir" in message, (path, message)
        for paths, words in ((no_folder, "is no folder"), (no_path, "is no path")):
            for path in paths:
                answer = await rig.http.post(LOAD, json={"lora_name": "x", "lora_path": path})
                message = refusal(answer, 400, "lora_path")
                assert words in message, (path, message)
                assert str(tmp_path) not in message
                assert len(message) < 500
        assert rig.engine.requests == []
        assert served(rig) == {}
        # What is outside is refused alike whether it is there or not.
        there, not_there = [await load(rig, "x", path) for path in ("../loras-secret", "../loras-nothing")]
        assert there.text.replace("secret", "nothing") == not_there.text
        for path in ("shared", "near", "good", "parent/loras/good", str(inside / "good")):
            assert (await load(rig, "x", path, load_inplace=True)).status_code == 200, path
            resolved = inside / ("shared" if path == "shared" else "good")
            assert served(rig)["x"].lora.lora_path == str(resolved)


async def test_the_folder_may_be_given_by_a_symlink_and_relative(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = put_adapter(tmp_path / "real" / "a")
    (tmp_path / "link").symlink_to("real")
    monkeypatch.chdir(tmp_path)
    async with serving_adapters(Path("link")) as rig:
        for path in ("a", str(tmp_path / "link" / "a"), str(folder)):
            assert (await load(rig, "a", path, load_inplace=True)).status_code == 200, path
        assert served(rig)["a"].lora.lora_path == str(folder)


async def test_what_the_engine_says_of_an_adapter_is_the_answer(tmp_path: Path) -> None:
    for name in ("a", "b"):
        put_adapter(tmp_path / name)
    faults = {
        "refuse": (400, "the row failed"),
        "error": (500, "the row failed"),
        "abort": (503, "gave the request up"),
        "die": (503, "the engine stopped"),
    }
    async with serving_adapters(tmp_path, "b") as rig:
        before = served(rig)
        for fault, (status, words) in faults.items():
            rig.engine.script = lambda _, fault=fault: Script(fault=fault)
            for name, inplace in (("a", False), ("b", True)):
                rig.engine.dead = None
                answer = await load(rig, name, load_inplace=inplace)
                assert words in refusal(answer, status, None)
                assert served(rig) == before
        refusal(await load(rig, "a"), 503, None)  # it is dead
        rig.engine.dead, rig.engine.script = None, lambda _: Script()
        assert (await load(rig, "a")).status_code == 200


def gated(gate: asyncio.Event) -> FakeEngine:
    """Holds requests of several tokens, or those that try an adapter, whose prompt is token 0."""
    return adapter_engine(script=lambda r: Script(gate=gate if r.prompt_token_ids in ([0], [ord("h")]) else None))


def running_with(rig: Rig, prompt: list[int]) -> list[Request]:
    return [r for r in rig.engine.requests if r.prompt_token_ids == prompt and r.request_id in rig.engine.running]


async def test_of_two_loads_of_one_name_one_wins(tmp_path: Path) -> None:
    for name in ("a", "b"):
        put_adapter(tmp_path / name)
    gate = asyncio.Event()
    async with serving_adapters(tmp_path, engine=gated(gate)) as rig:
        first = asyncio.create_task(load(rig, "x", "a"))
        await until(lambda: bool(rig.engine.running))
        for inplace in (False, True):
            message = refusal(await load(rig, "x", "b", load_inplace=inplace), 400, "lora_name")
            assert "is being loaded" in message
        refusal(await complete(rig, "x"), 404, "model")
        refusal(await unload(rig, "x"), 404, "lora_name")
        other = asyncio.create_task(load(rig, "y", "b"))
        await until(lambda: len(rig.engine.running) == 2)
        gate.set()
        assert [(await task).status_code for task in (first, other)] == [200, 200]
        assert "is in use" in refusal(await load(rig, "x", "b"), 400, "lora_name")
        answers = await asyncio.gather(*(load(rig, "z", name) for name in ("a", "b") * 3))
        assert sorted(answer.status_code for answer in answers) == [200] + [400] * 5
        numbers = [adapter.lora.lora_int_id for adapter in served(rig).values()]
        assert len(set(numbers)) == len(numbers) == 3


async def test_requests_that_run_keep_what_is_unloaded_or_replaced(tmp_path: Path) -> None:
    for name in ("a", "b"):
        put_adapter(tmp_path / name)
    gate = asyncio.Event()
    engine = adapter_engine(script=lambda r: Script(gate=gate if r.prompt_token_ids == [ord("h")] else None))
    async with serving_adapters(tmp_path, engine=engine) as rig:
        await load(rig, "x", "a")
        old = served(rig)["x"].lora
        held = asyncio.create_task(complete(rig, "x", "h"))
        await until(lambda: bool(rig.engine.running))
        assert (await load(rig, "x", "b", load_inplace=True)).status_code == 200
        new = served(rig)["x"].lora
        assert (new.lora_int_id, new.lora_path) == (old.lora_int_id + 1, str(tmp_path / "b"))
        assert (await complete(rig, "x")).status_code == 200
        assert engine.requests[-1].lora == new
        also_held = asyncio.create_task(complete(rig, "x", "h"))
        await until(lambda: len(rig.engine.running) == 2)
        assert (await unload(rig, "x")).status_code == 200
        refusal(await complete(rig, "x"), 404, "model")
        assert [r.lora for r in running_with(rig, [ord("h")])] == [old, new]
        gate.set()
        for answer in (await held, await also_held):
            assert answer.status_code == 200
            assert answer.json()["model"] == "x"
            assert answer.json()["choices"][0]["text"] == "hello"
        assert engine.aborted == []


@pytest.mark.parametrize("inplace", [False, True])
async def test_a_client_that_leaves_leaves_nothing_behind(tmp_path: Path, inplace: bool) -> None:
    put_adapter(tmp_path / "a")
    gate = asyncio.Event()
    async with serving_adapters(tmp_path, *(["x"] if inplace else []), engine=gated(gate)) as rig:
        before = served(rig)
        body = json.dumps({"lora_name": "x", "lora_path": "a", "load_inplace": inplace}).encode()
        _, writer = await rig.connect()
        head = (
            f"POST {LOAD} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        writer.write(head.encode() + body)
        await until(lambda: bool(rig.engine.running))
        sock = writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        writer.transport.abort()
        await until(lambda: not rig.engine.running)
        assert len(rig.engine.aborted) == 1
        gate.set()
        assert served(rig) == before
        assert (await load(rig, "x", "a", load_inplace=inplace)).status_code == 200  # the name is free again


async def test_places_in_the_queue_are_taken_by_loads_too(tmp_path: Path) -> None:
    for n in range(3):
        put_adapter(tmp_path / f"a{n}")
    gate = asyncio.Event()
    engine = gated(gate)
    async with serving_adapters(tmp_path, engine=engine, max_waiting_requests=0) as rig:
        held = [asyncio.create_task(complete(rig, "fake", "h")) for _ in range(8)]
        await until(lambda: len(engine.running) == 8)
        assert (await load(rig, "a0")).status_code == 429
        gate.set()
        await asyncio.gather(*held)
        assert (await load(rig, "a0")).status_code == 200


async def test_a_pipe_in_place_of_a_file_does_not_hold_the_server(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    os.mkfifo(tmp_path / "a" / "adapter_config.json")
    async with serving_adapters(tmp_path) as rig:
        assert (await load(rig, "a")).status_code == 200  # of what the files hold, the engine judges
        await rig.healthy()
