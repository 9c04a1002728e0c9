"""Requests wait at the desk until their adapter is loaded; the engine goes on meanwhile."""

from __future__ import annotations

import hashlib
import threading
import time

import pytest
from fake_worker import FakeRunner, expected
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from octavo.config import SchedulerConfig
from octavo.distributed.executor import InProcessExecutor
from octavo.engine.adapters import AdapterDesk
from octavo.engine.engine import Engine
from octavo.protocol.lora import LoRARequest
from octavo.protocol.outputs import TokenOutput
from octavo.protocol.request import Request
from octavo.protocol.sampling import SamplingParams
from octavo.scheduler.scheduler import Scheduler


def lora(number: int, path: str | None = None) -> LoRARequest:
    return LoRARequest(f"a{number}", number, path or f"/adapters/{number}")


def request(name: str, adapter: LoRARequest | None = None, max_tokens: int = 3) -> Request:
    return Request(
        request_id=name,
        prompt_token_ids=[1, 2, 3],
        sampling=SamplingParams(max_tokens=max_tokens),
        max_tokens=max_tokens,
        lora=adapter,
    )


class Store:
    """Adapters as the worker keeps them. It refuses those at "bad"; at "broken" it raises what nobody expects."""

    def __init__(self) -> None:
        self.loaded: dict[int, str] = {}
        self.num_loads = 0
        self.may_load = threading.Event()
        self.may_load.set()
        self.content: dict[str, bytes] = {}

    def load(self, wanted: LoRARequest) -> bytes:
        assert self.may_load.wait(10)
        if "bad" in wanted.lora_path:
            raise ValueError(f"{wanted.lora_path}: rank 99 is too large")
        if "broken" in wanted.lora_path:
            raise KeyError("a fault")
        assert wanted.lora_int_id not in self.loaded
        self.loaded[wanted.lora_int_id] = wanted.lora_path
        self.num_loads += 1
        return hashlib.sha256(self.content.get(wanted.lora_path, wanted.lora_path.encode())).digest()

    def drop(self, number: int) -> None:
        del self.loaded[number]


class Rig:
    def __init__(self, max_cpu_loras: int = 4, max_loras: int = 2) -> None:
        self.store = Store()
        self.desk = AdapterDesk(self.store.load, self.store.drop, max_cpu_loras)
        config = SchedulerConfig(
            max_num_seqs=8,
            max_num_batched_tokens=64,
            max_model_len=64,
            block_size=4,
            num_blocks=64,
            max_loras=max_loras,
        )
        executor = InProcessExecutor(FakeRunner(), threaded=False)
        self.engine = Engine(Scheduler(config), executor, 1, adapters=self.desk)

        self.tokens: dict[str, list[int]] = {}

    def step(self) -> list[TokenOutput]:
        outputs = self.engine.step()
        for output in outputs:
            tokens = self.tokens.setdefault(output.request_id, [])
            tokens += output.new_token_ids
            assert tokens == expected([1, 2, 3], len(tokens))
        self.engine.audit()
        return outputs

    def run(self) -> dict[str, TokenOutput]:
        """To the end of all; the last output of each request."""
        last: dict[str, TokenOutput] = {}
        deadline = time.monotonic() + 20
        while self.engine.has_work:
            assert time.monotonic() < deadline
            last |= {output.request_id: output for output in self.step() if output.finish_reason is not None}
        return last


def test_a_request_runs_once_its_adapter_is_loaded_and_others_go_on_meanwhile():
    rig = Rig()
    rig.store.may_load.clear()
    rig.engine.add(request("with", lora(1)))
    rig.engine.add(request("without"))
    ended = [o for _ in range(4) for o in rig.engine.step() if o.finish_reason]
    assert [o.request_id for o in ended] == ["without"]
    assert rig.engine.has_work
    rig.store.may_load.set()
    assert rig.run()["with"].finish_reason == "length"
    rig.engine.add(request("again", lora(1)))
    rig.run()
    assert rig.store.num_loads == 1
    rig.engine.shutdown()


def test_what_cannot_be_loaded_costs_only_those_who_want_it():
    rig = Rig()
    rig.engine.add(request("bad", lora(1, "/bad")))
    rig.engine.add(request("worse", lora(1, "/bad")))
    rig.engine.add(request("broken", lora(2, "/broken")))
    rig.engine.add(request("good", lora(3)))
    last = rig.run()
    for name in ("bad", "worse"):
        assert (last[name].finish_reason, last[name].refused) == ("error", True)
        assert last[name].error == "/bad: rank 99 is too large"
    assert (last["broken"].finish_reason, last["broken"].refused) == ("error", False)
    assert last["good"].finish_reason == "length"
    rig.engine.add(request("once more", lora(1)))  # the number is free again
    assert rig.run()["once more"].finish_reason == "length"
    rig.engine.shutdown()


