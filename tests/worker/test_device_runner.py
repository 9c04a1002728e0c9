"""The GPU's runner with its kernels in Triton's interpreter: what it generates is what the CPU's runner generates."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from oracle import Oracle

from octavo.attention.backend import FusedAttentionBackend
from octavo.attention.long_prefill import NoLongPrefill
from octavo.attention.torch_operators import TorchAttention
from octavo.attention.triton import TritonAttention
from octavo.config import SchedulerConfig
from octavo.distributed.executor import DeviceExecutor
from octavo.engine.engine import Engine
from octavo.kernels import triton
from octavo.loading.weights import dummy_weights
from octavo.models.base import CausalLM
from octavo.models.registry import build_model
from octavo.protocol.outputs import TokenOutput
from octavo.protocol.request import Request
from octavo.protocol.sampling import SamplingParams
from octavo.scheduler.scheduler import Scheduler
from octavo.worker import device_runner
from octavo.worker.cuda_graphs import Computed
from octavo.worker.device_runner import DeviceLimits, DeviceRunner, DeviceSlots, HostClock
from octavo.worker.device_speculation import DeviceSpeculation
from octavo.worker.drafters.device_draft_model import DeviceModelDrafter
from octavo.worker.graph_sizes import GraphSize
from octavo.worker.sampler.device_sampler import DeviceSampler
from octavo.worker.step_buffers import StepShape

CPU = torch.device("cpu")
VOCAB = 97
NUM_TOKENS = 5
NUM_DRAFTS = 3
LIMITS = DeviceLimits(max_num_seqs=4, max_num_batched_tokens=24, max_model_len=64, block_size=16)
CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
}


@pytest.fixture(scope="module")
def model() -> CausalLM:
    triton.load()
    made = build_model(CONFIG, torch.float32, CPU)
    # Far from uniform, so that a wrong neighbour would show.
    made.load_weights(
        (name, tensor * 10 if "norm" not in name else tensor) for name, tensor in dummy_weights(made, 0, CPU)
    )
    return made


class Rig:
    """An engine over a device runner, and the outputs of what it ran by request."""

    def __init__(
        self,
        model: CausalLM,
        attention: str = "triton",
        depth: int = 2,
        num_blocks: int = 20,
        speculation: DeviceSpeculation | None = None,
    ) -> None:
        self.max_tokens = NUM_TOKENS
        limits = LIMITS if speculation is None else LIMITS._replace(max_draft_rows=8)
        cache = torch.zeros(2, num_blocks, 2, 1, LIMITS.block_size, 16)
        self.attention: FusedAttentionBackend = (
            TritonAttention(
                cache, 3, 4, limits.max_num_seqs + limits.max_draft_rows, NoLongPrefill(), speculation is not None
            )
            if attention == "triton"
            else TorchAttention(cache, 3)
        )
        sampler = DeviceSampler(LIMITS.max_num_seqs, VOCAB, CPU)
        slots = DeviceSlots(limits, CPU)
        self.runner = DeviceRunner(model, self.attention, sampler, slots, limits, False, speculation=speculation)
        config = SchedulerConfig(
            max_num_seqs=LIMITS.max_num_seqs,
            max_num_batched_tokens=LIMITS.max_num_batched_tokens,
            max_model_len=LIMITS.max_model_len,
            block_size=LIMITS.block_size,
            num_blocks=num_blocks,
            num_speculative_tokens=0 if speculation is None else NUM_DRAFTS,
            adaptive_speculation=False,
            max_step_rows=limits.max_num_seqs + limits.max_draft_rows,
        )
        self.engine = Engine(Scheduler(config), DeviceExecutor(self.runner), depth)

    def run(self, prompts: list[list[int]], sampling: SamplingParams) -> list[list[TokenOutput]]:
        outputs: dict[str, list[TokenOutput]] = {str(index): [] for index in range(len(prompts))}
        for index, prompt in enumerate(prompts):
            own = sampling.replace(seed=index)
            self.engine.add(
                Request(request_id=str(index), prompt_token_ids=prompt, sampling=own, max_tokens=self.max_tokens)
            )
        while self.engine.has_work:
            for output in self.engine.step():
                outputs[output.request_id].append(output)
        self.engine.audit()
        return list(outputs.values())


def prompts() -> list[list[int]]:
    """Of 1 to 40 tokens; every other shares a prefix of more than a block."""
    rng = random.Random(1)
    prefix = [rng.randrange(VOCAB) for _ in range(21)]
    return [
        (prefix if i % 2 else []) + [rng.randrange(VOCAB) for _ in range(n)] for i, n in enumerate((1, 3, 19, 4, 33))
    ]


def tokens(outputs: list[list[TokenOutput]]) -> list[list[int]]:
    return [[token for output in own for token in output.new_token_ids] for own in outputs]


@torch.inference_mode()
def exact(model: CausalLM, prompt: list[int]) -> list[int]:
    """Greedy tokens of one prompt, computed whole for every token."""
    dense: Any = Dense()
    ids = list(prompt)
    for _ in range(NUM_TOKENS):
        hidden = model(torch.tensor(ids), torch.arange(len(ids)), dense)
        ids.append(int(model.compute_logits(hidden[-1:]).argmax()))
    return ids[len(prompt) :]


class Dense:
    """Causal attention over the tokens of one call."""

    def forward(self, layer: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        heads = [x.transpose(0, 1)[None] for x in (query, key, value)]
        out = torch.nn.functional.scaled_dot_product_attention(
            *heads, is_causal=True, scale=layer.scale, enable_gqa=True
        )
        return out[0].transpose(0, 1)


@pytest.mark.parametrize("attention", ["triton", "torch"])
@pytest.mark.parametrize("depth", [1, 2])
def test_greedy_tokens_are_those_of_the_whole_sequence(model: CausalLM, attention: str, depth: int) -> None:
    got = tokens(Rig(model, attention, depth).run(prompts(), SamplingParams(temperature=0)))
    assert got == [exact(model, prompt) for prompt in prompts()]


class PaddedSteps:
    """In the place of graphs: mixed steps of one prompt at most, whatever their tokens, each with a row more."""

    num_recorded = 0

    def __init__(self, rig: Rig) -> None:
        self._runner = rig.runner
        self._attention = rig.attention
        self.num_asked = self.num_found = self.num_replayed = 0

    def size_of(self, num_tokens: int, num_rows: int, adapters: bool = False) -> GraphSize | None:
        if num_tokens == num_rows or num_rows == LIMITS.max_num_seqs:
            return None
        return GraphSize(LIMITS.max_num_batched_tokens, num_rows + 1, adapters)

    def find(self, size: GraphSize, num_prefill_items: int) -> Any:
        self.num_asked += 1
        if num_prefill_items > 1:
            return None
        self.num_found += 1
        items = self._attention.max_items(size.num_rows, size.num_tokens)[0]
        shape = StepShape(size.num_tokens, size.num_rows, items, 1, False, size.adapters)
        return SimpleNamespace(shape=shape, replay=lambda: self._replay(shape))

    def _replay(self, shape: StepShape) -> Computed:
        self.num_replayed += 1
        return self._runner._compute(shape, keeps_all=False)


def test_a_step_with_more_prompts_than_a_graph_has_room_for_is_launched(model: CausalLM) -> None:
    rig = Rig(model)
    graphs = PaddedSteps(rig)
    rig.runner.graphs = graphs
    own = [prompt[:length] for prompt, length in zip(prompts()[2:], (7, 7, 33))]
    assert tokens(rig.run(own, SamplingParams(temperature=0))) == [exact(model, prompt) for prompt in own]
    assert graphs.num_asked > graphs.num_found == graphs.num_replayed > 0


def test_steps_that_must_leave_all_hidden_states_are_launched(model: CausalLM) -> None:
    """Recorded ones leave those of each row's last token."""
    rig = Rig(model)
    rig.runner.graphs = graphs = PaddedSteps(rig)
    own = prompts()[2:3]
    [plain] = rig.run(own, SamplingParams(temperature=0))
    num_found = graphs.num_found
    assert num_found > 0
    [asked] = rig.run(own, SamplingParams(temperature=0, prompt_logprobs=0))
    assert graphs.num_found == num_found
    assert tokens([asked]) == tokens([plain])
    assert len(asked[0].prompt_logprobs or []) == len(own[0]) - 1


