"""The service between socket and engine: who is told what, and how often."""

from __future__ import annotations

from dataclasses import dataclass, field

from fake_worker import FakeRunner, expected

from octavo.config import SchedulerConfig
from octavo.distributed.executor import InProcessExecutor
from octavo.engine.engine import Engine
from octavo.engine.service import EngineService
from octavo.protocol.messages import AbortRequests, AddRequest, Control, FromEngine, Outputs, Ready, ToEngine
from octavo.protocol.outputs import SchedulerStats
from octavo.protocol.request import Request
from octavo.protocol.sampling import SamplingParams
from octavo.scheduler.scheduler import Scheduler

READY = Ready(max_model_len=64, max_num_seqs=8, num_blocks=65, block_size=4, vocab_size=1000)


@dataclass
class FakeChannel:
    """Has an EngineChannel's methods. An inbox that is empty when the engine has nothing to do says "shutdown"."""

    inbox: list[tuple[bytes, ToEngine]]
    gone: set[bytes] = field(default_factory=set)
    sent: list[tuple[bytes, FromEngine]] = field(default_factory=list)
    polls: list[float | None] = field(default_factory=list)

    def poll(self, timeout: float | None) -> bool:
        self.polls.append(timeout)
        if not self.inbox and timeout is None:
            self.inbox.append((b"end", Control(9, "shutdown")))
        return bool(self.inbox)

    def receive(self) -> tuple[bytes, ToEngine] | None:
        return self.inbox.pop(0) if self.inbox else None

    def send(self, identity: bytes, message: FromEngine) -> bool:
        if identity in self.gone:
            return False
        self.sent.append((identity, message))
        return True

    def outputs(self, identity: bytes) -> list[Outputs]:
        return [message for to, message in self.sent if to == identity and isinstance(message, Outputs)]


class CountingEngine(Engine):
    num_stats = 0
    num_unprepared = 2
    channel: FakeChannel

    def warm_up(self) -> bool:
        assert not self.channel.sent, "somebody was answered before"
        prepared = self.num_unprepared > 0
        self.num_unprepared -= prepared
        return prepared

    def stats(self) -> SchedulerStats:
        self.num_stats += 1
        return super().stats()


def hello(identity: bytes) -> tuple[bytes, ToEngine]:
    return identity, Control(0, "hello")


def add(identity: bytes, name: str, count: int) -> tuple[bytes, ToEngine]:
    sampling = SamplingParams(max_tokens=count, seed=0)
    return identity, AddRequest(
        Request(request_id=name, prompt_token_ids=[1, 2, 3], sampling=sampling, max_tokens=count)
    )


def run(channel: FakeChannel, step_seconds: float = 0.0) -> CountingEngine:
    """Serve until all is done, on a clock by which each message sent or held back took `step_seconds`."""
    config = SchedulerConfig(max_num_seqs=8, max_num_batched_tokens=64, max_model_len=64, block_size=4, num_blocks=65)
    engine = CountingEngine(Scheduler(config), InProcessExecutor(FakeRunner(), threaded=False), 1)
    engine.channel = channel
    now = 0.0

    def clock() -> float:
        nonlocal now
        now += step_seconds
        return now

    EngineService(engine, channel, READY, clock).run()  # type: ignore[arg-type]
    return engine


def tokens(messages: list[Outputs]) -> list[int]:
    return [token for message in messages for output in message.outputs for token in output.new_token_ids]


def test_each_front_end_hears_of_its_own_requests_and_all_of_the_end() -> None:
    channel = FakeChannel([hello(b"a"), hello(b"b"), hello(b"idle"), add(b"a", "1", 5), add(b"b", "2", 9)])
    run(channel)
    assert tokens(channel.outputs(b"a")) == expected([1, 2, 3], 5)
    assert tokens(channel.outputs(b"b")) == expected([1, 2, 3], 9)
    assert tokens(channel.outputs(b"idle")) == []
    for identity in (b"a", b"b", b"idle"):
        last = channel.outputs(identity)[-1].stats
        assert (last.num_running, last.num_waiting, last.generation_tokens_total) == (0, 0, 14)


def test_step_sizes_told_add_up_over_front_ends() -> None:
    channel = FakeChannel([hello(b"a"), hello(b"b"), add(b"a", "1", 5), add(b"b", "2", 9)])
    run(channel)
    sizes = [message.num_step_tokens for identity in (b"a", b"b") for message in channel.outputs(identity)]
    assert sum(sizes) == (3 + 4) + (3 + 8)
    assert sum(size > 0 for size in sizes) == 9


def test_an_abort_tells_of_no_step() -> None:
    channel = FakeChannel([hello(b"a"), add(b"a", "1", 9), (b"a", AbortRequests(["1"])), add(b"a", "2", 1)])
    run(channel)
    assert [output.finish_reason for message in channel.outputs(b"a") for output in message.outputs] == [
        "abort",
        "length",
    ]
    assert sum(message.num_step_tokens for message in channel.outputs(b"a")) == 3


def test_statistics_are_taken_now_and_then() -> None:
    quick, slow = (FakeChannel([hello(b"a"), hello(b"idle"), add(b"a", "1", 50)]) for _ in range(2))
    assert run(quick, step_seconds=0.001).num_stats <= 4
    assert run(slow, step_seconds=0.2).num_stats >= 50
    assert len(quick.outputs(b"a")) == 50
    # A front end without requests hears how it stands, too.
    assert len(slow.outputs(b"idle")) == 50
    counts = [message.stats.generation_tokens_total for message in slow.outputs(b"idle")]
    assert counts == list(range(1, 51))


def test_a_front_end_that_is_gone_leaves_nothing_running() -> None:
    channel = FakeChannel([hello(b"a"), hello(b"b"), add(b"a", "1", 9), add(b"b", "2", 9)], gone={b"b"})
    engine = run(channel)
    assert tokens(channel.outputs(b"a")) == expected([1, 2, 3], 9)
    assert engine.stats().num_free_blocks == engine.stats().num_blocks


def test_everything_is_prepared_before_anybody_is_answered() -> None:
    channel = FakeChannel([hello(b"a")])
    assert run(channel).num_unprepared == 0
    assert channel.sent[0] == (b"a", READY)
    assert channel.polls == [1.0, 1.0, None]  # in the quiet second nobody came: grammars are made ready
