"""Sequences with a constraint: one step at a time, their mask in the plan, and state that outlives preemption."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import pytest
from scheduler_rig import EOS, FakeWorker, config, make_request

from octavo.protocol.outputs import TokenOutput
from octavo.protocol.plan import StepPlan, StepResult
from octavo.protocol.structured import StructuredOutputsParams
from octavo.scheduler.audit import ConsistencyError
from octavo.scheduler.scheduler import Scheduler

WISH = StructuredOutputsParams(regex="a")


@dataclass
class Recorder:
    """A constraint whose mask spells what it has accepted, from the token after the first `num_unmasked` on."""

    fails_after: int = 10**6
    num_unmasked: int = 0
    accepted: list[int] = field(default_factory=list)

    @property
    def num_free(self) -> int:
        return max(0, self.num_unmasked - len(self.accepted))

    def masks(self, draft_ids: list[int]) -> list[bytes | None]:
        return [
            None if n < self.num_free else bytes([*self.accepted, *draft_ids[:n], 255])
            for n in range(len(draft_ids) + 1)
        ]

    @property
    def num_accepted(self) -> int:
        return len(self.accepted)

    @property
    def error(self) -> str | None:
        return "it is too complex" if len(self.accepted) >= self.fails_after else None

    def accept(self, token_ids: Iterable[int]) -> None:
        self.accepted += token_ids


@dataclass
class Pipeline:
    """A scheduler with `depth` steps in flight over a worker that computes at once."""

    depth: int
    num_blocks: int = 33
    num_drafts: int = 0
    plans: list[StepPlan] = field(default_factory=list)
    told: dict[str, list[TokenOutput]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        drafts = {"num_speculative_tokens": self.num_drafts, "adaptive_speculation": False}
        made = config(num_blocks=self.num_blocks, **drafts)
        self.scheduler, self.worker = Scheduler(made), FakeWorker(made.block_size)
        self.in_flight: list[tuple[StepPlan, StepResult]] = []

    def step(self) -> None:
        while len(self.in_flight) < self.depth and (plan := self.scheduler.schedule(0.0)) is not None:
            self.plans.append(plan)
            self.in_flight.append((plan, self.worker.execute(plan)))
            self.scheduler.audit()
        plan, result = self.in_flight.pop(0)
        for output in self.scheduler.commit(plan, result):
            self.told.setdefault(output.request_id, []).append(output)
        self.scheduler.audit()

    def run(self) -> None:
        while self.scheduler.has_unfinished() or self.in_flight:
            self.step()

    def tokens(self, name: str) -> list[int]:
        return [token for output in self.told[name] for token in output.new_token_ids]


def alone(prompt: list[int], max_tokens: int) -> list[int]:
    pipeline = Pipeline(1)
    pipeline.scheduler.add(make_request("a", prompt, max_tokens, ignore_eos=True))
    pipeline.run()
    return pipeline.tokens("a")


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_a_step_is_planned_when_the_token_before_it_is_known(depth: int) -> None:
    pipeline, constraint = Pipeline(depth), Recorder()
    pipeline.scheduler.add(make_request("free", [1, 2, 3], 12, ignore_eos=True))
    pipeline.scheduler.add(make_request("bound", [4, 5], 8), constraint)
    pipeline.scheduler.add(make_request("late", [6, 7], 12, ignore_eos=True))
    pipeline.run()
    masks = [row.masks[0] for plan in pipeline.plans for row in plan.rows if row.masks is not None]
    tokens = pipeline.tokens("bound")
    # One mask a token, each made when all tokens before were known.
    assert masks == [bytes([*tokens[:n], 255]) for n in range(len(tokens))]
    assert pipeline.tokens("free") == alone([1, 2, 3], 12)
    assert pipeline.tokens("late") == alone([6, 7], 12)


def test_the_others_go_on_meanwhile() -> None:
    pipeline = Pipeline(2)
    pipeline.scheduler.add(make_request("bound", [4, 5], 8, min_tokens=8), Recorder())
    pipeline.scheduler.add(make_request("free", [1, 2, 3], 8, ignore_eos=True))
    pipeline.step()
    assert [len(plan.rows) for plan in pipeline.plans] == [2, 1]
    assert [row.masks is None for row in pipeline.plans[1].rows] == [True]


def test_steps_overlap_while_no_mask_is_needed() -> None:
    pipeline, constraint = Pipeline(2), Recorder(num_unmasked=3)
    pipeline.scheduler.add(make_request("bound", [4, 5], 6, ignore_eos=True), constraint)
    in_flight = []
    while pipeline.scheduler.has_unfinished():
        pipeline.step()
        in_flight.append(len(pipeline.in_flight))
    tokens = pipeline.tokens("bound")
    assert in_flight == [1, 1, 0, 0, 0, 0]  # after each commit: tokens 0, 1 and 2 overlap, each later one waits
    assert tokens == alone([4, 5], 6)  # without a grammar, ignore_eos is the sampler's
    masks = [row.masks and row.masks[0] for plan in pipeline.plans for row in plan.rows]
    assert masks == [None, None, None, *(bytes([*tokens[:n], 255]) for n in range(3, 6))]


def test_alone_at_depth_2_nothing_is_planned_before_the_commit() -> None:
    scheduler = Scheduler(config())
    scheduler.add(make_request("bound", [4, 5], 8), Recorder())
    assert scheduler.schedule(0.0) is not None
    assert scheduler.schedule(0.0) is None


def test_a_chunked_prompt_has_its_mask_in_the_chunk_that_samples() -> None:
    pipeline = Pipeline(2)
    pipeline.scheduler.add(make_request("bound", [1 + i % 9 for i in range(90)], 2), Recorder())
    pipeline.step()
    assert [[row.masks for row in plan.rows] for plan in pipeline.plans] == [[None], [[b"\xff"]]]


@pytest.mark.parametrize("depth", [1, 2])
def test_preemption_keeps_the_state_and_the_tokens(depth: int) -> None:
    prompts = {f"r{i}": [i + 1] * 4 for i in range(4)}
    expected = {name: alone(prompt, 16) for name, prompt in prompts.items()}
    pipeline = Pipeline(depth, num_blocks=8)
    constraints = {name: Recorder() for name in prompts}
    for name, prompt in prompts.items():
        # An end-of-sequence token ends a constrained output, also under ignore_eos.
        pipeline.scheduler.add(
            make_request(name, prompt, 16, ignore_eos=True, structured_outputs=WISH), constraints[name]
        )
    pipeline.run()
    assert pipeline.scheduler.stats().num_preemptions_total > 0
    for name, tokens in expected.items():
        own = tokens[: tokens.index(EOS) + 1] if EOS in tokens else tokens
        assert pipeline.tokens(name) == own
        assert constraints[name].accepted == own[:-1]


def test_an_end_of_sequence_token_ends_it_whatever_min_tokens_and_ignore_eos_say() -> None:
    prompt = next([n, m] for n in range(9) for m in range(9) if alone([n, m], 8).count(EOS))
    pipeline = Pipeline(1)
    pipeline.scheduler.add(make_request("a", prompt, 8, ignore_eos=True, structured_outputs=WISH), Recorder())
    pipeline.run()
    assert pipeline.tokens("a")[-1] == EOS
    last = pipeline.told["a"][-1]
    assert (last.finish_reason, last.stop_reason) == ("stop", None)


def test_a_constraint_that_fails_ends_its_request_only() -> None:
    pipeline = Pipeline(2)
    pipeline.scheduler.add(make_request("bound", [4, 5], 9, min_tokens=9), Recorder(fails_after=2))
    pipeline.scheduler.add(make_request("free", [1, 2, 3], 6, ignore_eos=True))
    pipeline.run()
    last = pipeline.told["bound"][-1]
    assert (last.finish_reason, last.error) == ("error", "it is too complex")
    assert pipeline.tokens("free") == alone([1, 2, 3], 6)


def test_the_audit_notices_a_constraint_that_is_out_of_step() -> None:
    scheduler, constraint = Scheduler(config()), Recorder()
    scheduler.add(make_request("bound", [4, 5], 8), constraint)
    scheduler.schedule(0.0)
    constraint.accepted.append(7)
    with pytest.raises(ConsistencyError, match="constraint of 'bound'"):
        scheduler.audit()


@pytest.mark.parametrize("depth", [1, 2])
def test_each_guess_has_the_mask_of_what_comes_before_it(depth: int) -> None:
    pipeline = Pipeline(depth, num_drafts=3)
    pipeline.scheduler.add(make_request("bound", [4, 5], 20, ignore_eos=True), Recorder())
    pipeline.scheduler.add(make_request("free", [1, 2, 3], 20, ignore_eos=True))
    pipeline.run()
    tokens = pipeline.tokens("bound")
    assert tokens == alone([4, 5], 20)
    assert pipeline.tokens("free") == alone([1, 2, 3], 20)
    rows = [row for plan in pipeline.plans for row in plan.rows if row.masks is not None]
    assert sum(row.num_drafts for row in rows) > 0
    for row in rows:
        assert len(row.masks) == row.num_drafts + 1
        start = row.start + row.length - row.num_drafts - 2  # output tokens before the first that is sampled
        for index, mask in enumerate(row.masks):
            assert len(mask) == start + index + 1
            assert mask[:start] == bytes(tokens[:start])


def test_guesses_wait_for_what_has_no_mask_to_end() -> None:
    """While no mask is needed several steps are in flight, and their guesses stay within it."""
    pipeline = Pipeline(2, num_drafts=3)
    pipeline.scheduler.add(make_request("bound", [4, 5], 20, ignore_eos=True), Recorder(num_unmasked=9))
    pipeline.run()
    tokens = pipeline.tokens("bound")
    assert tokens == alone([4, 5], 20)
    masks = [mask for plan in pipeline.plans for row in plan.rows for mask in row.masks or () if mask is not None]
    assert min(len(mask) for mask in masks) == 10
