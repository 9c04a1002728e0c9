"""Adapters by name on every route, in the list of models, in a batch, and in /metrics."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import openai
import pytest
from adapter_rig import adapter_engine, refusal, registry, serving_adapters
from prometheus_client.parser import text_string_to_metric_families
from request_bodies import BASE, ROUTES, USER
from server_rig import FakeEngine, Script, make_context, running

from octavo.config import EngineOptions, OutputFacts, ServerOptions
from octavo.protocol.lora import LoRARequest
from octavo.protocol.outputs import SchedulerStats
from octavo.server.adapter_probe import AdapterError, serve_modules
from octavo.server.adapters import AdapterModule, AdapterRegistry, read_modules
from octavo.server.batch import Batch, BatchFiles
from octavo.server.batch_files import read_finished
from octavo.server.context import ServerState

TUNED = LoRARequest("tuned", 1, "/adapters/tuned")
# What answers a body with the model's name, and how many engine requests that takes.
ANSWERING = {
    "ChatBody": 1, "CompletionBody": 1, "ResponsesBody": 1, "MessagesBody": 1, "EmbeddingsBody": 1, "ScoreBody": 2,
    "RerankBody": 2,
}  # fmt: skip


async def test_adapters_are_listed_after_the_model() -> None:
    adapters = registry("tuned")
    with adapters.loading("other", "org/other", parent="org/alias"):
        pass
    async with running(adapters=adapters) as rig:
        cards = {card.id: card.model_dump() for card in (await rig.openai.models.list()).data}
        assert list(cards) == ["fake", "org/alias", "tuned", "other"]
        assert cards["fake"]["parent"] is None
        tuned = cards["tuned"]
        assert (tuned["root"], tuned["parent"]) == ("/adapters/tuned", "fake")
        assert {name: tuned[name] for name in ("object", "owned_by", "max_model_len")} == {
            name: cards["fake"][name] for name in ("object", "owned_by", "max_model_len")
        }
        assert abs(tuned["created"] - time.time()) < 60
        assert (cards["other"]["root"], cards["other"]["parent"]) == ("org/other", "org/alias")
        assert (await rig.openai.models.retrieve("tuned")).model_dump() == tuned
        described = (await rig.http.get("/openapi.json")).json()
        assert described["components"]["schemas"]["ChatBody"]["properties"]["model"]["enum"] == list(cards)


@pytest.mark.parametrize("struct", ANSWERING)
async def test_a_name_selects_its_adapter_and_is_echoed(struct: str) -> None:
    async with running(adapters=registry("first", "tuned")) as rig:
        for name, echoed, number in (("tuned", "tuned", 2), ("org/alias", "fake", None)):
            rig.engine.requests.clear()
            answer = await rig.http.post(ROUTES[struct].path, json={**BASE[struct], "model": name})
            assert answer.status_code == 200, answer.text
            assert answer.json()["model"] == echoed
            assert [r.lora and r.lora.lora_int_id for r in rig.engine.requests] == [number] * ANSWERING[struct]


async def test_streams_and_searches_select_it_too() -> None:
    async with running(adapters=registry("tuned")) as rig:
        fields: Any = {"model": "tuned", "stream": True}
        chunks = [chunk async for chunk in await rig.openai.chat.completions.create(messages=USER, **fields)]
        chunks += [chunk async for chunk in await rig.openai.completions.create(prompt="a", **fields)]
        assert {chunk.model for chunk in chunks} == {"tuned"}
        events = [event async for event in await rig.openai.responses.create(input="a", **fields)]
        assert {event.response.model for event in events if hasattr(event, "response")} == {"tuned"}
        body = {**BASE["MessagesBody"], "model": "tuned", "stream": True}
        assert '"model":"tuned"' in (await rig.http.post("/v1/messages", json=body)).text
        found = await rig.openai.completions.create(
            model="tuned", prompt="a", max_tokens=2, n=2, extra_body={"use_beam_search": True}
        )
        assert found.model == "tuned"
        assert len(rig.engine.requests) > 6
        assert {r.lora for r in rig.engine.requests} == {TUNED}


@pytest.mark.parametrize("struct", BASE)
async def test_every_route_knows_the_names_and_no_others(struct: str) -> None:
    async with running(adapters=registry("tuned")) as rig:
        assert (await rig.http.post(ROUTES[struct].path, json={**BASE[struct], "model": "tuned"})).status_code == 200
        for name in ("tune", "Tuned", "tuned/", "fake/tuned", ""):
            answer = await rig.http.post(ROUTES[struct].path, json={**BASE[struct], "model": name})
            assert answer.status_code == 404, (name, answer.text)
            assert answer.json()["error"]["param"] == "model"


async def test_what_the_engine_refuses_an_adapter_is_the_requests_error() -> None:
    engine = FakeEngine(lambda request: Script(fault="refuse") if request.lora else Script())
    async with running(engine, adapters=registry("tuned")) as rig:
        for struct in ("CompletionBody", "EmbeddingsBody"):
            answer = await rig.http.post(ROUTES[struct].path, json={**BASE[struct], "model": "tuned"})
            assert "the row failed" in refusal(answer, 400, None)
        await rig.healthy()


async def test_a_batch_selects_adapters(tmp_path: Path) -> None:
    bodies = [{"model": name, "prompt": "a"} for name in ("fake", "tuned", "none")]
    lines = [
        json.dumps({"custom_id": body["model"], "method": "POST", "url": "/v1/completions", "body": body})
        for body in bodies
    ]
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("\n".join(lines) + "\n")
    engine = FakeEngine()
    state = ServerState(make_context(engine, adapters=registry("tuned")))
    files = BatchFiles(input=source, output=output, finished=read_finished(output))

    class Bar:
        def update(self, n: float = 1) -> None: ...

    assert await Batch(state, given_up=None).run(files, Bar()) == 1  # type: ignore[arg-type]
    state.close()
    written = {(line := json.loads(text))["custom_id"]: line["response"] for text in output.read_text().splitlines()}
    assert written["tuned"]["body"]["model"] == "tuned"
    assert written["none"]["status_code"] == 404
    assert {request.lora for request in engine.requests} == {None, TUNED}


async def test_metrics_say_which_adapters_run(tmp_path: Path) -> None:
    async with serving_adapters(tmp_path) as rig:
        assert "vllm:lora_requests_info{" not in (await rig.http.get("/metrics")).text
        rig.engine.emit(SchedulerStats(running_adapters=("a", "b"), waiting_adapters=("c",), num_adapter_loads_total=7))
        text = (await rig.http.get("/metrics")).text
        families = {family.name: family for family in text_string_to_metric_families(text)}
        [sample] = families["vllm:lora_requests_info"].samples
        assert sample.labels == {
            "max_lora": "2", "running_lora_adapters": "a,b", "waiting_lora_adapters": "c"
        }  # fmt: skip
        assert abs(sample.value - time.time()) < 5
        assert (await rig.metrics())["octavo:lora_adapter_loads_total"] == 7
    async with running() as rig:  # an engine that takes none
        text = (await rig.http.get("/metrics")).text
        assert "lora" not in text


async def test_modules_are_tried_at_the_start() -> None:
    def script(request: Any) -> Script:
        return Script(fault="refuse") if request.lora.lora_path == "bad" else Script()

    engine, adapters = FakeEngine(script), AdapterRegistry(("fake",))
    good = [AdapterModule("a", "x"), AdapterModule("b", "y", "fake")]
    await serve_modules(good, adapters, engine, OutputFacts())
    assert [(r.prompt_token_ids, r.max_tokens, r.lora) for r in engine.requests] == [
        ([0], 1, LoRARequest("a", 1, "x")),
        ([0], 1, LoRARequest("b", 2, "y")),
    ]
    assert [adapter.parent for adapter in adapters.served] == [None, "fake"]
    with pytest.raises(AdapterError, match=r"^lora_modules: c=bad: the row failed$"):
        await serve_modules([AdapterModule("c", "bad")], adapters, engine, OutputFacts())
    assert adapters.find("c") is None
    for fault, message in (("abort", "gave the request up"), ("die", "engine stopped: killed")):
        engine.script = lambda _, fault=fault: Script(fault=fault)
        with pytest.raises(AdapterError, match=message):
            await serve_modules([AdapterModule("d", "x")], adapters, engine, OutputFacts())
    with pytest.raises(AdapterError, match="engine stopped: killed"):
        await serve_modules([AdapterModule("d", "x")], adapters, engine, OutputFacts())


@pytest.mark.parametrize("head", ["embeddings", "scores"])
async def test_models_without_tokens_are_asked_for_what_they_have(head: Any) -> None:
    engine = adapter_engine()
    outputs = OutputFacts(head=head, pooling="mean")
    await serve_modules([AdapterModule("a", "x")], AdapterRegistry(), engine, outputs)
    [pooling] = [request.pooling for request in engine.requests]
    assert pooling is not None
    assert pooling.kind == {"embeddings": "mean", "scores": "score"}[head]


LORA = EngineOptions(model="m", enable_lora=True)


@pytest.mark.parametrize(
    ("given", "module"),
    [
        ("a=b", AdapterModule("a", "b")),
        ("a=b=c", AdapterModule("a", "b=c")),
        ('{"name": "a", "path": "b"}', AdapterModule("a", "b")),
        ('{"name": "a", "path": "b", "base_model_name": "m"}', AdapterModule("a", "b", "m")),
    ],
)
def test_modules_have_two_spellings(given: str, module: AdapterModule) -> None:
    assert read_modules(LORA, ServerOptions(lora_modules=(given,))) == [module]


@pytest.mark.parametrize(
    ("engine", "server", "message"),
    [
        ({"enable_lora": False}, {"lora_modules": ("a=b",)}, "lora_modules=a=b needs enable_lora"),
        ({}, {"lora_modules": ("a",)}, "lora_modules='a' is refused; allowed: name=path, or a JSON object"),
        ({}, {"lora_modules": ("a=",)}, "has an empty path"),
        ({}, {"lora_modules": ("=b",)}, "name='' is no name of an adapter"),
        ({}, {"lora_modules": ("a/b=c",)}, "name='a/b' is no name of an adapter"),
        ({}, {"lora_modules": ("é=c",)}, "allowed: 1..128 of the characters"),
        ({}, {"lora_modules": ("m=c",)}, "name='m' is in use"),
        ({}, {"lora_modules": ("n=c",), "served_model_name": ("o", "n")}, "name='n' is in use"),
        ({}, {"lora_modules": ("a=b", "a=c")}, "lora_modules='a=c': name='a' is in use"),
        ({}, {"lora_modules": ('{"name": "a"}',)}, "missing required field `path`"),
        ({}, {"lora_modules": ('{"name": "a", "path": "b", "rank": 1}',)}, "unknown field `rank`"),
        ({}, {"lora_modules": ("{",)}, "an object with name, path and base_model_name"),
        (
            {},
            {"lora_modules": ('{"name": "a", "path": "b", "base_model_name": "x"}',)},
            "base_model_name is no name of the model; allowed: m",
        ),
        ({}, {"allow_runtime_lora": True}, "allow_runtime_lora=true needs lora_dir"),
        ({"enable_lora": False}, {"allow_runtime_lora": True, "lora_dir": "."}, "needs enable_lora"),
        ({}, {"lora_dir": "."}, "lora_dir=. has no meaning without allow_runtime_lora"),
        ({}, {"allow_runtime_lora": True, "lora_dir": "none"}, "lora_dir=none is no folder"),
        (
            {},
            {"allow_runtime_lora": True, "lora_dir": ".", "api_server_count": 2},
            "allow_runtime_lora=true is refused with api_server_count=2",
        ),
    ],
)
def test_options_that_cannot_be_are_refused(engine: Any, server: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        read_modules(EngineOptions(**{"model": "m", "enable_lora": True, **engine}), ServerOptions(**server))


async def test_openai_says_not_found() -> None:
    async with running(adapters=registry("tuned")) as rig:
        with pytest.raises(openai.NotFoundError, match="'other' does not exist"):
            await rig.openai.chat.completions.create(model="other", messages=USER)
