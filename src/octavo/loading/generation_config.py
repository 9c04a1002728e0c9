"""Which generation_config.json stands in where a request leaves its sampling parameters open."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_NAME = "generation_config.json"
_OFF = ("off", "vllm")


def choose_generation_config(choice: str, own: dict[str, Any]) -> dict[str, Any]:
    """own: the model's. choice: "auto" for it, "off" or "vllm" for none, else a folder or a file.

    Raises ValueError naming the option or the file that is not one.
    """
    if choice == "auto":
        return own
    if choice in _OFF:
        return {}
    path = Path(choice).expanduser()
    if path.is_dir():
        path /= _NAME
    if not path.is_file():
        raise ValueError(f"generation_config={choice} holds no {_NAME}; allowed: auto, off, vllm, or a folder with one")
    try:
        values = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"generation_config={choice}: {path} is not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"generation_config={choice}: {path} does not hold a JSON object")
    return values
