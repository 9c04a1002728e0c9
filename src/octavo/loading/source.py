"""Where a model comes from: its files, its config, its tokenizer. Nothing is loaded yet, and torch is not needed."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from octavo.config import EngineOptions, LoadFormat, OutputFacts
from octavo.loading import hub
from octavo.loading.gguf_config import config_of, generation_config_of
from octavo.loading.gguf_file import read_gguf
from octavo.loading.json_file import read_json
from octavo.loading.package import PACKAGES, find, pull, refuse_revision
from octavo.loading.sentence import as_embedding_model, output_facts

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
_QUANTIZATION_FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq"}  # and their quant_method
_OF_SAFETENSORS = ("safetensors", "bitsandbytes")  # values of load_format
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """A model that was found.

    path: the folder or .gguf file; files: those that hold weights, none for "dummy";
    config: as config.json says it, also for GGUF; tokenizer_path: a folder, or the .gguf file; outputs: what it is for.
    """

    name: str
    format: Literal["safetensors", "gguf", "dummy"]
    path: Path
    files: tuple[Path, ...]
    config: dict[str, Any]
    generation_config: dict[str, Any]
    tokenizer_path: Path
    outputs: OutputFacts = field(default_factory=OutputFacts)

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Ids that end an output: those of generation_config, else those of config."""
        ids = self.generation_config.get("eos_token_id", self.config.get("eos_token_id"))
        if ids is None:
            return ()
        return (ids,) if isinstance(ids, int) else tuple(ids)


def source_of(options: EngineOptions) -> ModelSource:
    """The model that options name. Raises as `resolve_source`."""
    return resolve_source(
        options.model,
        revision=options.revision,
        load_format=options.load_format,
        tokenizer=options.tokenizer,
        hf_overrides=options.hf_overrides,
    )


def resolve_source(
    model: str,
    *,
    revision: str | None = None,
    load_format: LoadFormat = "auto",
    tokenizer: str | None = None,
    hf_overrides: str | None = None,
) -> ModelSource:
    """Find a model, fetching what is not on this machine.

    model: a folder, a .gguf file, a hub id, or a key of PACKAGES; tokenizer: a folder, a .gguf file or a hub id;
    hf_overrides: JSON object of fields that stand in for those of config.json.
    Raises ValueError naming the file at fault, or the model where there is none; OSError if it cannot be had.
    """
    if load_format == "gguf" and find(model) is None and hub.is_hub_id(model):
        raise ValueError(f"load_format='gguf' and model {model!r} is a hub id; allowed: a file or folder")
    path = _locate(model, revision, hub.CONFIG_FILES if load_format == "dummy" else None)
    tokenizer_path = path if tokenizer is None else _locate(tokenizer, None, hub.TOKENIZER_FILES)
    weights = path if path.is_file() else _gguf_in(path, load_format)
    if weights is not None:
        if hf_overrides is not None:
            raise ValueError(f"hf_overrides={hf_overrides[:80]!r} is refused for a GGUF file, which has no config.json")
        return _gguf_source(model, weights, load_format, weights if tokenizer is None else tokenizer_path)
    generation = path / "generation_config.json"
    files = () if load_format == "dummy" else _safetensors_in(path)
    config = as_embedding_model(path, _overridden(_with_quantization(path), hf_overrides))
    return ModelSource(
        name=model,
        format="dummy" if load_format == "dummy" else "safetensors",
        path=path,
        files=files,
        config=config,
        generation_config=read_json(generation) if generation.is_file() else {},
        tokenizer_path=tokenizer_path,
        outputs=output_facts(path, config),
    )


def _locate(name: str, revision: str | None, files: tuple[str, ...] | None) -> Path:
    """The file or folder of a name. files: patterns of what is wanted of a hub model; None for all of it."""
    path = Path(name).expanduser()
    if name not in PACKAGES and path.exists():
        refuse_revision(name, revision)
        return path
    return hub.fetch(name, revision, files) if files and hub.is_hub_id(name) else pull(name, revision)


def _gguf_source(name: str, path: Path, load_format: LoadFormat, tokenizer_path: Path) -> ModelSource:
    _refuse_pickle(path)
    if path.suffix != ".gguf" or load_format in _OF_SAFETENSORS:
        raise ValueError(f"{path} is no {'.gguf' if load_format not in _OF_SAFETENSORS else 'folder of safetensors'}")
    file = read_gguf(path)
    dummy = load_format == "dummy"
    return ModelSource(
        name=name,
        format="dummy" if dummy else "gguf",
        path=path,
        files=() if dummy else (path,),
        config=config_of(file),
        generation_config=generation_config_of(file),
        tokenizer_path=tokenizer_path,
    )


def _gguf_in(folder: Path, load_format: LoadFormat) -> Path | None:
    """The folder's one GGUF file, if that is what to load from it."""
    if load_format in _OF_SAFETENSORS or (load_format != "gguf" and (folder / "config.json").is_file()):
        return None
    found = sorted(folder.glob("*.gguf"))
    if len(found) > 1:
        raise ValueError(f"{folder} holds {len(found)} GGUF files; name one: {', '.join(p.name for p in found)}")
    if not found and load_format == "gguf":
        raise ValueError(f"{folder} holds no GGUF file")
    return found[0] if found else None


def _safetensors_in(folder: Path) -> tuple[Path, ...]:
    """The single file, or the shards that the index names."""
    single, index = folder / SINGLE_NAME, folder / INDEX_NAME
    if index.is_file():
        holders = read_json(index).get("weight_map")
        if not isinstance(holders, dict) or not all(isinstance(holder, str) for holder in holders.values()):
            raise ValueError(f"{index}: weight_map is not a map of tensor names to file names")
        names = sorted(set(holders.values()))
        for name in names:
            if Path(name).name != name:
                raise ValueError(f"{index}: weight_map names {name!r}, which is not a plain file name")
            if not (folder / name).is_file():
                raise ValueError(f"{folder / name} is missing; {INDEX_NAME} names it")
        return tuple(folder / name for name in names)
    if single.is_file():
        return (single,)
    for pattern in _PICKLES:
        for found in sorted(folder.glob(pattern)):
            _refuse_pickle(found)
    raise ValueError(f"{folder} holds neither {SINGLE_NAME} nor {INDEX_NAME}")


def _refuse_pickle(path: Path) -> None:
    if any(path.match(pattern) for pattern in _PICKLES):
        raise ValueError(f"{path} is a pickle, which can run code when it is read; convert it to safetensors")


def _with_quantization(folder: Path) -> dict[str, Any]:
    """config.json, with the quantization_config that some packers put into a file of its own."""
    config = read_json(folder / "config.json")
    for name, method in _QUANTIZATION_FILES.items():
        if not config.get("quantization_config") and (folder / name).is_file():
            config["quantization_config"] = {"quant_method": method} | read_json(folder / name)
    return config


def _overridden(config: dict[str, Any], hf_overrides: str | None) -> dict[str, Any]:
    """Raises ValueError naming hf_overrides where it is no JSON object."""
    if hf_overrides is None:
        return config
    try:
        values = json.loads(hf_overrides)
    except ValueError:
        values = None
    if not isinstance(values, dict):
        raise ValueError(f"hf_overrides={hf_overrides[:80]!r} is not allowed; allowed: a JSON object")
    return config | values
