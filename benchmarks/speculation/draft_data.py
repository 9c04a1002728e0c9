"""What a draft of SmolLM2 learns from: SmolLM2's own outputs, and its hidden states along them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from draft_prompts import held_out_prompts, training_prompts
from torch import Tensor
from transformers import AutoModelForCausalLM, GgufConfig

from octavo import LLM, SamplingParams
from octavo.loading.package import pull

NUM_OUTPUT_TOKENS = 128  # of a training text, at most
NUM_HELD_OUT = 24
_PASS_TEXTS = 4  # texts that the target reads at once
Tokens = tuple[list[int], int]  # token ids, and how many of them are the prompt's


@dataclass(frozen=True)
class Text:
    """A prompt and what SmolLM2 says to it. taps: of the target, bfloat16 [T, 3 * hidden_size], the residual stream
    that enters its tapped layers; hidden: [T, hidden_size], the last hidden states, normalised."""

    ids: Tensor
    num_prompt_tokens: int
    taps: Tensor
    hidden: Tensor


def load_target() -> Any:
    """SmolLM2 in transformers, in float32."""
    path = pull("smollm2")
    model = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    return model.eval().requires_grad_(False)


def generate(num_prompts: int) -> tuple[list[Tokens], list[Tokens]]:
    """Training texts, half of them greedy and half drawn at temperature 0.8, and held-out ones, which are greedy."""
    llm = LLM("smollm2", dtype="bfloat16", max_model_len=512, max_num_seqs=64, seed=0)
    prompts, held_out = training_prompts(num_prompts), held_out_prompts(NUM_HELD_OUT)
    params = [
        SamplingParams(temperature=0.8 * (i % 2), seed=i, max_tokens=NUM_OUTPUT_TOKENS) for i in range(len(prompts))
    ]
    params += [SamplingParams(temperature=0, max_tokens=NUM_OUTPUT_TOKENS)] * len(held_out)
    outputs = llm.generate(prompts + held_out, params, use_tqdm=False)
    texts = [(o.prompt_token_ids + list(o.outputs[0].token_ids), len(o.prompt_token_ids)) for o in outputs]
    return texts[: len(prompts)], texts[len(prompts) :]


@torch.no_grad()
def read(target: Any, texts: list[Tokens], tap_layers: tuple[int, ...]) -> list[Text]:
    """The target's hidden states along the texts."""
    found: list[Text] = []
    for at in range(0, len(texts), _PASS_TEXTS):
        chosen = texts[at : at + _PASS_TEXTS]
        ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(ids) for ids, _ in chosen], batch_first=True)
        states = target.model(ids, output_hidden_states=True).hidden_states
        taps = torch.cat([states[layer] for layer in tap_layers], -1).bfloat16()
        last = states[-1].bfloat16()
        for row, (tokens, num_prompt_tokens) in enumerate(chosen):
            length = len(tokens)
            found.append(
                Text(
                    ids[row, :length].clone(), num_prompt_tokens, taps[row, :length].clone(), last[row, :length].clone()
                )
            )
    return found


def frequent_ids(texts: list[Tokens], count: int) -> Tensor:
    """int64 [count], ascending: the tokens that the texts have most, then those of the lowest ids, which a BPE
    vocabulary learnt first."""
    seen = Counter(token for ids, _ in texts for token in ids)
    ordered = [token for token, _ in seen.most_common()]
    rest = (token for token in range(2 * count) if token not in seen)
    return torch.tensor(sorted([*ordered, *rest][:count]))
