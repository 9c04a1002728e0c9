"""What a model's outputs are, and how its embeddings are made: its architecture, and the files that
sentence-transformers (Reimers & Gurevych, 2019) puts beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from octavo.config import OutputFacts, output_head
from octavo.loading.json_file import read_json

MODULES_NAME = "modules.json"
_PROMPTS_NAME = "config_sentence_transformers.json"
_BERT_NAME = "sentence_bert_config.json"
_STEPS = (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"])
_MODES: dict[str, Literal["last", "mean"]] = {"lasttoken": "last", "mean": "mean"}


def output_facts(folder: Path, config: dict[str, Any]) -> OutputFacts:
    """Of the model in a folder. config: its config.json, which `as_embedding_model` may have changed.

    Raises ValueError naming the file and the field that is not supported.
    """
    head = output_head((config.get("architectures") or [""])[0])
    size = config.get("hidden_size")
    facts: dict[str, Any] = {"head": head, "dimensions": _dimensions(config)}
    facts |= {"hidden_size": size} if isinstance(size, int) else {}  # else the model itself refuses it
    if head != "embeddings" or not (folder / MODULES_NAME).is_file():
        return OutputFacts(**facts)
    modules = read_json(folder / MODULES_NAME, list)
    steps = [str(module.get("type")).rpartition(".")[2] if isinstance(module, dict) else "" for module in modules]
    if steps not in _STEPS:
        allowed = " or ".join(", ".join(each) for each in _STEPS)
        raise ValueError(
            f"{folder / MODULES_NAME}: the modules {', '.join(steps)} are not supported; allowed: {allowed}"
        )
    if modules[0].get("path"):
        raise ValueError(f"{folder / MODULES_NAME}: path={modules[0]['path']!r} of Transformer; allowed: ''")
    pooling = folder / str(modules[1].get("path")) / "config.json"
    if not pooling.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"{folder / MODULES_NAME}: path={modules[1]['path']!r} of Pooling lies outside the folder")
    facts |= {"pooling": _pooling(pooling), "normalize": len(steps) == 3, "prefix": _prefix(folder)}
    _refuse_lower_case(folder)
    return OutputFacts(**facts)


def as_embedding_model(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    """`config` of a model that sentence-transformers made: its language head, if it has one, is not used."""
    names = config.get("architectures") or []
    if not (folder / MODULES_NAME).is_file() or not names or output_head(names[0]) != "tokens":
        return config
    return {**config, "architectures": [names[0].removesuffix("ForCausalLM") + "Model"]}


def _pooling(path: Path) -> Literal["last", "mean"]:
    """Which of the hidden states make an embedding."""
    values = read_json(path)
    prefix = "pooling_mode_"
    modes = [name.removeprefix(prefix) for name, on in values.items() if name.startswith(prefix) and on is True]
    modes = [mode.removesuffix("_tokens") if mode == "mean_tokens" else mode for mode in modes]
    if not modes and isinstance(values.get("pooling_mode"), str):
        modes = [values["pooling_mode"]]
    if len(modes) != 1 or modes[0] not in _MODES:
        raise ValueError(
            f"{path}: pooling_mode {', '.join(modes) or 'none'} is not supported; allowed: {', '.join(_MODES)}"
        )
    if values.get("include_prompt", True) is not True and modes[0] == "mean":
        raise ValueError(f"{path}: include_prompt={values['include_prompt']!r} is not supported; allowed: true")
    return _MODES[modes[0]]


def _prefix(folder: Path) -> str:
    """The text that stands before every input, unless that asks for another: the default prompt."""
    path = folder / _PROMPTS_NAME
    values = read_json(path) if path.is_file() else {}
    name, prompts = values.get("default_prompt_name"), values.get("prompts") or {}
    if name is None:
        return ""
    if not isinstance(prompts, dict) or not isinstance(prompts.get(name), str):
        raise ValueError(f"{path}: default_prompt_name={name!r} is not among its prompts")
    return str(prompts[name])


def _refuse_lower_case(folder: Path) -> None:
    path = folder / _BERT_NAME
    if path.is_file() and read_json(path).get("do_lower_case", False):
        raise ValueError(f"{path}: do_lower_case=true is not supported; allowed: false")


def _dimensions(config: dict[str, Any]) -> tuple[int, ...] | None:
    """The lengths to which embeddings may be cut (matryoshka_dimensions), () for any (is_matryoshka)."""
    listed = config.get("matryoshka_dimensions")
    if listed is None:
        return () if config.get("is_matryoshka") is True else None
    if not isinstance(listed, list) or not listed or not all(type(each) is int and each > 0 for each in listed):
        raise ValueError(f"config field matryoshka_dimensions={listed!r} is out of range; allowed: integers >= 1")
    return tuple(listed)
