"""Embeddings through the whole engine, on both runners, against a dense computation of the same model."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from test_device_runner import CONFIG, CPU, LIMITS, VOCAB, Dense, Rig, model, prompts  # noqa: F401 (a fixture)

from octavo.attention.cpu import CpuAttention
from octavo.config import SchedulerConfig
from octavo.distributed.executor import InProcessExecutor
from octavo.engine.engine import Engine
from octavo.kernels import triton
from octavo.loading.weights import dummy_weights
from octavo.models.base import CausalLM
from octavo.models.registry import build_model
from octavo.protocol.outputs import TokenOutput
from octavo.protocol.plan import PlanRow, RowResult
from octavo.protocol.pooling import SAMPLING, SCORE, Pooling, PoolingParams, floats
from octavo.protocol.request import Request
from octavo.scheduler.scheduler import Scheduler
from octavo.worker.model_runner import ModelRunner
from octavo.worker.pooler import NOT_FINITE, Pooler, with_embeddings
from octavo.worker.sampler.sampler import Sampler
from octavo.worker.slots import Slots


@torch.inference_mode()
def exact(model: CausalLM, prompt: list[int], pooling: Pooling) -> torch.Tensor:  # noqa: F811
    dense: Any = Dense()
    hidden = model(torch.tensor(prompt), torch.arange(len(prompt)), dense)
    pooled = hidden[-1] if pooling == "last" else hidden.mean(0)
    return pooled / pooled.norm()


def cpu_engine(model: CausalLM, num_blocks: int) -> Engine:  # noqa: F811
    attention = CpuAttention(2, num_blocks, LIMITS.block_size, 1, 16, torch.float32)
    slots = Slots(LIMITS.max_num_seqs, LIMITS.max_model_len, LIMITS.block_size, CPU)
    runner = ModelRunner(model, attention, Sampler(LIMITS.max_num_seqs, VOCAB, CPU), slots)
    sizes = {name: value for name, value in LIMITS._asdict().items() if name != "max_draft_rows"}
    config = SchedulerConfig(**sizes, num_blocks=num_blocks)
    return Engine(Scheduler(config), InProcessExecutor(runner, threaded=False), 1)


def run(engine: Engine, requests: list[Request]) -> dict[str, list[TokenOutput]]:
    outputs: dict[str, list[TokenOutput]] = {request.request_id: [] for request in requests}
    for request in requests:
        engine.add(request)
    while engine.has_work:
        for output in engine.step():
            outputs[output.request_id].append(output)
    engine.audit()
    return outputs


@pytest.mark.parametrize("kind", ["cpu", "device"])
def test_embeddings_among_generations(model: CausalLM, kind: str) -> None:  # noqa: F811
    """In chunks of 24 tokens, over a prefix cache, beside requests for tokens, twice; on the slow interpreter, once."""
    engine = Rig(model, "torch").engine if kind == "device" else cpu_engine(model, 20)
    poolings: tuple[Pooling | None, ...] = ("last", "mean", None)
    given = prompts()[1:4:2] if kind == "device" else prompts()
    wanted = {f"{i}-{p}": (ids, p) for (i, ids), p in itertools.product(enumerate(given), poolings)}
    for _ in range(1 if kind == "device" else 2):
        requests = [
            Request(
                request_id=name,
                prompt_token_ids=ids,
                sampling=SAMPLING.replace(max_tokens=None),
                max_tokens=1 if pooling else 2,
                pooling=pooling and PoolingParams(pooling),
            )
            for name, (ids, pooling) in wanted.items()
        ]
        outputs = run(engine, requests)
        for name, (ids, pooling) in wanted.items():
            last = outputs[name][-1]
            if pooling is None:
                assert [output.embedding for output in outputs[name]] == [None] * 2
                continue
            assert len(outputs[name]) == 1
            found = torch.tensor(floats(last.embedding or b""))
            assert torch.allclose(found, exact(model, ids, pooling), atol=2e-5), name
            assert pooling == "last" or last.num_cached_tokens == 0


@pytest.mark.parametrize("kind", ["cpu", "device"])
def test_models_without_a_language_head(kind: str) -> None:
    """Their requests draw a token too, from logits that nothing computes."""
    triton.load()
    prompt = prompts()[1]
    for name, pooling in (("Qwen3Model", PoolingParams()), ("Qwen3ForSequenceClassification", SCORE)):
        made = build_model(CONFIG | {"architectures": [name], "num_labels": 1}, torch.float32, CPU)
        made.load_weights(dummy_weights(made, 0, CPU))
        engine = Rig(made, "torch").engine if kind == "device" else cpu_engine(made, 6)
        asked = Request(request_id="a", prompt_token_ids=prompt, sampling=SAMPLING, max_tokens=1, pooling=pooling)
        [output] = run(engine, [asked])["a"]
        with torch.inference_mode():
            dense: Any = Dense()
            hidden = made(torch.tensor(prompt), torch.arange(len(prompt)), dense)[-1:]
            wanted = made.score(hidden)[0] if made.score is not None else torch.nn.functional.normalize(hidden)[0]
        torch.testing.assert_close(torch.tensor(floats(output.embedding or b"")), wanted, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_a_preempted_prompt_starts_over(model: CausalLM, pooling: Pooling) -> None:  # noqa: F811
    """Five blocks of 16: one that generates needs its second when 32 of the embedding's 53 tokens are computed."""
    engine = cpu_engine(model, 6)
    long = prompts()[4] + prompts()[2] + prompts()[0]
    first = Request(
        request_id="g", prompt_token_ids=long[:15], sampling=SAMPLING.replace(max_tokens=None), max_tokens=10
    )
    asked = Request(
        request_id="e", prompt_token_ids=long, sampling=SAMPLING, max_tokens=1, pooling=PoolingParams(pooling)
    )
    outputs = run(engine, [first, asked])
    assert engine.stats().num_preemptions_total == 1
    found = torch.tensor(floats(outputs["e"][-1].embedding or b""))
    assert torch.allclose(found, exact(model, long, pooling), atol=2e-5)