def test_seeded_draws_are_the_same_alone_and_preempted(model: CausalLM) -> None:
    sampling = SamplingParams(temperature=1.0)
    roomy, tight = Rig(model), Rig(model, num_blocks=5)
    roomy.max_tokens = tight.max_tokens = 6
    short = [prompt[:12] for prompt in prompts()]
    assert tokens(tight.run(short, sampling)) == tokens(roomy.run(short, sampling))
    assert tight.engine.stats().num_preemptions_total > 0


def test_features_beyond_the_plain_draw(model: CausalLM) -> None:
    """top_k=1 is greedy; logprobs and prompt logprobs are those of the whole sequence."""
    sampling = SamplingParams(temperature=0.7, top_k=1, logprobs=2, prompt_logprobs=0)
    outputs = Rig(model).run(prompts(), sampling)
    for prompt, own in zip(prompts(), outputs):
        assert tokens([own]) == [exact(model, prompt)]
        ids = prompt + [output.new_token_ids[0] for output in own]
        with torch.inference_mode():
            hidden = model(torch.tensor(ids), torch.arange(len(ids)), Dense())
            scores = model.compute_logits(hidden).log_softmax(-1)
        said = (own[0].prompt_logprobs or []) + [output.logprobs[0] for output in own if output.logprobs]
        assert len(said) == len(ids) - 1
        for at, entry in enumerate(said):
            assert entry.token_ids[0] == ids[at + 1]
            assert entry.logprobs[0] == pytest.approx(scores[at, ids[at + 1]].item(), abs=1e-4)


