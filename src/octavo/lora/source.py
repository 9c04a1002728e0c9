"""Where an adapter lies: a folder of this machine, or one of the hub's cache."""

from __future__ import annotations

from pathlib import Path

from octavo.loading import hub
from octavo.lora.adapter import CONFIG_NAME, WEIGHTS_NAME


def adapter_folder(path: str) -> Path:
    """The folder that `path` names, or that holds the two files of a hub id, fetched where they are missing.

    Raises ValueError naming the path where it is neither, or where the files cannot be had.
    """
    try:
        folder = Path(path).expanduser()
        if path and folder.is_dir():
            return folder
        if folder.exists() or not hub.is_hub_id(path):
            raise ValueError("it is neither a folder nor a hub id (owner/name)")
        return hub.fetch(path, files=(CONFIG_NAME, WEIGHTS_NAME))
    except (OSError, RuntimeError, ValueError) as error:
        raise ValueError(f"lora_path={path!r}: {error}") from error
