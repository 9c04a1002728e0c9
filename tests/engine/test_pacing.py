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
    pacer.finished(rows[0], rows[0], True, seconds(rows[0]), now)
    for before, running in itertools.pairwise(rows):
        began = now
        spare = pacer.spare(running, now)
        assert spare + host <= seconds(running)
        if before == running:
            assert spare > seconds(running) - 2 * host - 0.001
        now = began + seconds(running)
        pacer.finished(running, running, True, seconds(running), now)


def test_nothing_is_known_without_a_measured_decode_step() -> None:
    pacer = Pacer()
    pacer.submitted(True, 0.0, 0.0, alone=True)
    assert pacer.spare(1, 0.0) == 0
    pacer.finished(1, 1, True, None, 1.0)
    pacer.finished(1, 9, False, 0.1, 1.0)
    assert pacer.spare(1, 1.0) == 0
    pacer.finished(1, 1, True, 0.005, 1.0)
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
    preparing: list[float] = field(default_factory=list)  # host's seconds for what is yet to be prepared, last first
    plans: list[StepPlan] = field(default_factory=list)
    runner: FakeRunner = field(default_factory=FakeRunner)

    def submit(self, plan: StepPlan) -> Running:
        if self.plans:
            self.waited += max(0.0, self.now - self.free_at)
        self.plans.append(plan)
        began = max(self.now, self.free_at)
        self.free_at = began + seconds(plan.num_tokens)
        return Running(self, self.runner.execute(plan), self.free_at - began, self.free_at)

    def warm_up(self) -> bool:
        if self.preparing:
            self.now += self.preparing.pop()
        return bool(self.preparing)

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


def run_prompts(device: Device, lengths: list[int], most: int) -> None:
    """All at once, in steps of up to so many tokens; then each decodes a little."""
    config = SchedulerConfig(
        max_num_seqs=16, max_num_batched_tokens=most, max_model_len=4096, block_size=16, num_blocks=8192
    )
    engine = Engine(Scheduler(config), device, 2, clock=lambda: device.now)
    sampling = SamplingParams(max_tokens=4, seed=0)
    for index, length in enumerate(lengths):
        prompt = [index + 1] * length
        engine.add(Request(request_id=str(index), prompt_token_ids=prompt, sampling=sampling, max_tokens=4))
    while engine.has_work:
        engine.step()


@given(
    st.lists(st.integers(1, 4000), min_size=1, max_size=12),
    st.sampled_from([64, 512, 2048]),
    st.lists(st.floats(0.001, 0.05), min_size=1, max_size=30),
)
def test_preparing_makes_no_device_wait(lengths: list[int], most: int, preparing: list[float]) -> None:
    """As long as each preparation takes no longer than was to be expected."""
    alone, device = Device(), Device(preparing=sorted(preparing))
    run_prompts(alone, lengths, most)
    run_prompts(device, lengths, most)
    assert device.waited <= alone.waited + 1e-9
    assert [plan.num_tokens for plan in device.plans] == [plan.num_tokens for plan in alone.plans]


def test_long_prompts_leave_time_to_prepare() -> None:
    """Steps of 2,048 tokens take 0.2 s, all but the last two of which a host could use for what takes 0.04."""
    device = Device(preparing=[0.04] * 20)
    run_prompts(device, [2048] * 12, 2048)
    assert (device.preparing, device.waited) == ([], 0)
    short = Device(preparing=[0.04] * 20)
    run_prompts(short, [128] * 12, 128)
    assert len(short.preparing) == 20
