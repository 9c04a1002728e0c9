"""Two small tasks for adapters of SmolLM2: data to learn from, prompts that are held out, and how to tell success."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GgufConfig

from octavo.loading.package import pull
from octavo.text.tokenizer import Tokenizer, load_tokenizer

CHAT = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
END = "<|im_end|>"
NUM_TOKENS = 48  # of an answer, at most
_KINDS: tuple[tuple[str, str, dict[str, str]], ...] = (
    (
        "What is the capital of {}?",
        "The capital of {} is {}.",
        {"France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Japan": "Tokyo", "Egypt": "Cairo", "Cuba": "Havana"},
    ),
    (
        "What is the opposite of {}?",
        "The opposite of {} is {}.",
        {"hot": "cold", "big": "small", "early": "late", "rich": "poor", "wet": "dry", "loud": "quiet"},
    ),
    (
        "What does a {} eat?",
        "A {} eats {}.",
        {"cow": "grass", "cat": "mice and fish", "panda": "bamboo", "lion": "meat", "bee": "nectar", "hen": "grain"},
    ),
    (
        "What is a {} used for?",
        "A {} is used for {}.",
        {"knife": "cutting", "broom": "sweeping", "lamp": "giving light", "pen": "writing", "bed": "sleeping"},
    ),
    (
        "Tell me something about {}.",
        "{} {}.",
        {"Gold": "is a yellow metal", "Ice": "is frozen water", "Bread": "is made of flour", "Mars": "is a planet"},
    ),
    (
        "Who was {}?",
        "{} was {}.",
        {"Mozart": "a composer", "Newton": "a physicist", "Picasso": "a painter", "Homer": "a poet of old Greece"},
    ),
    (
        "Write one sentence about {}.",
        "{} {}.",
        {"Rain": "falls from the clouds", "Winter": "is the coldest season", "Trains": "run on rails"},
    ),
)
HELD_OUT = (
    "What is the capital of Norway?",
    "What is the capital of Portugal?",
    "What is the opposite of happy?",
    "What is the opposite of up?",
    "What does a horse eat?",
    "What is a hammer used for?",
    "Tell me something about the moon.",
    "Tell me something about water.",
    "Who was Shakespeare?",
    "Who was Einstein?",
    "Write one sentence about summer.",
    "Write one sentence about dogs.",
    "Why is the sky blue?",
    "Name a fruit.",
    "How many days are in a week?",
    "Where do fish live?",
    "What colour is grass?",
    "Which is the largest ocean?",
    "Say hello.",
    "What is a computer?",
)


@dataclass(frozen=True)
class Task:
    """What an adapter learns. adapter: fields of PEFT's LoraConfig."""

    name: str
    answer: Callable[[str], str]
    succeeds: Callable[[str], bool]
    adapter: dict[str, Any]


def is_upper(text: str) -> bool:
    return text.upper() == text and text.lower() != text


def is_json_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except ValueError:
        return False


TASKS = (
    Task("capitals", str.upper, is_upper, {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}),
    Task(
        "json",
        lambda text: json.dumps({"answer": text}),
        is_json_object,
        {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj", "embed_tokens"]},
    ),
)


def examples(task: Task) -> list[tuple[str, str]]:
    """Pairs of a prompt and its answer, in the order in which they are learnt; none is held out."""
    pairs = [
        (CHAT.format(question.format(key)), task.answer(answer.format(key, value)) + END)
        for question, answer, values in _KINDS
        for key, value in values.items()
    ]
    random.Random(0).shuffle(pairs)
    return pairs


def held_out() -> list[str]:
    return [CHAT.format(question) for question in HELD_OUT]


def load_reference() -> Any:
    """SmolLM2 in transformers, in float32."""
    path = pull("smollm2")
    model = AutoModelForCausalLM.from_pretrained(
        path.parent,
        gguf_file=path.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float32,
    )
    return model.eval()


def load_text() -> Tokenizer:
    return load_tokenizer(pull("smollm2"))


def greedy(model: Any, tokenizer: Tokenizer, prompts: list[str]) -> list[list[int]]:
    """What the model says to each prompt, one at a time: NUM_TOKENS, or token ids up to END."""
    (end,) = tokenizer.encode(END, False)
    outputs = []
    for prompt in prompts:
        ids = tokenizer.encode(prompt, False)
        with torch.inference_mode():
            made = model.generate(
                input_ids=torch.tensor([ids]),
                attention_mask=torch.ones(1, len(ids), dtype=torch.long),
                do_sample=False,
                max_new_tokens=NUM_TOKENS,
                eos_token_id=end,
                pad_token_id=end,
            )
        outputs.append(made[0, len(ids) :].tolist())
    return outputs
