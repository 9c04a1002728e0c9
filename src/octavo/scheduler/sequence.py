"""Sequence: the scheduler's view of one request. Nobody else writes it."""

from __future__ import annotations

import enum
from array import array

from octavo.protocol.outputs import FinishReason
from octavo.protocol.plan import NO_ADAPTER, Masks, TokenLogprobs
from octavo.protocol.request import Request
from octavo.scheduler.audit import require
from octavo.scheduler.constraint import Constraint
from octavo.scheduler.prefix_cache import BlockKey
from octavo.scheduler.repetition import RepetitionDetector
from octavo.scheduler.speculation import Acceptance


class Status(enum.Enum):
    """WAITING (new or preempted) <-> RUNNING -> FINISHED; WAITING -> FINISHED by abort."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


class Sequence:
    """Token counts run ahead of token values: a step in flight has sampled tokens that are not known yet.

    Invariant: num_computed_tokens <= num_tokens <= max_num_tokens, and num_tokens - len(token_ids) is the
    number of tokens that its rows in flight may bring at most. A guess that does not come true lowers both counts when
    its step is committed. Its last token is never computed: nothing comes after it.
    """

    __slots__ = (
        "acceptance",
        "adapter_digest",
        "adapter_id",
        "adapter_slot",
        "admitted_step_id",
        "block_keys",
        "block_table",
        "constraint",
        "depends_on_output",
        "draft_ids",
        "last_step_id",
        "max_num_tokens",
        "min_num_tokens",
        "next_key_at",
        "num_cached_tokens",
        "num_chosen",
        "num_computed_tokens",
        "num_drafts",
        "num_prompt_tokens",
        "num_registered_blocks",
        "num_reserved_tokens",
        "num_tokens",
        "prompt_logprobs",
        "rank",
        "repetition",
        "request",
        "scheduled_time",
        "slot",
        "status",
        "stop_ids",
        "token_ids",
        "took_cached_blocks",
    )

    def __init__(
        self,
        request: Request,
        rank: tuple[int, int],
        constraint: Constraint | None = None,
        adapter_digest: bytes | None = None,
    ) -> None:
        """Raises ValueError if a prompt token is no token id."""
        sampling = request.sampling
        self.request = request
        self.rank = rank  # (priority, arrival number): lower runs first and is preempted last
        self.status = Status.WAITING
        self.token_ids = list(request.prompt_token_ids)  # known values: prompt, then output
        self.num_prompt_tokens = len(self.token_ids)
        self.max_num_tokens = self.num_prompt_tokens + request.max_tokens
        self.num_tokens = self.num_prompt_tokens  # values in flight included
        self.num_computed_tokens = 0  # KV entries written by steps committed or in flight
        # What tokens may come; it has accepted the known output tokens, and keeps them over preemption.
        self.constraint = constraint
        # A grammar allows them where nothing else can come.
        ignores_eos = sampling.ignore_eos and sampling.structured_outputs is None
        self.stop_ids = frozenset(sampling.stop_token_ids or ()).union(() if ignores_eos else request.eos_token_ids)
        # Told the known output tokens, and keeps them over preemption.
        detection = sampling.repetition_detection
        self.repetition = None if detection is None else RepetitionDetector(detection)
        min_tokens = sampling.min_tokens if sampling.structured_outputs is None else 0
        self.min_num_tokens = self.num_prompt_tokens + min_tokens

        self.adapter_id = None if request.lora is None else request.lora.lora_int_id
        self.adapter_digest = adapter_digest  # of what its KV is computed with; None without an adapter

        self.slot = -1  # -1 unless RUNNING
        self.adapter_slot = NO_ADAPTER  # unless RUNNING with one
        self.block_table: list[int] = []  # empty unless RUNNING
        self.num_reserved_tokens = 0  # that blocks were taken for, guesses that did not come true included
        self.block_keys: list[BlockKey] = []  # of the first full blocks of known tokens; kept over preemption
        self.num_registered_blocks = 0  # leading blocks that were offered to the prefix cache or came from it
        self.next_key_at = 0  # num_computed_tokens from which another block can be registered
        self.last_step_id = -1  # the last step with a row of this sequence
        self.acceptance: Acceptance | None = None  # of guesses at its tokens; kept over preemption
        self.depends_on_output = sampling.depends_on_output
        self.num_chosen = 0  # guesses that its next row is to verify
        self.num_drafts = 0  # guesses that the worker has ready for the next row, at most
        self.draft_ids: tuple[int, ...] = ()  # those known to be ready after the last row that was committed
        self.admitted_step_id = -1  # the step that took it out of the queue last
        self.took_cached_blocks = False  # at that admission

        self.num_cached_tokens = 0  # found when it first ran
        self.scheduled_time = 0.0
        # None: not asked for, or sent already. Else what is there so far, from prompt position 1 on.
        self.prompt_logprobs: list[TokenLogprobs] | None = None if sampling.prompt_logprobs is None else []
        try:
            array("I", self.token_ids)
        except (OverflowError, TypeError) as error:
            raise ValueError(f"prompt_token_ids holds what is no token id: {error}") from None

    def append(self, token_id: int) -> FinishReason | None:
        """Add a token whose value has become known. Returns why the output ends with it, if it does."""
        self.token_ids.append(token_id)
        num_tokens = len(self.token_ids)
        repeats = self.repetition is not None and self.repetition.push(token_id)
        may_end = num_tokens >= self.min_num_tokens
        if token_id in self.stop_ids and may_end:
            return "stop"
        if repeats and may_end:
            return "repetition"
        return "length" if num_tokens >= self.max_num_tokens else None

    def stop_reason(self) -> int | None:
        """Of an output that ended with "stop": its last token, or None if that is an end-of-sequence id."""
        request, last = self.request, self.token_ids[-1]
        ignores_eos = request.sampling.ignore_eos and request.sampling.structured_outputs is None
        return None if last in request.eos_token_ids and not ignores_eos else last

    @property
    def awaits_token(self) -> bool:
        """Whether its next step needs the value of a token that is not known yet: what may come depends on it. Where it
        depends on the tokens before in a way that the worker sees to, how many there are is enough."""
        num_unknown = self.num_tokens - len(self.token_ids)
        if self.depends_on_output and num_unknown > 1:
            return True
        return self.constraint is not None and num_unknown > 0 and self.constraint.num_free <= num_unknown

    def next_masks(self, num_drafts: int) -> Masks:
        """See PlanRow.masks. With guesses these may be fewer than asked for: up to where the constraint cannot say
        more, or does not allow the guess. Without a known last token there are none: see `awaits_token`."""
        if self.constraint is None or self.num_tokens != len(self.token_ids):
            return None
        return self.constraint.masks(self.draft_ids[:num_drafts])

    def add_prompt_logprobs(self, start: int, rows: list[TokenLogprobs] | None) -> None:
        """Take those of positions start+1 .. that are not there yet: a preempted prompt is computed again."""
        if self.prompt_logprobs is not None and rows:
            self.prompt_logprobs.extend(rows[len(self.prompt_logprobs) - start :])

    def take_prompt_logprobs(self) -> list[TokenLogprobs] | None:
        """What goes out with the first token; None ever after."""
        rows, self.prompt_logprobs = self.prompt_logprobs, None
        return rows

    def audit_running(self) -> None:
        """Raises ConsistencyError naming an invariant of a running sequence that is broken."""
        name, num_tokens = self.request.request_id, self.num_tokens
        require(self.status is Status.RUNNING, f"I9: {name!r} runs but is {self.status}")
        ordered = 0 < self.num_computed_tokens <= num_tokens <= self.max_num_tokens
        require(ordered, f"I8: {name!r} has {self.num_computed_tokens} tokens of {num_tokens} computed")
        num_output = len(self.token_ids) - self.num_prompt_tokens
        accepted = self.constraint is None or self.constraint.num_accepted == num_output
        require(accepted, f"I16: the constraint of {name!r} has not accepted its {num_output} output tokens")
