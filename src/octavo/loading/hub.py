"""Models of the Hugging Face hub, through its own client and cache."""

from __future__ import annotations

import re
from pathlib import Path

from octavo.config import hub_token

_ID = re.compile(r"[\w.-]+/[\w.-]+")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
_SENTENCE_FILES = ("modules.json", "config_sentence_transformers.json", "sentence_bert_config.json", "*_*/config.json")
CONFIG_FILES = ("config.json", "generation_config.json", *TOKENIZER_FILES, *_SENTENCE_FILES)
_MODEL_FILES = (*CONFIG_FILES, "*.safetensors", "*.safetensors.index.json")
_OTHER_COPIES = ("original/*", "consolidated*")  # of the same weights, under other names


def is_hub_id(name: str) -> bool:
    """Whether it reads "owner/name"."""
    return _ID.fullmatch(name) is not None


def fetch(name: str, revision: str | None = None, files: tuple[str, ...] = _MODEL_FILES) -> Path:
    """The folder of a hub model in the local cache, its files fetched where they are missing.

    files: patterns of what is wanted. Offline, what the cache holds is used.
    Raises ValueError for a name that is no hub id or that the hub does not know, OSError if it cannot be reached.
    """
    if not is_hub_id(name):
        raise ValueError(f"model {name!r} is neither a file or folder, nor a hub id (owner/name)")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError

    at = f" at revision {revision!r}" if revision else ""
    try:
        folder = snapshot_download(
            name, revision=revision, token=hub_token(), allow_patterns=list(files), ignore_patterns=list(_OTHER_COPIES)
        )
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise ValueError(f"the hub has no model {name!r}{at}, or not for this token ($HF_TOKEN)") from error
    except LocalEntryNotFoundError as error:
        raise OSError(f"hub model {name!r}{at} is not in the cache, and the hub cannot be reached") from error
    except OSError as error:
        raise OSError(f"hub model {name!r}{at} cannot be fetched: {error}") from error
    return Path(folder)


def find(name: str, revision: str | None = None) -> Path | None:
    """The folder of a hub model that the local cache holds, None if there is none."""
    if not is_hub_id(name):
        return None
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(name, "config.json", revision=revision)
    return Path(config).parent if isinstance(config, str) else None
