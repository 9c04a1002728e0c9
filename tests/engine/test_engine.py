"""The one loop: depth 1 and 2 give the same tokens; a step that raises costs its own requests only."""

from __future__ import annotations

import pytest
from fake_worker import FakeRunner, expected

from octavo.config import SchedulerConfig
from octavo.distributed.executor import InProcessExecutor
from octavo.engine.engine import Engine
from octavo.protocol.outputs import TokenOutput
from octavo.protocol.request import Request
from octavo.protocol.sampling import SamplingParams
from octavo.scheduler.scheduler import Scheduler


def make_engine(depth: int, *, num_blocks: int = 65, poison: int | None = None) -> Engine:
    config = SchedulerConfig(
        max_num_seqs=8, max_num_batched_tokens=16, max_model_len=64, block_size=4, num_blocks=num_blocks
    )
    return Engine(Scheduler(config), InProcessExecutor(FakeRunner(poison), threaded=depth > 1), depth)


def request(request_id: str, prompt: list[int], max_tokens: int) -> Request:
    sampling = SamplingParams(max_tokens=max_tokens, seed=0)
    return Request(request_id=request_id, prompt_token_ids=prompt, sampling=sampling, max_tokens=max_tokens)


def run(engine: Engine) -> dict[str, list[TokenOutput]]:
    found: dict[str, list[TokenOutput]] = {}
    while engine.has_work:
        for output in engine.step():
            found.setdefault(output.request_id, []).append(output)
    engine.audit()
    return found


def tokens(outputs: list[TokenOutput]) -> list[int]:
    return [token for output in outputs for token in output.new_token_ids]


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("num_blocks", [97, 18])  # 18: far too few for all at once, so sequences are preempted
def test_tokens_are_those_of_each_prompt_alone(depth: int, num_blocks: int) -> None:
    engine = make_engine(depth, num_blocks=num_blocks)
    prompts = {str(i): [i + 1] * (3 + 5 * i) for i in range(8)}
    for name, prompt in prompts.items():
        engine.add(request(name, prompt, 20))
    found = run(engine)
    for name, prompt in prompts.items():
        assert tokens(found[name]) == expected(prompt, 20)
        assert [o.finish_reason for o in found[name] if o.finish_reason] == ["length"]
    stats = engine.stats()
    assert stats.num_free_blocks == stats.num_blocks == num_blocks - 1
    assert (stats.num_preemptions_total > 0) == (num_blocks == 18)
    engine.shutdown()


@pytest.mark.parametrize("depth", [1, 2])
def test_a_step_that_raises_costs_its_own_requests(depth: int) -> None:
    engine = make_engine(depth, poison=7)
    engine.add(request("bad", [7, 1], 5))
    found = run(engine)
    assert found["bad"][-1].finish_reason == "error"
    assert "RuntimeError" in (found["bad"][-1].error or "")
    engine.add(request("good", [5, 1], 5))
    assert tokens(run(engine)["good"]) == expected([5, 1], 5)
    assert engine.stats().num_free_blocks == engine.stats().num_blocks
    engine.shutdown()


@pytest.mark.parametrize("depth", [1, 2])
def test_abort_frees_everything_whatever_is_in_flight(depth: int) -> None:
    engine = make_engine(depth)
    engine.add(request("running", [1, 2, 3], 40))
    engine.add(request("other", [4, 5, 6], 8))
    engine.step()
    engine.add(request("waiting", [9] * 30, 8))
    ended = engine.abort(["running", "waiting", "nobody"])
    assert {o.request_id: o.finish_reason for o in ended} == {"running": "abort", "waiting": "abort"}
    assert engine.abort(["running"]) == []
    found = run(engine)
    assert set(found) == {"other"}
    assert engine.stats().num_free_blocks == engine.stats().num_blocks
    engine.shutdown()
