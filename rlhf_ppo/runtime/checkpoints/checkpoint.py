"""Checkpoints on disk: read one, and verify that it is complete and undamaged.

A checkpoint is a folder ``checkpoint-<step>`` of safetensors and JSON files; a manifest has their sizes and SHA-256.
A group of tensors is one file ``<group>.safetensors``, or one a process, ``<group>.<rank>.safetensors`` from the second
process on, where several processes share its weights (:mod:`rlhf_ppo.runtime.checkpoints.stored_tensors`).
Nothing is ever unpickled, and a file is parsed only after its checksum has been verified.
:mod:`rlhf_ppo.runtime.checkpoints.checkpoint_commit` writes them.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_ppo.runtime.checkpoints.stored_tensors import StoredTensors, open_groups
from rlhf_ppo.runtime.package import __version__

MANIFEST, STATE = "manifest.json", "state.json"
_PREFIX = "checkpoint-"
FORMAT, IN_PIECES = 1, 2
"""Format of a checkpoint, and of one whose tensors are in pieces, which versions before it cannot read."""


class CheckpointError(ValueError):
    """A checkpoint is damaged, incomplete or of another run."""


@dataclass(frozen=True)
class Checkpoint:
    """The content of a checkpoint folder, verified."""

    folder: Path
    step: int
    tensors: Mapping[str, StoredTensors]
    """Group -> name -> tensor, on the CPU, read from the files when it is asked for."""
    state: dict[str, Any]
    """Everything but tensors, as read from JSON (tuples become lists)."""
    settings: dict[str, Any]
    fingerprints: dict[str, Any]


def checkpoint_folder(root: str | Path, step: int) -> Path:
    """Return the path of a step's checkpoint in a run's folder."""
    return Path(root) / f"{_PREFIX}{step}"


def list_checkpoints(root: str | Path) -> list[Path]:
    """List the folders ``checkpoint-<n>`` in a run's folder, good or bad, oldest first."""
    found = [path for path in Path(root).glob(f"{_PREFIX}*") if path.is_dir() and checkpoint_step(path) is not None]
    return sorted(found, key=lambda path: checkpoint_step(path) or 0)


def checkpoint_step(folder: Path) -> int | None:
    """Return the step in a checkpoint folder's name, or None if it is no such name."""
    number = folder.name.removeprefix(_PREFIX)
    return int(number) if folder.name.startswith(_PREFIX) and number.isascii() and number.isdigit() else None


def file_facts(file: Path) -> dict[str, Any]:
    """Return what the manifest says of a file: its size and SHA-256."""
    with file.open("rb") as handle:
        return {"bytes": os.fstat(handle.fileno()).st_size, "sha256": hashlib.file_digest(handle, "sha256").hexdigest()}


def manifest_text(manifest: Mapping[str, Any]) -> str:
    """Format a manifest as JSON, with a checksum over its own other entries."""
    body = {key: value for key, value in manifest.items() if key != "sha256"}
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    return json.dumps({**body, "sha256": digest}, indent=1) + "\n"


def verify_checkpoint(folder: str | Path) -> list[str]:
    """Verify every file of a checkpoint; returns one sentence per problem, which begins with the file's name."""
    return _examine(Path(folder))[1]


def _examine(folder: Path) -> tuple[dict[str, Any], list[str]]:
    """Return the manifest and the problems that :func:`verify_checkpoint` lists."""
    if not folder.is_dir():
        return {}, [f"{folder.name}: does not exist"]
    try:
        manifest = read_manifest(folder)
    except CheckpointError as error:
        return {}, [str(error)]
    problems: list[str] = []
    for name, facts in manifest["files"].items():
        file = folder / name
        if Path(name).name != name or file.suffix not in (".safetensors", ".json"):
            problems.append(f"{MANIFEST}: lists {name!r}, which cannot be part of a checkpoint")
        elif file.is_symlink() or not file.is_file():
            problems.append(f"{name}: is missing")
        elif (size := file.stat().st_size) != facts["bytes"]:
            problems.append(f"{name}: has {size} bytes instead of {facts['bytes']}")
        elif file_facts(file) != facts:
            problems.append(f"{name}: its checksum does not match: it was changed after it was written")
    return manifest, problems


def intact_manifest(file: Path) -> dict[str, Any] | None:
    """Read what :func:`manifest_text` wrote; None: it is no JSON, or its checksum does not match."""
    try:
        text = file.read_text(encoding="utf-8")
        manifest = json.loads(text)
        return manifest if isinstance(manifest, dict) and manifest_text(manifest) == text else None
    except (ValueError, RecursionError):
        return None


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """Read a checkpoint's manifest and verify its own checksum.

    Raises:
        CheckpointError: it is missing or damaged; begins with the file's name.
    """
    file = Path(folder) / MANIFEST
    if not file.is_file():
        older = " (its state.json is of a version that wrote no manifest)" if (Path(folder) / STATE).is_file() else ""
        raise CheckpointError(f"{MANIFEST}: is missing, so the checkpoint is incomplete{older}")
    if (manifest := intact_manifest(file)) is None:
        raise CheckpointError(f"{MANIFEST}: its checksum does not match: it was changed after it was written")
    if manifest["format"] not in (FORMAT, IN_PIECES):
        raise CheckpointError(
            f"{MANIFEST}: has format {manifest['format']}, but this version ({__version__}) reads formats {FORMAT} and "
            f"{IN_PIECES}: use version {manifest['versions']['rlhf_ppo']}"
        )
    return manifest


def read_checkpoint(folder: str | Path) -> Checkpoint:
    """Verify a checkpoint and read it.

    Raises:
        FileNotFoundError: the folder does not exist.
        CheckpointError: files are missing or damaged; names each of them. Nothing of it is used.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"checkpoint {folder} does not exist")
    manifest, problems = _examine(folder)
    if problems:
        raise CheckpointError(f"checkpoint {folder} cannot be used: {'; '.join(problems)}")
    try:
        tensors = open_groups(folder, manifest["files"])
    except ValueError as error:
        raise CheckpointError(f"checkpoint {folder} cannot be used: {error}") from None
    return Checkpoint(
        folder,
        manifest["step"],
        tensors,
        json.loads((folder / STATE).read_text(encoding="utf-8")),
        manifest["settings"],
        manifest["fingerprints"],
    )


def as_json(value: Mapping[str, Any]) -> dict[str, Any]:
    """Convert a mapping to what JSON gives back: tuples become lists, values unknown to JSON become text."""
    return json.loads(json.dumps(dict(value), default=str))
