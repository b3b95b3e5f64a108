"""Checkpoints on disk: read one, and verify that it is complete and undamaged.

A checkpoint is a folder ``checkpoint-<step>`` of safetensors and JSON files; a manifest has their sizes and SHA-256.
Nothing is ever unpickled, and a file is parsed only after its checksum has been found right.
:mod:`rlhf_ppo.runtime.checkpoint_commit` writes them.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from rlhf_ppo.runtime.package import __version__

MANIFEST, STATE = "manifest.json", "state.json"
_PREFIX = "checkpoint-"
FORMAT = 1


class CheckpointError(ValueError):
    """A checkpoint is damaged, incomplete or of another run."""


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint folder holds, read and verified."""

    folder: Path
    step: int
    tensors: dict[str, dict[str, Tensor]]
    """Group -> name -> tensor, on the CPU."""
    state: dict[str, Any]
    """Everything that is no tensor, as JSON gives it back (tuples are lists)."""
    settings: dict[str, Any]
    fingerprints: dict[str, Any]


def checkpoint_folder(root: str | Path, step: int) -> Path:
    """Where the checkpoint of a step lies in a run's folder."""
    return Path(root) / f"{_PREFIX}{step}"


def list_checkpoints(root: str | Path) -> list[Path]:
    """The folders ``checkpoint-<n>`` in a run's folder, good or bad, oldest first."""
    found = [path for path in Path(root).glob(f"{_PREFIX}*") if path.is_dir() and checkpoint_step(path) is not None]
    return sorted(found, key=lambda path: checkpoint_step(path) or 0)


def checkpoint_step(folder: Path) -> int | None:
    number = folder.name.removeprefix(_PREFIX)
    return int(number) if number.isascii() and number.isdigit() else None


def file_facts(file: Path) -> dict[str, Any]:
    with file.open("rb") as handle:
        return {"bytes": os.fstat(handle.fileno()).st_size, "sha256": hashlib.file_digest(handle, "sha256").hexdigest()}


def manifest_text(manifest: Mapping[str, Any]) -> str:
    """The manifest with a checksum of its own: of this very text without that line's digest."""
    body = {key: value for key, value in manifest.items() if key != "sha256"}
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    return json.dumps({**body, "sha256": digest}, indent=1) + "\n"


def verify_checkpoint(folder: str | Path) -> list[str]:
    """What is wrong with a checkpoint, one sentence each that begins with the file's name; [] if it is good."""
    return _examine(Path(folder))[1]


def _examine(folder: Path) -> tuple[dict[str, Any], list[str]]:
    """(manifest, what :func:`verify_checkpoint` says); reads and hashes every file."""
    if not folder.is_dir():
        return {}, [f"{folder.name}: there is no such folder"]
    try:
        manifest = read_manifest(folder)
    except CheckpointError as error:
        return {}, [str(error)]
    problems: list[str] = []
    for name, facts in manifest["files"].items():
        file = folder / name
        if Path(name).name != name or file.suffix not in (".safetensors", ".json"):
            problems.append(f"{MANIFEST}: lists {name!r}, which is no file of a checkpoint")
        elif file.is_symlink() or not file.is_file():
            problems.append(f"{name}: is missing")
        elif (size := file.stat().st_size) != facts["bytes"]:
            problems.append(f"{name}: has {size} bytes instead of {facts['bytes']}")
        elif file_facts(file) != facts:
            problems.append(f"{name}: its checksum is wrong, so its content has changed since it was written")
    return manifest, problems


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """The manifest of a checkpoint, its own checksum verified.

    Raises:
        CheckpointError: there is none, or it is damaged; begins with the file's name.
    """
    file = Path(folder) / MANIFEST
    if not file.is_file():
        older = " (its state.json is of a version that wrote none)" if (Path(folder) / STATE).is_file() else ""
        raise CheckpointError(f"{MANIFEST}: is missing, so this is no complete checkpoint{older}")
    try:
        text = file.read_text(encoding="utf-8")
        manifest = json.loads(text)
        intact = isinstance(manifest, dict) and manifest_text(manifest) == text
    except (ValueError, RecursionError):
        intact, manifest = False, {}
    if not intact:
        raise CheckpointError(f"{MANIFEST}: its checksum is wrong, so its content has changed since it was written")
    if manifest["format"] != FORMAT:
        raise CheckpointError(
            f"{MANIFEST}: has format {manifest['format']}, and this version ({__version__}) reads {FORMAT}: use "
            f"version {manifest['versions']['rlhf_ppo']}"
        )
    return manifest


def read_checkpoint(folder: str | Path) -> Checkpoint:
    """Verify a checkpoint, then read it.

    Raises:
        FileNotFoundError: there is no such folder.
        CheckpointError: something is missing or damaged; names each file. Nothing of it has been used.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"checkpoint {folder} does not exist")
    manifest, problems = _examine(folder)
    if problems:
        raise CheckpointError(f"checkpoint {folder} cannot be used: {'; '.join(problems)}")
    groups = [Path(name) for name in manifest["files"] if name.endswith(".safetensors")]
    return Checkpoint(
        folder,
        manifest["step"],
        {file.stem: load_file(folder / file) for file in groups},
        json.loads((folder / STATE).read_text(encoding="utf-8")),
        manifest["settings"],
        manifest["fingerprints"],
    )


def as_json(value: Mapping[str, Any]) -> dict[str, Any]:
    """A mapping as JSON gives it back: tuples are lists, and what JSON does not know is its text."""
    return json.loads(json.dumps(dict(value), default=str))