def test_a_mean_over_chunks_and_a_slot_that_changes_hands() -> None:
    pooler = Pooler()
    hidden = torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
    pooler.set_slot(3, PoolingParams("mean"), 7)
    assert pooler.pool([PlanRow(3, 0, 4, [], False)], hidden[3:4], hidden[:4]) is None
    pooler.set_slot(3, PoolingParams("mean"), 7)  # preempted: from the start again
    assert pooler.pool([PlanRow(3, 0, 2, [], False)], hidden[1:2], hidden[:2]) is None
    rows = [PlanRow(1, 9, 1, [], True), PlanRow(3, 2, 5, [], True)]
    assert pooler.reads_all(rows)
    assert not pooler.reads_all(rows[:1])
    found = pooler.pool(rows, hidden[5:], torch.cat([hidden[:1], hidden[2:], hidden]))
    assert found is not None
    assert found[0] == [3]
    assert torch.allclose(found.vectors[0], torch.nn.functional.normalize(hidden.mean(0), dim=0))
    assert pooler.pool([PlanRow(3, 7, 1, [], True)], hidden[:1], hidden) is None
    assert not pooler.reads_all(rows)


def test_the_last_state_beside_rows_that_verify_guesses() -> None:
    """Of those, 1 + num_drafts states are there."""
    pooler = Pooler()
    last = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    pooler.set_slot(2, PoolingParams(normalize=False), 9)
    rows = [PlanRow(0, 7, 3, [], True, num_drafts=2), PlanRow(2, 4, 5, [], True), PlanRow(1, 3, 1, [], True)]
    found = pooler.pool(rows, last, None)
    assert found is not None
    assert torch.equal(found.vectors, last[3:4])


def test_each_slot_gets_its_own_kind_length_and_size() -> None:
    pooler = Pooler(lambda hidden: hidden.sum(-1, keepdim=True))
    hidden = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    wishes = [
        PoolingParams("score", normalize=False),
        PoolingParams(normalize=False),
        PoolingParams(normalize=True, dimensions=3),
        PoolingParams(normalize=False, dimensions=2),
    ]
    rows = [PlanRow(slot, 0, 1, [], True) for slot in range(4)]
    for slot, wish in enumerate(wishes):
        pooler.set_slot(slot, wish, 1)
    pooled = pooler.pool(rows, hidden, None)
    assert pooled is not None
    results = with_embeddings(rows, [RowResult([0])] * 4, pooled)
    found = [torch.tensor(floats(result.embedding or b"")) for result in results]
    cut = hidden[2, :3]
    for mine, wanted in zip(found, [hidden[0].sum()[None], hidden[1], cut / cut.norm(), hidden[3, :2]]):
        torch.testing.assert_close(mine, wanted)


def test_a_vector_that_is_not_finite_is_its_rows_error() -> None:
    pooler = Pooler()
    for slot in (0, 1):
        pooler.set_slot(slot, PoolingParams(), 1)
    rows = [PlanRow(0, 0, 1, [], True), PlanRow(1, 0, 1, [], True)]
    pooled = pooler.pool(rows, torch.tensor([[3.0, 4.0], [float("nan"), 1.0]]), None)
    assert pooled is not None
    good, bad = with_embeddings(rows, [RowResult([5]), RowResult([6])], pooled)
    assert floats(good.embedding or b"") == pytest.approx([0.6, 0.8])
    assert (bad.error, bad.embedding, bad.token_ids) == (NOT_FINITE, None, [])


def test_pooling_takes_one_token(model: CausalLM) -> None:  # noqa: F811
    with pytest.raises(ValueError, match="max_tokens=2 is out of range with pooling; allowed: 1"):
        cpu_engine(model, 6).add(
            Request(request_id="x", prompt_token_ids=[1], sampling=SAMPLING, max_tokens=2, pooling=PoolingParams())
        )
