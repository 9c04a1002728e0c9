"""Draft heads on a GPU, in Triton's interpreter: what they guess is what they guess on a CPU, where nothing is kept."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from octavo.attention.cpu import CpuAttention
from octavo.attention.long_prefill import NoLongPrefill
from octavo.attention.triton import TritonAttention
from octavo.config import SchedulerConfig
from octavo.distributed.executor import DeviceExecutor, InProcessExecutor
from octavo.engine.engine import Engine
from octavo.kernels import triton
from octavo.loading.weights import dummy_weights
from octavo.models.base import CausalLM, DraftHead
from octavo.models.registry import build_head, build_model
from octavo.protocol.plan import NewSequence, PlanRow
from octavo.protocol.request import Request
from octavo.protocol.sampling import SamplingParams
from octavo.scheduler.scheduler import Scheduler
from octavo.worker.device_runner import DeviceLimits, DeviceRunner, DeviceSlots
from octavo.worker.device_speculation import DeviceDraftBatch, DeviceDrafter, DeviceSpeculation
from octavo.worker.drafters.device_draft_head import DeviceHeadDrafter
from octavo.worker.drafters.device_passes import reach_of
from octavo.worker.drafters.draft_head import HeadDrafter
from octavo.worker.drafters.drafter import DraftRow
from octavo.worker.drafters.recent_features import RecentFeatures
from octavo.worker.model_runner import ModelRunner
from octavo.worker.sampler.device_sampler import DeviceSampler
from octavo.worker.sampler.sampler import Sampler
from octavo.worker.slots import Slots
from octavo.worker.speculation import Speculation

CPU = torch.device("cpu")
MOST, NUM_BLOCKS = 3, 14
VOCAB, DRAFT_VOCAB = 7, 5  # so few that guesses of a head that nobody trained come true now and then
LIMITS = DeviceLimits(
    max_num_seqs=3, max_num_batched_tokens=24, max_model_len=64, block_size=16, max_draft_rows=3 * MOST
)
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
}
Guesses = dict[tuple[int, ...], tuple[list[int], torch.Tensor]]  # by the known tokens before; logits of the first


@pytest.fixture(scope="module")
def model() -> CausalLM:
    triton.load()
    made = build_model(CONFIG, torch.float32, CPU)
    made.load_weights(
        (name, tensor * 6 if "norm" not in name else tensor) for name, tensor in dummy_weights(made, 0, CPU)
    )
    return made


def head_of(method: Any, model: CausalLM) -> DraftHead:
    config = dict(CONFIG)
    if method == "eagle3":
        config |= {"eagle_aux_hidden_state_layer_ids": [0, 1], "draft_vocab_size": DRAFT_VOCAB}
    head = build_head(method, config, model.config, (), torch.float32, CPU)
    offsets = torch.tensor([0, 1, 1, 2, 2])
    head.load_weights(
        (name, offsets if name == "d2t" else tensor if "norm" in name else tensor * 12)
        for name, tensor in dummy_weights(head, 1, CPU)
    )
    head.share(model)
    model.tap(head.tap_layers)
    return head


def listen(head: DraftHead) -> list[torch.Tensor]:
    """All logits that the head makes from now on."""
    heard: list[torch.Tensor] = []
    compute = head.compute_logits

    def noted(hidden: torch.Tensor) -> torch.Tensor:
        heard.append(compute(hidden))
        return heard[-1]

    head.compute_logits = noted  # type: ignore[method-assign]
    return heard


class Overheard:
    """A drafter on a GPU whose guesses are noted."""

    def __init__(self, drafter: DeviceDrafter, head: DraftHead) -> None:
        self._drafter = drafter
        self._heard = listen(head)
        self.guesses: Guesses = {}

    def enter(self, new: NewSequence, start: int) -> None:
        self._drafter.enter(new, start)

    def skip(self, rows: Sequence[PlanRow], prompts: Sequence[bool]) -> None:
        self._drafter.skip(rows, prompts)

    def propose(self, batch: DeviceDraftBatch) -> None:
        self._heard.clear()
        self._drafter.propose(batch)
        wanted = [group for group, slot in enumerate(batch.slots.tolist()) if slot >= 0]
        for place, group in enumerate(wanted):
            slot = int(batch.slots[group])
            known = tuple(batch.token_ids[slot, : batch.lengths[slot]].tolist())
            guesses = batch.drafts[group, : batch.wanted[group]].tolist()
            self.guesses[known] = guesses, self._heard[0][place]


class OverheardOnCpu:
    """The same on a CPU."""

    def __init__(self, drafter: HeadDrafter, head: DraftHead, slots: Slots) -> None:
        self._drafter = drafter
        self._heard = listen(head)
        self._slots = slots
        self.guesses: Guesses = {}

    def enter(self, new: NewSequence, start: int) -> None:
        self._drafter.enter(new, start)

    def propose(self, rows: list[DraftRow], features: torch.Tensor | None) -> list[list[int]]:
        self._heard.clear()
        made = self._drafter.propose(rows, features)
        wanted = [(row, own) for row, own in zip(rows, made) if row.count]
        for place, (row, own) in enumerate(wanted):
            known = tuple(self._slots.token_ids[row.slot, : row.num_tokens].tolist())
            self.guesses[known] = own, self._heard[0][place]
        return made


def engine_of(executor: Any, depth: int, speculates: bool = True) -> Engine:
    config = SchedulerConfig(
        max_num_seqs=LIMITS.max_num_seqs,
        max_num_batched_tokens=LIMITS.max_num_batched_tokens,
        max_model_len=LIMITS.max_model_len,
        block_size=LIMITS.block_size,
        num_blocks=NUM_BLOCKS,
        num_speculative_tokens=MOST if speculates else 0,
        adaptive_speculation=False,
        max_step_rows=LIMITS.max_num_seqs + LIMITS.max_draft_rows,
    )
    return Engine(Scheduler(config), executor, depth)


def device_engine(model: CausalLM, head: DraftHead | None, depth: int = 2) -> tuple[Engine, Guesses]:
    def attention(max_rows: int) -> TritonAttention:
        cache = torch.zeros(1, NUM_BLOCKS, 2, 1, LIMITS.block_size, 16)
        return TritonAttention(cache, 2, 4, max_rows, NoLongPrefill(), shares=True)

    slots, speculation, guesses = DeviceSlots(LIMITS, CPU), None, {}
    if head is not None:
        seqs = LIMITS.max_num_seqs
        recent = RecentFeatures(head, model, seqs, reach_of(MOST), MOST)
        sizes = LIMITS.block_size, 4
        drafter = DeviceHeadDrafter(head, recent, attention(4 * reach_of(MOST)), slots.block_tables, sizes, MOST, False)
        overheard = Overheard(drafter, head)
        guesses = overheard.guesses
        speculation = DeviceSpeculation(overheard, MOST, (seqs, seqs + LIMITS.max_draft_rows), CPU, None, recent)
    sampler = DeviceSampler(LIMITS.max_num_seqs, VOCAB, CPU)
    rows = LIMITS.max_num_seqs + LIMITS.max_draft_rows
    runner = DeviceRunner(model, attention(rows), sampler, slots, LIMITS, False, speculation=speculation)
    return engine_of(DeviceExecutor(runner), depth, head is not None), guesses


def cpu_engine(model: CausalLM, head: DraftHead) -> tuple[Engine, Guesses]:
    slots = Slots(LIMITS.max_num_seqs, LIMITS.max_model_len, LIMITS.block_size, CPU)

    def attention() -> CpuAttention:
        return CpuAttention(1, NUM_BLOCKS, LIMITS.block_size, 1, 16, torch.float32)

    overheard = OverheardOnCpu(HeadDrafter(head, attention(), slots), head, slots)
    sampler = Sampler(LIMITS.max_num_seqs, VOCAB, CPU)
    speculation = Speculation(overheard, slots)
    runner = ModelRunner(model, attention(), sampler, slots, None, speculation, len(head.tap_layers))
    return engine_of(InProcessExecutor(runner, threaded=False), 1), overheard.guesses


def answers(engine: Engine, sampling: SamplingParams, max_tokens: int) -> list[list[int]]:
    """Of four prompts: one in two chunks, and a last one that waits for a slot and finds the first's block."""
    rng = random.Random(3)
    long = [rng.randrange(VOCAB) for _ in range(33)]
    asked = [long, [3], [rng.randrange(VOCAB) for _ in range(9)], long[:17]]
    outputs: dict[str, list[int]] = {str(index): [] for index in range(len(asked))}
    for index, prompt in enumerate(asked):
        own = sampling.replace(seed=index)
        engine.add(Request(request_id=str(index), prompt_token_ids=prompt, sampling=own, max_tokens=max_tokens))
    while engine.has_work:
        for output in engine.step():
            outputs[output.request_id] += output.new_token_ids
    engine.audit()
    return list(outputs.values())