def test_a_number_stands_for_one_adapter():
    rig = Rig()
    rig.engine.add(request("a", lora(1)))
    rig.run()
    with pytest.raises(ValueError, match="lora_int_id=1 of adapter 'a1' from /other stands for 'a1' from /adapters/1"):
        rig.engine.add(request("b", lora(1, "/other")))
    rig.engine.shutdown()


def test_weights_that_changed_on_disk_are_not_taken_for_the_old_ones():
    rig = Rig(max_cpu_loras=1, max_loras=1)
    rig.engine.add(request("a", lora(1)))
    rig.run()
    rig.engine.add(request("b", lora(2)))
    rig.run()
    rig.store.content["/adapters/1"] = b"others"
    rig.engine.add(request("c", lora(1)))
    last = rig.run()["c"]
    assert last.refused
    assert "the weights at /adapters/1 have changed" in str(last.error)
    rig.store.content.clear()
    rig.engine.add(request("d", lora(1)))
    assert rig.run()["d"].finish_reason == "length"
    rig.engine.shutdown()


def test_a_request_that_is_aborted_while_it_waits_leaves_nothing():
    rig = Rig()
    rig.store.may_load.clear()
    rig.engine.add(request("a", lora(1)))
    rig.engine.step()
    assert [o.finish_reason for o in rig.engine.abort(["a"])] == ["abort"]
    assert not rig.engine.has_work
    rig.store.may_load.set()
    rig.engine.add(request("b", lora(2)))
    assert rig.run()["b"].finish_reason == "length"
    rig.engine.audit()
    rig.engine.shutdown()


def test_what_the_scheduler_refuses_gives_its_adapter_back():
    rig = Rig(max_cpu_loras=1, max_loras=1)
    rig.engine.add(request("long", lora(1), max_tokens=1000))
    assert rig.run()["long"].refused
    rig.engine.add(request("b", lora(2)))
    assert rig.run()["b"].finish_reason == "length"
    rig.engine.shutdown()


def test_an_engine_without_adapters_refuses_them():
    config = SchedulerConfig(max_num_seqs=1, max_num_batched_tokens=64, max_model_len=64, block_size=4, num_blocks=64)
    engine = Engine(Scheduler(config), InProcessExecutor(FakeRunner(), threaded=False), 1)
    with pytest.raises(ValueError, match="lora_request='a1' needs an engine with enable_lora"):
        engine.add(request("a", lora(1)))


class DeskMachine(RuleBasedStateMachine):
    """More adapters than there is room for, some of them bad, with aborts: nothing is lost, nothing is kept."""

    @initialize(max_loras=st.integers(1, 2), more=st.integers(0, 2))
    def start(self, max_loras, more):
        self.rig = Rig(max_loras + more, max_loras)
        self.num_added = 0
        self.open: set[str] = set()

    @rule(numbers=st.lists(st.integers(0, 6), min_size=1, max_size=5), length=st.integers(1, 6))
    def add(self, numbers, length):
        for number in numbers:
            adapter = None if number == 0 else lora(number, "/bad" if number == 6 else None)
            self.rig.engine.add(request(f"r{self.num_added}", adapter, length))
            self.open.add(f"r{self.num_added}")
            self.num_added += 1

    @rule(count=st.integers(1, 5))
    def step(self, count):
        for _ in range(count):
            self.close(self.rig.step())

    @rule(index=st.integers(0, 30))
    def abort(self, index):
        self.close(self.rig.engine.abort([f"r{index}"]))

    def close(self, outputs):
        for output in outputs:
            if output.finish_reason is not None:
                self.open.remove(output.request_id)

    @invariant()
    def consistent(self):
        if hasattr(self, "rig"):
            self.rig.engine.audit()

    def teardown(self):
        if hasattr(self, "rig"):
            self.open -= self.rig.run().keys()
            assert not self.open, "a request never ended"
            assert not self.rig.desk._pins
            self.rig.engine.shutdown()


TestDeskMachine = DeskMachine.TestCase
TestDeskMachine.settings = settings(max_examples=20, stateful_step_count=15, deadline=None, derandomize=True)
