"""A worker without a model, and a ledger that holds the scheduler to what an endless machine would say.

The worker keeps a simulated KV memory and computes each next token from the whole prefix as it READS it there,
so that any block shared wrongly, freed too early or never filled changes the output.
"""

from __future__ import annotations

import hashlib
from collections import deque
from dataclasses import dataclass, field
from typing import NamedTuple

from octavo.config import SchedulerConfig
from octavo.protocol.lora import LoRARequest
from octavo.protocol.outputs import TokenOutput
from octavo.protocol.plan import NO_ADAPTER, NULL_BLOCK, PlanRow, RowResult, StepPlan, StepResult, TokenLogprobs
from octavo.protocol.request import Request
from octavo.protocol.sampling import SamplingParams
from octavo.scheduler.prefix_cache import HashFunction, sha256
from octavo.scheduler.scheduler import Scheduler

VOCAB = 20
EOS = 19
GARBAGE = 77  # what a model says that reads a KV cache of someone else


def hash8(data: bytes) -> bytes:
    """A hash that collides all the time."""
    return hashlib.sha256(data).digest()[:1]


def hash0(data: bytes) -> bytes:  # noqa: ARG001
    """A hash that always collides."""
    return b""


def make_request(name: str, prompt: list[int], max_tokens: int = 4, **options: object) -> Request:
    """A request; options that SamplingParams has go there."""
    sampling_names = set(SamplingParams.__struct_fields__)
    sampling = {key: value for key, value in options.items() if key in sampling_names}
    rest = {key: value for key, value in options.items() if key not in sampling_names}
    return Request(
        request_id=name,
        prompt_token_ids=prompt,
        sampling=SamplingParams(max_tokens=max_tokens, **sampling),
        max_tokens=max_tokens,
        eos_token_ids=(EOS,),
        **rest,
    )


def adapter_request(number: int) -> LoRARequest:
    return LoRARequest(f"a{number}", number, f"/a{number}")


def adapter_digest(request: Request) -> bytes | None:
    """Adapters 1 and 9 hold the same weights."""
    return None if request.lora is None else hashlib.sha256(bytes([request.lora.lora_int_id % 8])).digest()


def next_token(prefix: list[int], num_prompt: int, sampling: SamplingParams, adapter: int = 0) -> int:
    """The model: a fixed function of the prefix and the adapter's weights, end tokens masked until min_tokens."""
    token = hash((adapter % 8, *prefix)) % VOCAB
    ends = set(sampling.stop_token_ids or ()) | {EOS}
    while len(prefix) - num_prompt < sampling.min_tokens and token in ends:
        token = (token + 1) % VOCAB
    return token


def logprobs_at(prefix: list[int], token: int) -> TokenLogprobs:
    return TokenLogprobs([token, hash(tuple(prefix)) % VOCAB], [-1.0, -0.5], len(prefix))


def config(**changes: object) -> SchedulerConfig:
    """A small machine: 32 blocks of 4 tokens."""
    values = {
        "max_num_seqs": 4,
        "max_num_batched_tokens": 64,
        "max_model_len": 128,
        "block_size": 4,
        "num_blocks": 33,
    }
    return SchedulerConfig(**(values | changes))


def rows(plan: StepPlan) -> list[tuple[int, int, int, bool]]:
    """(slot, start, length, samples) of each row."""
    return [(row.slot, row.start, row.length, row.samples) for row in plan.rows]


class Expected(NamedTuple):
    output: list[int]
    logprobs: list[TokenLogprobs]
    prompt_logprobs: list[TokenLogprobs] | None
    finish_reason: str
    stop_reason: int | None


def expected(request: Request) -> Expected:
    """What a machine without limits, batches or caches answers."""
    sampling, tokens = request.sampling, list(request.prompt_token_ids)
    num_prompt = len(tokens)
    adapter = 0 if request.lora is None else request.lora.lora_int_id
    prompt_logprobs = [logprobs_at(tokens[:i], tokens[i]) for i in range(1, num_prompt)]
    logprobs: list[TokenLogprobs] = []
    reason, stop_reason = "length", None
    while len(tokens) < num_prompt + request.max_tokens:
        token = next_token(tokens, num_prompt, sampling, adapter)
        logprobs.append(logprobs_at(tokens, token))
        tokens.append(token)
        if len(tokens) - num_prompt < sampling.min_tokens:
            continue
        if token == EOS and not sampling.ignore_eos:
            reason = "stop"
            break
        if token in (sampling.stop_token_ids or ()):
            reason, stop_reason = "stop", token
            break
    wanted = prompt_logprobs if sampling.prompt_logprobs is not None else None
    return Expected(tokens[num_prompt:], logprobs, wanted, reason, stop_reason)


class Entry(NamedTuple):
    """One KV entry: the token and position it was computed for, and all that stood before it."""

    token: int
    position: int
    prefix: int


