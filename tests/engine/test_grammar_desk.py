"""Requests wait at the desk until their grammar is compiled; the engine goes on meanwhile."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from fake_worker import FakeRunner, expected

from octavo.config import SchedulerConfig
from octavo.distributed.executor import InProcessExecutor
from octavo.engine.engine import Engine
from octavo.engine.grammars import GrammarDesk
from octavo.protocol.outputs import TokenOutput
from octavo.protocol.request import Request
from octavo.protocol.sampling import SamplingParams
from octavo.protocol.structured import StructuredOutputsParams
from octavo.scheduler.scheduler import Scheduler

WISH = StructuredOutputsParams(regex="a")


class Matcher:
    def __init__(self) -> None:
        self.num_accepted = 0
        self.num_free = 0
        self.error = None

    def masks(self, draft_ids: Sequence[int]) -> list[bytes | None]:  # noqa: ARG002
        return [b"\xff"]

    def accept(self, token_ids: Iterable[int]) -> None:
        self.num_accepted += len(list(token_ids))


class Store:
    """Grammars as the desk uses them. "bad" does not compile, "broken" raises what nobody expects."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.known: set[str] = set()
        self.threads: set[int] = set()

    def find(self, request: Request) -> Any:
        return Matcher() if request.grammar in self.known else None

    def compile(self, request: Request) -> Any:
        grammar = request.grammar
        assert grammar is not None
        self.threads.add(threading.get_ident())
        assert self.open.wait(5)
        if grammar == "bad":
            raise ValueError("it is bad")
        if grammar == "broken":
            raise RuntimeError("a bug")
        self.known.add(grammar)
        return Matcher()


@pytest.fixture(params=[1, 2])
def rig(request: pytest.FixtureRequest) -> Any:
    depth, store = request.param, Store()
    config = SchedulerConfig(max_num_seqs=8, max_num_batched_tokens=16, max_model_len=64, block_size=4, num_blocks=65)
    desk: Any = GrammarDesk(lambda: store)  # type: ignore[arg-type, return-value]
    executor = InProcessExecutor(FakeRunner(), threaded=depth > 1)
    engine = Engine(Scheduler(config), executor, depth, grammars=desk)
    yield SimpleNamespace(engine=engine, store=store)
    store.open.set()
    engine.shutdown()


def make(name: str, prompt: list[int], grammar: str | None = None, structured: bool = True) -> Request:
    sampling = SamplingParams(max_tokens=6, seed=0, structured_outputs=WISH if structured else None)
    return Request(request_id=name, prompt_token_ids=prompt, sampling=sampling, max_tokens=6, grammar=grammar)


def run(engine: Engine) -> dict[str, list[TokenOutput]]:
    told: dict[str, list[TokenOutput]] = {}
    while engine.has_work:
        for output in engine.step():
            told.setdefault(output.request_id, []).append(output)
    engine.audit()
    return told


def tokens(outputs: list[TokenOutput]) -> list[int]:
    return [token for output in outputs for token in output.new_token_ids]


def test_others_run_to_their_end_while_a_grammar_is_compiled(rig: Any) -> None:
    rig.engine.add(make("slow", [1, 2], "g"))
    rig.engine.add(make("plain", [3, 4], structured=False))
    outputs: list[TokenOutput] = []
    while not outputs or outputs[-1].finish_reason is None:
        outputs += rig.engine.step()
    assert tokens(outputs) == expected([3, 4], 6)
    assert rig.engine.has_work
    assert rig.engine.step() == []  # waits a little, and says that nothing came
    rig.store.open.set()
    assert tokens(run(rig.engine)["slow"]) == expected([1, 2], 6)
    assert rig.store.threads != {threading.get_ident()}


def test_a_known_grammar_does_not_wait(rig: Any) -> None:
    rig.store.open.set()
    rig.engine.add(make("first", [1, 2], "g"))
    run(rig.engine)
    rig.store.open.clear()
    rig.engine.add(make("again", [1, 2], "g"))
    assert tokens(run(rig.engine)["again"]) == expected([1, 2], 6)


@pytest.mark.parametrize(("grammar", "words"), [("bad", "it is bad"), ("broken", "a bug")])
def test_what_does_not_compile_ends_its_request_only(rig: Any, grammar: str, words: str) -> None:
    rig.store.open.set()
    rig.engine.add(make("it", [1, 2], grammar))
    rig.engine.add(make("good", [3, 4], "g"))
    told = run(rig.engine)
    [end] = told["it"]
    assert (end.finish_reason, end.error) == ("error", words)
    assert tokens(told["good"]) == expected([3, 4], 6)


def test_one_that_cannot_run_is_told_after_its_compilation(rig: Any) -> None:
    rig.store.open.set()
    rig.engine.add(make("long", [1] * 64, "g"))
    [end] = run(rig.engine)["long"]
    assert end.finish_reason == "error"
    assert "max_model_len=64" in (end.error or "")


def test_abort_at_the_desk(rig: Any) -> None:
    rig.engine.add(make("a", [1, 2], "g"))
    rig.engine.add(make("b", [1, 2], "h"))
    assert [(o.request_id, o.finish_reason) for o in rig.engine.abort(["b", "a", "c", "a"])] == [
        ("b", "abort"),
        ("a", "abort"),
    ]
    assert not rig.engine.has_work
    rig.store.open.set()
    assert run(rig.engine) == {}


def test_refusals(rig: Any) -> None:
    with pytest.raises(ValueError, match="without a grammar"):
        rig.engine.add(make("a", [1, 2]))
    rig.engine.add(make("a", [1, 2], "g"))
    with pytest.raises(ValueError, match="request_id='a' is in use"):
        rig.engine.add(make("a", [1, 2], "g"))
    config = SchedulerConfig(max_num_seqs=1, max_num_batched_tokens=8, max_model_len=8, block_size=4, num_blocks=9)
    bare = Engine(Scheduler(config), InProcessExecutor(FakeRunner(), threaded=False), 1)
    with pytest.raises(ValueError, match="needs a tokenizer"):
        bare.add(make("a", [1, 2], "g"))


def test_opened_ahead_the_first_grammar_opens_nothing() -> None:
    opened: list[int] = []
    store = Store()
    store.open.set()

    def open_grammars() -> Any:
        opened.append(threading.get_ident())
        return store

    desk = GrammarDesk(open_grammars)
    try:
        desk.open()
        desk.open()
        desk.take(make("a", [1, 2], "g"))
        while not (ready := desk.ready(idle=True)):
            pass
        assert ready[0][0].request_id == "a"
        assert len(opened) == 1
        assert opened[0] != threading.get_ident()
    finally:
        desk.shutdown()
