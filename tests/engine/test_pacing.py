"""When the next step must be on its way: late enough for others to join it, and never so late that the device waits."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field

from fake_worker import FakeRunner, expected
from hypothesis import given
from hypothesis import strategies as st

from octavo.config import SchedulerConfig
from octavo.engine.engine import Engine
from octavo.engine.pacing import Pacer
from octavo.engine.service import EngineService
from octavo.protocol.messages import AddRequest, Control, FromEngine, Outputs, Ready, ToEngine
from octavo.protocol.plan import StepPlan, StepResult
from octavo.protocol.request import Request
from octavo.protocol.sampling import SamplingParams
from octavo.scheduler.scheduler import Scheduler

# Of a step of r rows: 4 ms for the weights, and so much for each row.
_BASE, _ROW, _HOST = 0.004, 0.0001, 0.0005


def seconds(num_rows: int) -> float:
    return _BASE + _ROW * num_rows


@given(st.lists(st.integers(1, 1000), min_size=2, max_size=20), st.floats(0, 1e-3))
def test_a_step_is_submitted_before_the_one_that_runs_ends(rows: list[int], host: float) -> None:
    """Whatever the sizes that follow each other: the wait, and what the host then takes, fit into the step."""
    pacer, now = Pacer(), 0.0
    for _ in range(200):
        pacer.submitted(True, host, now, alone=False)
    pacer.finished(rows[0], True, seconds(rows[0]), now)
    for before, running in itertools.pairwise(rows):
        began = now
        spare = pacer.spare(running, now)
        assert spare + host <= seconds(running)
        if before == running:
            assert spare > seconds(running) - 2 * host - 0.001
        now = began + seconds(running)
        pacer.finished(running, True, seconds(running), now)


def test_nothing_is_known_without_a_measured_decode_step() -> None:
    pacer = Pacer()
    pacer.submitted(True, 0.0, 0.0, alone=True)
    assert pacer.spare(1, 0.0) == 0
    pacer.finished(1, True, None, 1.0)
    pacer.finished(1, False, 0.1, 1.0)
    assert pacer.spare(1, 1.0) == 0
    pacer.finished(1, True, 0.005, 1.0)
    assert 0.004 < pacer.spare(1, 1.0) < 0.005
    assert pacer.spare(1, 1.005) == 0
    # What runs alone began when it was submitted, not when the last step ended.
    pacer.submitted(False, 9.0, 2.0, alone=True)
    assert 0.004 < pacer.spare(1, 2.0) < 0.005


@dataclass
class Device:
    """Runs steps one after the other on a clock of its own making, as an Executor. The host's calls take no time."""

    now: float = 0.0
    free_at: float = 0.0
    waited: float = 0.0  # how long it had nothing to do, between steps
    plans: list[StepPlan] = field(default_factory=list)
    runner: FakeRunner = field(default_factory=FakeRunner)

    def submit(self, plan: StepPlan) -> Running:
        if self.plans:
            self.waited += max(0.0, self.now - self.free_at)
        self.plans.append(plan)
        began = max(self.now, self.free_at)
        self.free_at = began + seconds(len(plan.rows))
        return Running(self, self.runner.execute(plan), self.free_at - began, self.free_at)

    def warm_up(self) -> bool:
        return False

    def shutdown(self) -> None:
        pass


@dataclass
class Running:
    device: Device
    done: StepResult
    took: float
    at: float

    def result(self) -> StepResult:
        self.device.now = max(self.device.now, self.at)
        return StepResult(self.done.step_id, self.done.rows, self.took)


@dataclass
class TimedChannel:
    """An EngineChannel whose messages come at given times of the device's clock, in order."""

    device: Device
    coming: list[tuple[float, ToEngine]]
    sent: list[FromEngine] = field(default_factory=list)

    def poll(self, timeout: float | None) -> bool:
        if timeout is None and not self.coming:
            self.coming.append((self.device.now, Control(9, "shutdown")))
        until = math.inf if timeout is None else self.device.now + timeout
        if self.coming and self.coming[0][0] <= until:
            self.device.now = max(self.device.now, self.coming[0][0])
            return True
        self.device.now = until
        return False

    def receive(self) -> tuple[bytes, ToEngine] | None:
        if self.coming and self.coming[0][0] <= self.device.now:
            return b"a", self.coming.pop(0)[1]
        return None

    def send(self, identity: bytes, message: FromEngine) -> bool:  # noqa: ARG002
        self.sent.append(message)
        return True


def add(name: str, count: int) -> AddRequest:
    sampling = SamplingParams(max_tokens=count, seed=0)
    return AddRequest(Request(request_id=name, prompt_token_ids=[1, 2, 3], sampling=sampling, max_tokens=count))


def test_a_request_joins_the_next_step_and_the_device_never_waits() -> None:
    """It comes while a step runs: the very next one computes its prompt, not the one after."""
    config = SchedulerConfig(max_num_seqs=8, max_num_batched_tokens=64, max_model_len=64, block_size=4, num_blocks=65)
    device = Device()
    channel = TimedChannel(device, [(0.0, add("1", 40)), (0.0501, add("2", 5))])
    engine = Engine(Scheduler(config), device, 2, clock=lambda: device.now)
    ready = Ready(max_model_len=64, max_num_seqs=8, num_blocks=65, block_size=4, vocab_size=1000)
    EngineService(engine, channel, ready, lambda: device.now).run()  # type: ignore[arg-type]
    first = next(index for index, plan in enumerate(device.plans) if len(plan.rows) == 2)
    assert (first - 1) * seconds(1) <= 0.0501 < first * seconds(1)
    assert device.waited == 0
    outputs = [o for message in channel.sent if isinstance(message, Outputs) for o in message.outputs]
    assert [t for o in outputs if o.request_id == "2" for t in o.new_token_ids] == expected([1, 2, 3], 5)
