"""Rows with LoRA adapters and guesses, beside rows without adapters: the tokens that come without guesses."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from adapter_rig import NUM_DRAFTS, SIZES, VOCAB, Rig, model_of, random_weights, tokens
from oracle import Oracle
from random_adapters import write_adapter

from octavo.config import LoRASizes
from octavo.protocol.lora import LoRARequest
from octavo.protocol.request import Request
from octavo.protocol.sampling import SamplingParams

WISHES: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 0.5, "logprobs": 1},
    {"temperature": 0, "repetition_penalty": 1.2},
]


def requests(loras: list[LoRARequest | None], count: int, max_tokens: int) -> list[Request]:
    """Prompts that repeat themselves, so that lookup has guesses. The first of three has no adapter."""
    rng = random.Random(2)
    made = []
    for index in range(count):
        prompt = [rng.randrange(VOCAB) for _ in range(rng.choice([1, 3, 9]))] * 2
        sampling = SamplingParams(seed=index, max_tokens=max_tokens, **WISHES[index // 3 % 3])
        own: dict[str, Any] = {"prompt_token_ids": prompt, "sampling": sampling, "lora": loras[index % 3]}
        made.append(Request(request_id=str(index), max_tokens=max_tokens, **own))
    return made


def adapters(folder: Path) -> list[LoRARequest | None]:
    """None, and two."""
    rng, weights = random.Random(5), random_weights()
    found: list[LoRARequest | None] = [None]
    for number in (1, 2):
        write_adapter(folder / str(number), weights, rng, SIZES.max_lora_rank)
        found.append(LoRARequest(f"a{number}", number, str(folder / str(number))))
    return found


def outputs(asked: list[Request], kind: str, sizes: LoRASizes | None) -> list[list[int]]:
    return [tokens(own) for own in Rig(model_of(random_weights()), kind, sizes).run(asked).values()]


@pytest.mark.parametrize("method", ["ngram", "eagle", "eagle3"])
def test_a_cpus_batch(method: str, tmp_path: Path) -> None:
    asked = requests(adapters(tmp_path), 18, 30)
    want, bare = outputs(asked, "cpu", SIZES), outputs(requests([None] * 3, 18, 30), "cpu", None)
    assert want[::3] == bare[::3]
    assert all(one != other for one, other in zip(want[1::3], bare[1::3])), "an adapter changes nothing"
    rig = Rig(model_of(random_weights()), "cpu", SIZES, method)
    assert [tokens(own) for own in rig.run(asked).values()] == want
    stats = rig.engine.stats()
    assert stats.num_draft_tokens_total > len(asked)
    if method == "ngram":
        assert stats.num_accepted_tokens_total > 0


def test_a_gpus_batch(tmp_path: Path) -> None:
    """On the CPU: its kernels are interpreted."""
    asked = requests(adapters(tmp_path), 3, 7)
    want, bare = outputs(asked, "device", SIZES), outputs(requests([None] * 3, 3, 7), "device", None)
    assert want[0] == bare[0]
    assert want[1] != bare[1]
    oracle = Oracle([request.prompt_token_ids for request in asked], want, NUM_DRAFTS, VOCAB)
    rig = Rig(model_of(random_weights()), "device", SIZES, oracle)
    assert [tokens(own) for own in rig.run(asked).values()] == want
    stats = rig.engine.stats()
    assert 0 < stats.num_accepted_tokens_total < stats.num_draft_tokens_total