BAD = Entry(-1, -1, -1)


@dataclass
class Slot:
    tokens: list[int]
    table: list[int]
    num_prompt: int
    sampling: SamplingParams
    adapter_slot: int = NO_ADAPTER
    drafts: list[int] = field(default_factory=list)


class Span(NamedTuple):
    """What a row computes in truth: the positions, and how many of the last ones are guesses."""

    start: int
    end: int
    num_drafts: int


@dataclass
class FakeWorker:
    """Executes plans in order: first every row writes its KV, then every row reads its whole prefix."""

    block_size: int
    slots: dict[int, Slot] = field(default_factory=dict)
    memory: dict[tuple[int, int], Entry] = field(default_factory=dict)
    adapters: dict[int, int] = field(default_factory=dict)  # by slot: the id that lies there

    def execute(self, plan: StepPlan, broken: bool = False) -> StepResult:
        """broken: the step raises half-way: slots are up to date, what it wrote is garbage, and no result counts."""
        self.adapters |= dict(plan.adapters)
        for new in plan.new_sequences:
            # Not copied: the lists of a plan are the worker's, and the scheduler must not notice.
            self.slots[new.slot] = Slot(
                new.token_ids, new.block_table, new.num_prompt_tokens, new.sampling, new.adapter_slot
            )
        spans = []
        for row in plan.rows:
            self.slots[row.slot].table += row.new_block_ids
            spans.append(self._span(row))
            self._write(row, spans[-1], broken)
        wanted = plan.drafts or [0] * len(plan.rows)
        rows = [self._read_and_sample(row, span, count) for row, span, count in zip(plan.rows, spans, wanted)]
        return StepResult(plan.step_id, rows, seconds=0.01 + 0.001 * sum(span.end - span.start for span in spans))

    def _span(self, row: PlanRow) -> Span:
        """The plan's own where it knows better, else what follows from the tokens that came true."""
        slot = self.slots[row.slot]
        if not row.samples:
            return Span(row.start, row.start + row.length, 0)
        count = min(row.num_drafts, len(slot.drafts))
        start = len(slot.tokens) - (row.length - row.num_drafts)
        assert start <= row.start
        return Span(start, len(slot.tokens) + count, count)

    def _adapter(self, slot: Slot) -> int:
        return 0 if slot.adapter_slot == NO_ADAPTER else self.adapters[slot.adapter_slot]

    def _address(self, slot: Slot, position: int) -> tuple[int, int]:
        block = slot.table[position // self.block_size]
        assert block != NULL_BLOCK
        return block, position % self.block_size

    def _write(self, row: PlanRow, span: Span, broken: bool) -> None:
        slot = self.slots[row.slot]
        tokens = slot.tokens + slot.drafts
        for position in range(span.start, span.end):
            token = tokens[position]
            before = (
                self.memory.get(self._address(slot, position - 1), BAD)
                if position
                else Entry(0, -1, self._adapter(slot) % 8)
            )
            good = not broken and before != BAD
            entry = Entry(token, position, hash((before.prefix, token))) if good else BAD
            self.memory[self._address(slot, position)] = entry

    def _read_and_sample(self, row: PlanRow, span: Span, num_wanted: int) -> RowResult:
        slot = self.slots[row.slot]
        read = [self.memory.get(self._address(slot, position), BAD) for position in range(span.end)]
        adapter = self._adapter(slot)
        prefix, good = adapter % 8, []
        for position, entry in enumerate(read):
            prefix = hash((prefix, entry.token))
            good.append(entry.position == position and entry.prefix == prefix and (not good or good[-1]))
        tokens = [entry.token for entry in read]
        prompt_logprobs = None
        if slot.sampling.prompt_logprobs is not None:
            positions = range(span.start + 1, min(span.end + 1, slot.num_prompt))
            prompt_logprobs = [logprobs_at(tokens[:i], slot.tokens[i]) for i in positions]
        if not row.samples:
            return RowResult([], prompt_logprobs=prompt_logprobs)
        drafts, slot.drafts = slot.drafts[: span.num_drafts], []
        sampled: list[int] = []
        logprobs: list[TokenLogprobs] = []
        for end in range(span.end - span.num_drafts, span.end + 1):
            if row.masks is not None:
                assert len(row.masks) == row.num_drafts + 1
            token = next_token(tokens[:end], slot.num_prompt, slot.sampling, adapter) if good[end - 1] else GARBAGE
            # A row that is computed again must sample at the position it was planned for.
            assert end <= len(slot.tokens)
            slot.tokens[end:] = [token]
            sampled.append(token)
            logprobs.append(logprobs_at(tokens[:end], token))
            if len(sampled) > len(drafts) or token != drafts[len(sampled) - 1]:
                break
        slot.drafts = self._guess(slot, adapter, num_wanted)
        return RowResult(sampled, logprobs, prompt_logprobs, draft_ids=slot.drafts.copy())

    @staticmethod
    def _guess(slot: Slot, adapter: int, num_wanted: int) -> list[int]:
        """Up to so many guesses, some of which come true."""
        tokens = slot.tokens.copy()
        luck = hash((7, *tokens)) % 97
        for index in range(num_wanted - luck % (num_wanted + 1) // 2):
            right = next_token(tokens, slot.num_prompt, slot.sampling, adapter)
            tokens.append(right if luck % (index + 2) else (right + 1) % VOCAB)
        return tokens[len(slot.tokens) :]


@dataclass
class Account:
    """What one request has been told so far."""

    request: Request
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] | None = None
    last: TokenOutput | None = None


class Rig:
    """A scheduler and its worker, `depth` steps deep, checked after every call."""

    def __init__(self, config: SchedulerConfig, depth: int = 1, hash_function: HashFunction = sha256) -> None:
        self.config = config
        self.depth = depth
        self.scheduler = Scheduler(config, hash_function)
        self.scheduler._kv.cache._secret = b"the same in each run, so that failures can be replayed"
        self.worker = FakeWorker(config.block_size)
        self.in_flight: deque[tuple[StepPlan, StepResult | None, set[int]]] = deque()
        self.accounts: dict[str, Account] = {}
        self.plans: list[StepPlan] = []
        self.now = 0.0

    @property
    def capacity(self) -> int:
        """The most tokens of one request that can ever be computed."""
        config = self.config
        bounds = [(config.num_blocks - 1) * config.block_size, config.max_model_len - 1]
        return min(bounds if config.enable_chunked_prefill else [*bounds, config.max_num_batched_tokens])

    @property
    def unfinished(self) -> list[str]:
        return [name for name, account in self.accounts.items() if account.last is None]

    def add(self, request: Request) -> None:
        self.scheduler.add(request, adapter_digest=adapter_digest(request))
        self.accounts[request.request_id] = Account(request)

    def submit(self, broken: bool = False) -> StepPlan | None:
        """Schedule a step and let the worker run it; its result waits for `commit`."""
        self.now += 1.0
        plan = self.scheduler.schedule(self.now)
        if plan is None:
            assert self.in_flight or not self.scheduler.has_unfinished(), "I12: nothing runs, yet something waits"
            self.check()
            return None
        self._check_plan(plan)
        result = self.worker.execute(plan, broken)
        named = {block for row in plan.rows for block in self.worker.slots[row.slot].table}
        self.in_flight.append((plan, None if broken else result, named))
        self.plans.append(plan)
        self.check()
        return plan

    def commit(self, row_errors: frozenset[int] = frozenset()) -> list[TokenOutput]:
        """Commit the oldest step, or fail it if it was broken. row_errors: rows (modulo their number) that fail."""
        plan, result, _ = self.in_flight.popleft()
        if result is None:
            outputs = self.scheduler.fail(plan, "the step failed")
            assert all(output.finish_reason == "error" for output in outputs)
        else:
            bad = {index % len(plan.rows) for index in row_errors}
            rows = [
                RowResult([], error="NaN", refused=i % 2 == 1) if i in bad else r for i, r in enumerate(result.rows)
            ]
            outputs = self.scheduler.commit(plan, StepResult(plan.step_id, rows, result.seconds))
        self.record(outputs)
        self.check()
        return outputs

    def abort(self, names: list[str]) -> list[TokenOutput]:
        live = [name for name in dict.fromkeys(names) if name in self.unfinished]
        outputs = self.scheduler.abort(names)
        assert [output.request_id for output in outputs] == live
        assert all(output.finish_reason == "abort" and not output.new_token_ids for output in outputs)
        self.record(outputs)
        self.check()
        return outputs

    def step(self) -> list[TokenOutput]:
        """As the engine does: fill the pipeline, then commit the oldest step."""
        while len(self.in_flight) < self.depth and self.submit() is not None:
            pass
        return self.commit() if self.in_flight else []

    def drain(self) -> int:
        """Step until all is done, in a bounded number of steps (I12); then nothing may be held (I6)."""
        requests = [account.request for account in self.accounts.values()]
        bound = 50 + 4 * sum(len(request.prompt_token_ids) + request.max_tokens for request in requests)
        steps = 0
        while self.in_flight or self.scheduler.has_unfinished():
            self.step()
            steps += 1
            assert steps <= bound, f"I12: still not done after {steps} steps"
        self.check_empty()
        return steps

    def record(self, outputs: list[TokenOutput]) -> None:
        """I10, I14, I15: what is said agrees with the machine without limits, and ends once."""
        for output in outputs:
            account = self.accounts[output.request_id]
            assert account.last is None, "I10: output after the end"
            want = expected(account.request)
            account.tokens += output.new_token_ids
            account.logprobs += output.logprobs or []
            assert account.tokens == want.output[: len(account.tokens)], "I14/I15: other tokens than without limits"
            assert account.logprobs == want.logprobs[: len(account.tokens)]
            if output.prompt_logprobs is not None:
                assert account.prompt_logprobs is None, "prompt_logprobs came twice"
                assert account.tokens == output.new_token_ids != []
                account.prompt_logprobs = output.prompt_logprobs
            if account.tokens:
                assert account.prompt_logprobs == want.prompt_logprobs
                assert output.scheduled_time > 0
            assert output.num_cached_tokens < len(account.request.prompt_token_ids)
            assert (output.error is not None) == (output.finish_reason == "error")
            if output.finish_reason is not None:
                account.last = output
            if output.finish_reason in ("stop", "length"):
                assert (output.finish_reason, output.stop_reason) == (want.finish_reason, want.stop_reason)
                assert account.tokens == want.output
            else:
                assert len(account.tokens) < len(want.output), "went on after the end"

    def check(self) -> None:
        """I1-I9 by the scheduler's own audit, and from outside what it could get wrong twice in the same way."""
        scheduler, config = self.scheduler, self.config
        scheduler.audit()
        stats = scheduler.stats()
        assert stats.num_running <= config.max_num_seqs
        assert stats.num_running + stats.num_waiting == len(self.unfinished)
        assert stats.num_kv_tokens <= stats.num_kv_slots
        assert scheduler.has_unfinished() == bool(self.unfinished)
        for _, _, named in self.in_flight:
            for block in named:
                assert scheduler._kv.pool.ref_count(block) > 0, "a block that a step in flight names was freed"
        salts: dict[int, str | None] = {}
        for sequence in scheduler._running:
            for block in sequence.block_table:
                salt = salts.setdefault(block, sequence.request.cache_salt)
                assert salt == sequence.request.cache_salt, "I19: a block is shared between salts"

    def _most_tokens(self, slot: int) -> int:
        """Tokens that the sequence there can have computed when it ends."""
        (sequence,) = (s for s in self.scheduler._running if s.slot == slot)
        return sequence.max_num_tokens - 1

    def check_empty(self) -> None:
        stats = self.scheduler.stats()
        assert (stats.num_running, stats.num_waiting, stats.num_kv_slots) == (0, 0, 0)
        assert stats.num_free_blocks == stats.num_blocks == self.config.num_blocks - 1
        assert not self.scheduler._sequences
        assert not self.scheduler._in_flight
        assert sorted(self.scheduler._free_slots) == list(range(self.config.max_num_seqs))

    def _check_plan(self, plan: StepPlan) -> None:
        """I7 and the contract of StepPlan, checked against the worker's slots before they change."""
        assert plan.rows
        assert 0 < plan.num_tokens <= self.config.max_num_batched_tokens
        slots = [row.slot for row in plan.rows]
        assert len(set(slots)) == len(slots) <= self.config.max_num_seqs
        fresh = {new.slot: new for new in plan.new_sequences}
        assert len(fresh) == len(plan.new_sequences)
        assert set(fresh) <= set(slots) <= set(range(self.config.max_num_seqs))
        where = [(fresh.get(s) or self.worker.slots[s]).adapter_slot for s in slots]
        assert where == sorted(where), "rows of an adapter are not neighbours"
        brought = dict(plan.adapters)
        assert len(brought) == len(plan.adapters) <= self.config.max_loras
        assert (
            set(brought)
            <= {new.adapter_slot for new in plan.new_sequences}
            <= {NO_ADAPTER, *range(self.config.max_loras)}
        )
        assert len(plan.drafts) in ((len(plan.rows),) if self.config.num_speculative_tokens else (0,))
        for row, num_wanted in zip(plan.rows, plan.drafts or [0] * len(plan.rows)):
            new = fresh.get(row.slot)
            assert row.length > 0
            assert new is None or not row.new_block_ids or plan.drafts
            table = (new.block_table if new else self.worker.slots[row.slot].table) + row.new_block_ids
            tokens = new.token_ids if new else self.worker.slots[row.slot].tokens
            end = row.start + row.length
            assert end + num_wanted * row.samples <= len(table) * self.config.block_size
            assert 0 <= row.num_drafts <= self.config.num_speculative_tokens
            if row.samples and self.config.num_speculative_tokens and new is None:
                # As many tokens as may be known by then: the worker may be ahead of that.
                assert end - row.num_drafts >= len(tokens)
                assert end <= self._most_tokens(row.slot)
            else:
                assert not row.num_drafts
                assert row.samples == (end == len(tokens))
            if new and not self.config.enable_chunked_prefill:
                assert row.samples, "a prompt was cut although prompts are not chunked"
