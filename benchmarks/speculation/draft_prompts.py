"""Questions for SmolLM2 that drafts are trained on, and others, of topics that training never sees, to measure with."""

from __future__ import annotations

import random

CHAT = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
END = "<|im_end|>"
_TEMPLATES = (
    "What is {}?",
    "Explain {} to a child.",
    "Write a short paragraph about {}.",
    "List five facts about {}.",
    "Write a short story about {}.",
    "Why is {} important?",
    "Give me some tips about {}.",
    "What are the advantages and disadvantages of {}?",
    "Write an email to a colleague about {}.",
    "How does {} work?",
    "Summarize the history of {}.",
    "Write a Python program that is about {}.",
    "Describe {} in one sentence.",
    "Write a poem about {}.",
    "What should a beginner know about {}?",
    "Compare {} with something similar.",
)
_TOPICS = (
    *("photosynthesis", "the solar system", "gravity", "electricity", "climate change", "evolution", "volcanoes"),
    *("the ocean", "rainforests", "dinosaurs", "bees", "cats", "horses", "birds", "trees", "the human heart", "sleep"),
    *(
        "exercise",
        "healthy food",
        "coffee",
        "bread",
        "chocolate",
        "cooking",
        "gardening",
        "travel",
        "hiking",
        "swimming",
    ),
    *("football", "chess", "music", "the piano", "painting", "photography", "movies", "books", "poetry", "languages"),
    *("mathematics", "algebra", "fractions", "statistics", "physics", "chemistry", "biology", "computers", "robots"),
    *("artificial intelligence", "machine learning", "databases", "sorting a list", "prime numbers", "the internet"),
    *("web design", "cybersecurity", "money", "saving money", "inflation", "trade", "democracy", "voting", "laws"),
    *("the Roman Empire", "ancient Egypt", "the Middle Ages", "the Industrial Revolution", "the printing press"),
    *("space travel", "airplanes", "trains", "bicycles", "electric cars", "solar power", "recycling", "water"),
    *("friendship", "kindness", "leadership", "teamwork", "a job interview", "time management", "stress", "holidays"),
    *("winter", "summer", "a lost dog", "a brave knight", "a magic forest", "Paris", "Japan", "India", "Brazil"),
)
_HELD_OUT_TOPICS = (
    *("the moon", "vaccines", "the violin", "tennis", "cheese", "earthquakes", "recursion", "the French Revolution"),
    *("public speaking", "elephants", "wind power", "Canada"),
)


def _chats(topics: tuple[str, ...], seed: int) -> list[str]:
    made = [CHAT.format(template.format(topic)) for topic in topics for template in _TEMPLATES]
    random.Random(seed).shuffle(made)
    return made


def training_prompts(count: int) -> list[str]:
    """So many of the prompts, the same for the same count."""
    return _chats(_TOPICS, 0)[:count]


def held_out_prompts(count: int) -> list[str]:
    """So many prompts about topics that no training prompt has."""
    return _chats(_HELD_OUT_TOPICS, 1)[:count]
