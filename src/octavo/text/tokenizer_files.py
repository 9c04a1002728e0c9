"""A tokenizer out of a model folder: tokenizer.json and the small files beside it (Hugging Face layout)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers.processors import TemplateProcessing


@dataclass(frozen=True)
class TokenizerParts:
    """What a model's files say of its text side. Tokens are strings, None where the model has none.

    eos_token_ids: every id that ends an output, the tokenizer's own first.
    """

    backend: tokenizers.Tokenizer
    bos_token: str | None
    eos_token: str | None
    eos_token_ids: tuple[int, ...]
    chat_template: str | None


def read_folder(folder: Path) -> TokenizerParts:
    """Raises FileNotFoundError without a tokenizer.json, ValueError naming a file that cannot be read."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no tokenizer.json; give --tokenizer a folder or model that has one")
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"{path} cannot be read: {error}") from error
    backend.no_truncation()
    backend.no_padding()
    config = {**_json(folder / "special_tokens_map.json"), **_json(folder / "tokenizer_config.json")}
    bos_token, eos_token = _content(config.get("bos_token")), _content(config.get("eos_token"))
    mark_special(backend, [bos_token, eos_token])
    # tokenizer.json says what surrounds a text; but DeepSeek's and others' leave it to the flags of the config.
    if backend.num_special_tokens_to_add(False) == 0:
        add_ends(
            backend,
            bos_token if config.get("add_bos_token") else None,
            eos_token if config.get("add_eos_token") else None,
        )
    return TokenizerParts(
        backend,
        bos_token,
        eos_token,
        eos_token_ids=_unique([backend.token_to_id(eos_token) if eos_token else None, *_generation_eos(folder)]),
        chat_template=_chat_template(folder, config),
    )


def mark_special(backend: tokenizers.Tokenizer, tokens: list[str | None]) -> None:
    """Have these tokens, where the vocabulary has them, found in text and skipped as special ones."""
    known = backend.get_added_tokens_decoder().values()
    special = {token.content for token in known if token.special}
    missing = [t for t in tokens if t is not None and t not in special and backend.token_to_id(t) is not None]
    backend.add_special_tokens([tokenizers.AddedToken(t, normalized=False, special=True) for t in missing])


def add_ends(backend: tokenizers.Tokenizer, bos_token: str | None, eos_token: str | None) -> None:
    """Put these tokens, where given, around a text that is encoded with special tokens."""
    ends = [token for token in (bos_token, eos_token) if token is not None]
    backend.post_processor = TemplateProcessing(
        single=[*([bos_token] if bos_token else []), "$A", *([eos_token] if eos_token else [])],
        special_tokens=[(token, backend.token_to_id(token)) for token in dict.fromkeys(ends)],
    )


def _generation_eos(folder: Path) -> list[int]:
    """The ids of generation_config.json; where it has none, those of config.json."""
    for name in ("generation_config.json", "config.json"):
        config = _json(folder / name)
        ids = config.get("eos_token_id", config.get("text_config", {}).get("eos_token_id"))
        if ids is not None:
            return [ids] if isinstance(ids, int) else list(ids)
    return []


def _chat_template(folder: Path, config: dict[str, Any]) -> str | None:
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {entry["name"]: entry["template"] for entry in template}
        template = named.get("default")
    return template


def _content(token: str | dict[str, Any] | None) -> str | None:
    return token["content"] if isinstance(token, dict) else token


def _unique(ids: list[int | None]) -> tuple[int, ...]:
    return tuple(dict.fromkeys(i for i in ids if i is not None))


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} does not hold a JSON object")
    return value