def test_a_step_out_of_memory_costs_its_largest_request(model: CausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(model)
    forward = rig.attention.forward_fused

    refused: list[int] = []

    def limited(layer: Any, qkv: torch.Tensor, *rest: Any) -> torch.Tensor:
        if len(qkv) > 23 and not refused:
            refused.append(len(qkv))
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB.")
        return forward(layer, qkv, *rest)

    monkeypatch.setattr(rig.attention, "forward_fused", limited)
    outputs = rig.run(prompts(), SamplingParams(temperature=0))
    ends = [own[-1].finish_reason for own in outputs]
    assert refused
    assert sorted(ends) == ["error", "length", "length", "length", "length"]
    for own, prompt in zip(outputs, prompts()):
        if own[-1].finish_reason == "length":
            assert tokens([own]) == [exact(model, prompt)]
        else:
            assert "CUDA out of memory" in (own[-1].error or "")


@pytest.mark.parametrize(
    ("depth", "wish"),
    [
        (1, {"temperature": 0}),
        (2, {"temperature": 1.0, "logprobs": 1}),
        (2, {"temperature": 1.0, "top_p": 0.8, "logit_bias": {3: 2.0}}),
        (2, {"temperature": 1.0, "repetition_penalty": 1.5, "frequency_penalty": 0.5, "bad_words_token_ids": [[5, 6]]}),
        (2, {"temperature": 1.0, "min_p": 0.02, "min_tokens": 4, "stop_token_ids": [1, 2, 3]}),
    ],
    ids=lambda wish: "-".join(wish) if isinstance(wish, dict) else str(wish),
)
def test_guesses_change_no_token(model: CausalLM, depth: int, wish: dict[str, Any]) -> None:
    """Rows that verify, rows of prompts, and rows that are cut short, side by side."""
    sampling, asked = SamplingParams(**wish), prompts()[:3]
    plain = Rig(model, depth=depth)
    plain.max_tokens = 7
    want = plain.run(asked, sampling)
    oracle = Oracle(asked, tokens(want), NUM_DRAFTS, VOCAB)
    guessing = Rig(model, depth=depth, speculation=DeviceSpeculation(oracle, NUM_DRAFTS, (4, 12), CPU))
    guessing.max_tokens = 7
    got = guessing.run(asked, sampling)
    assert tokens(got) == tokens(want)
    assert guessing.engine.stats().num_accepted_tokens_total > 0
    for one, other in zip(got, want):
        said = [entry for output in one for entry in output.logprobs or ()]
        expected = [entry for output in other for entry in output.logprobs or ()]
        assert [entry.token_ids for entry in said] == [entry.token_ids for entry in expected]


SHORT = [[5], [3, 1, 4, 1, 5, 9]]


def guessing_for_itself(model: CausalLM, draws: bool) -> Rig:
    """Its KV lies beside the model's own, under the same blocks. draws: its guesses are drawn, with the requests'
    parameters."""
    rig = Rig(model, speculation=DeviceSpeculation(Oracle([], [], NUM_DRAFTS, VOCAB), NUM_DRAFTS, (4, 12), CPU))
    slots = rig.runner._slots
    cache = torch.zeros(2, 20, 2, 1, LIMITS.block_size, 16)
    attention = TritonAttention(cache, 3, 4, 4 * 5, NoLongPrefill(), shares=True)
    rest = attention, slots.block_tables, (LIMITS.block_size, 4), NUM_DRAFTS, False
    rig.runner._speculation._drafter = DeviceModelDrafter(model, *rest, slots.params if draws else None)
    rig.max_tokens = 9
    return rig


def test_a_model_that_guesses_for_itself_is_right(model: CausalLM) -> None:
    """Guesses are what comes, but for ends."""
    asked = prompts()[:3]
    rig = guessing_for_itself(model, False)
    outputs = rig.run(asked, SamplingParams(temperature=0))
    assert [own[:NUM_TOKENS] for own in tokens(outputs)] == [exact(model, prompt) for prompt in asked]
    assert rig.engine.stats().num_steps_total <= 6


def test_guesses_that_are_drawn_take_the_random_numbers_of_the_models_own_draws(model: CausalLM) -> None:
    """The likeliest token would seldom be drawn at this temperature."""
    asked, sampling = SHORT, SamplingParams(temperature=2.0)
    plain = Rig(model)
    plain.max_tokens = 7
    expected = tokens(plain.run(asked, sampling))
    num_steps = {}
    for draws in (True, False):
        rig = guessing_for_itself(model, draws)
        rig.max_tokens = 7
        assert tokens(rig.run(asked, sampling)) == expected
        num_steps[draws] = rig.engine.stats().num_steps_total
    assert num_steps[True] <= 4
    assert num_steps[False] >= 7


def test_steps_without_guesses_do_not_make_the_next_ones_wrong(model: CausalLM) -> None:
    """The KV of the tokens that came meanwhile is made up for."""
    rig = guessing_for_itself(model, False)
    drafts = rig.engine._scheduler._drafts
    ask, calls = drafts.ask, iter(range(100))

    def seldom(*args: Any) -> list[int]:
        counts = ask(*args)
        if next(calls) not in range(2, 7):
            return counts
        for sequence in rig.engine._scheduler._running:
            sequence.num_drafts = sequence.num_chosen = 0
        return [0] * len(counts)

    drafts.ask = seldom
    rig.max_tokens = 20
    outputs = rig.run(SHORT, SamplingParams(temperature=0))
    assert [own[:NUM_TOKENS] for own in tokens(outputs)] == [exact(model, prompt) for prompt in SHORT]
    stats = rig.engine.stats()
    assert stats.num_steps_total < 16
    assert stats.num_accepted_tokens_total == stats.num_draft_tokens_total


def test_the_hosts_work_counts_for_the_step_that_it_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(device_runner.time, "monotonic", lambda: now)
    clock = HostClock()

    def launch(after: float) -> float:
        nonlocal now
        now += after
        return clock.launched()[1]

    def end(number: int, after: float) -> None:
        nonlocal now
        now += after
        clock.ended(number)

    assert launch(after=5.0) == 0.0  # the device had nothing to do
    assert launch(after=0.2) == pytest.approx(0.2)
    end(1, after=1.0)  # that is waiting
    assert launch(after=0.4) == pytest.approx(0.4)
    end(2, after=1.0)
    end(3, after=1.0)  # nothing is left
    assert launch(after=7.0) == 0.0