@pytest.mark.parametrize("method", ["eagle", "eagle3"])
def test_guesses_are_those_of_a_cpu(model: CausalLM, method: str) -> None:
    """What the first of each are chosen by is of the features and tokens of all positions before, so a single wrong one
    among those shows."""
    head = head_of(method, model)
    (on_cpu, expected), (on_device, found) = cpu_engine(model, head), device_engine(model, head)
    greedy = SamplingParams(temperature=0)
    assert answers(on_device, greedy, 7) == answers(on_cpu, greedy, 7)
    assert on_device.stats().num_accepted_tokens_total > 0
    common = found.keys() & expected.keys()
    assert len(common) > 6
    for known in common:
        (guesses, logits), (expected_guesses, expected_logits) = found[known], expected[known]
        assert all(guess == other for guess, other in zip(guesses, expected_guesses)), known
        torch.testing.assert_close(logits, expected_logits, rtol=1e-4, atol=1e-4)
    assert len({tuple(found[known][0]) for known in common}) > 2


def test_guesses_of_a_head_change_no_token(model: CausalLM) -> None:
    sampling = SamplingParams(temperature=1.0)
    guessing, _ = device_engine(model, head_of("eagle3", model))
    assert answers(guessing, sampling, 4) == answers(device_engine(model, None)[0], sampling, 4)
