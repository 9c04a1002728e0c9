"""A CPU's rows that verify guesses bring the tokens that they would without."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from octavo.attention.cpu import CpuAttention
from octavo.config import SchedulerConfig
from octavo.distributed.executor import InProcessExecutor
from octavo.engine.engine import Engine
from octavo.loading.weights import dummy_weights
from octavo.models.base import CausalLM
from octavo.models.registry import build_head, build_model
from octavo.protocol.outputs import TokenOutput
from octavo.protocol.request import Request
from octavo.protocol.sampling import SamplingParams
from octavo.scheduler.scheduler import Scheduler
from octavo.worker.drafters.draft_head import HeadDrafter
from octavo.worker.drafters.draft_model import ModelDrafter
from octavo.worker.drafters.drafter import Drafter
from octavo.worker.drafters.lookup import LookupDrafter, LookupSettings
from octavo.worker.model_runner import ModelRunner
from octavo.worker.sampler.sampler import Sampler
from octavo.worker.slots import Slots
from octavo.worker.speculation import Speculation

CPU = torch.device("cpu")
VOCAB, BLOCK, MAX_LEN, NUM_DRAFTS = 31, 4, 96, 4
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": MAX_LEN,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
}
WISHES: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 1.0, "logprobs": 2},
    {"temperature": 0.7, "top_p": 0.9, "top_k": 12},
    {"temperature": 1.2, "min_p": 0.05, "logit_bias": {3: 1.5, 4: -2.0}},
    {"temperature": 1.0, "repetition_penalty": 1.3, "presence_penalty": 0.4, "frequency_penalty": 0.2},
    {"temperature": 1.0, "bad_words_token_ids": [[5, 6], [7]], "min_tokens": 6, "stop_token_ids": [1, 2, 3, 8, 9]},
    {"temperature": 0, "prompt_logprobs": 1, "logprobs": 0},
]


def tiny(seed: int) -> CausalLM:
    made = build_model(CONFIG, torch.float32, CPU)
    made.load_weights(
        (name, tensor * 6 if "norm" not in name else tensor) for name, tensor in dummy_weights(made, seed, CPU)
    )
    return made


@pytest.fixture(scope="module")
def model() -> CausalLM:
    return tiny(0)


def drafter_of(method: str, model: CausalLM, slots: Slots, num_blocks: int) -> Drafter:
    if method in ("eagle", "eagle3"):
        config = CONFIG | {"num_hidden_layers": 1, "eagle_aux_hidden_state_layer_ids": [0, 1, 2]}
        head = build_head(method, config, model.config, (), torch.float32, CPU)
        head.load_weights(dummy_weights(head, 0, CPU))
        head.share(model)
        model.tap(head.tap_layers)
        return HeadDrafter(head, CpuAttention(1, num_blocks, BLOCK, 2, 8, torch.float32), slots)
    if method in ("ngram", "suffix"):
        corpus = 64 if method == "suffix" else 0
        return LookupDrafter(LookupSettings(1, 4, NUM_DRAFTS, corpus), slots.token_ids)
    small = model if method == "itself" else tiny(1)
    return ModelDrafter(small, CpuAttention(2, num_blocks, BLOCK, 2, 8, torch.float32), slots)


class Rig:
    """An engine over a CPU's runner."""

    def __init__(
        self, model: CausalLM, method: str | None, depth: int = 1, num_blocks: int = 80, **changes: Any
    ) -> None:
        slots = Slots(4, MAX_LEN, BLOCK, CPU)
        speculation = None
        if method is not None:
            drafter = drafter_of(method, model, slots, num_blocks)
            speculation = Speculation(drafter, slots)
        num_tapped = {None: None, "eagle": 0, "eagle3": 3}.get(method)
        attention = CpuAttention(2, num_blocks, BLOCK, 2, 8, torch.float32)
        runner = ModelRunner(model, attention, Sampler(4, VOCAB, CPU), slots, None, speculation, num_tapped)
        values = {
            "max_num_seqs": 4,
            "max_num_batched_tokens": 24,
            "max_model_len": MAX_LEN,
            "block_size": BLOCK,
            "num_blocks": num_blocks,
            "num_speculative_tokens": 0 if method is None else NUM_DRAFTS,
            "adaptive_speculation": False,
        }
        executor = InProcessExecutor(runner, threaded=depth > 1)
        self.engine = Engine(Scheduler(SchedulerConfig(**(values | changes))), executor, depth)

    def run(self, prompts: list[list[int]], max_tokens: int = 24) -> list[list[TokenOutput]]:
        """Each prompt with the next of WISHES."""
        outputs: dict[str, list[TokenOutput]] = {str(index): [] for index in range(len(prompts))}
        for index, prompt in enumerate(prompts):
            sampling = SamplingParams(seed=index, **WISHES[index % len(WISHES)])
            self.engine.add(
                Request(request_id=str(index), prompt_token_ids=prompt, sampling=sampling, max_tokens=max_tokens)
            )
        while self.engine.has_work:
            for output in self.engine.step():
                outputs[output.request_id].append(output)
            self.engine.audit()
        self.engine.shutdown()
        return list(outputs.values())


def prompts(count: int = 14) -> list[list[int]]:
    """Some share a prefix of several blocks, some repeat themselves, some need several chunks."""
    rng = random.Random(3)
    prefix = [rng.randrange(VOCAB) for _ in range(13)]
    return [
        (prefix if i % 2 else []) + [rng.randrange(VOCAB) for _ in range(1 + 5 * (i % 5))] * 2 for i in range(count)
    ]


def said(outputs: list[list[TokenOutput]]) -> list[tuple[Any, ...]]:
    """All that clients are told, however it was cut into steps."""
    return [
        (
            [token for output in own for token in output.new_token_ids],
            [entry.token_ids for output in own for entry in output.logprobs or ()],
            [entry.token_ids for output in own for entry in output.prompt_logprobs or ()],
            own[-1].finish_reason,
            own[-1].stop_reason,
        )
        for own in outputs
    ]


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("method", ["ngram", "suffix", "itself", "another", "eagle", "eagle3"])
def test_guesses_change_nothing_that_is_said(model: CausalLM, method: str, depth: int) -> None:
    plain = Rig(model, None)
    want = plain.run(prompts())
    guessing = Rig(model, method, depth)
    assert said(guessing.run(prompts())) == said(want)
    stats = guessing.engine.stats()
    assert stats.num_draft_tokens_total > 0
    if method in ("ngram", "suffix", "itself"):
        assert stats.num_accepted_tokens_total > 0


def test_preempted_sequences_guess_again(model: CausalLM) -> None:
    want = Rig(model, None).run(prompts(8))
    tight = Rig(model, "itself", depth=2, num_blocks=22)
    assert said(tight.run(prompts(8))) == said(want)
    assert tight.engine.stats().num_preemptions_total > 0


def test_a_model_that_guesses_for_itself_is_always_right(model: CausalLM) -> None:
    rig = Rig(model, "itself", max_num_seqs=1)
    outputs: list[TokenOutput] = []
    rig.engine.add(
        Request(
            request_id="a", prompt_token_ids=[1, 2, 3], sampling=SamplingParams(temperature=0, seed=0), max_tokens=41
        )
    )
    while rig.engine.has_work:
        outputs += rig.engine.step()
    stats = rig.engine.stats()
    assert [len(output.new_token_ids) for output in outputs] == [1] + [1 + NUM_DRAFTS] * 8
    assert stats.num_accepted_tokens_total == stats.num_draft_tokens_total == 8 * NUM_DRAFTS
