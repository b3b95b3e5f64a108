"""Checkpoints of any run: tensors and JSON in a folder that exists whole or not at all, and proves that it is unharmed.

The commit: write into ``.tmp-<step>``, fsync every file, write the manifest (sizes, SHA-256, settings, fingerprints)
last, rename to ``checkpoint-<step>``, fsync the parent, and only then delete older ones. A process that is killed at
any point of it leaves the earlier checkpoints as they were. Nothing is ever unpickled: safetensors and JSON alone, and
a file is parsed only after its checksum is right.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import platform
import shutil
import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from rlhf_ppo.runtime.files import TEMPORARY, follow_umask, require_space, sync_file, sync_folder
from rlhf_ppo.runtime.versions import __version__

MANIFEST, STATE = "manifest.json", "state.json"
_PREFIX = "checkpoint-"
_FORMAT = 1


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
    found = [path for path in Path(root).glob(f"{_PREFIX}*") if path.is_dir() and _step(path) is not None]
    return sorted(found, key=lambda path: _step(path) or 0)


def _step(folder: Path) -> int | None:
    number = folder.name.removeprefix(_PREFIX)
    return int(number) if number.isascii() and number.isdigit() else None


# Writing


def write_checkpoint(
    root: str | Path,
    step: int,
    *,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    settings: Mapping[str, Any] | None = None,
    fingerprints: Mapping[str, Any] | None = None,
    keep: int | None = None,
    spare: Collection[int] = (),
) -> Path:
    """Commit ``checkpoint-<step>`` into a run's folder.

    Args:
        root: the run's folder.
        step: how far the run is.
        tensors: group -> name -> tensor; each group is one file ``<group>.safetensors``.
        state: the rest, as JSON.
        settings, fingerprints: what a run that resumes is compared with (:mod:`rlhf_ppo.runtime.unchanged`), as JSON.
        keep: good checkpoints to keep, this one among them, the older ones being deleted after the commit. None: all.
        spare: steps that rotation never deletes, such as the best so far; they do not count in ``keep``.
    Returns:
        The checkpoint's folder.
    Raises:
        FileExistsError: a good checkpoint of this step is there; what is committed is never touched again.
        OSError: it could not be written (a full disk, mostly). Earlier checkpoints are untouched, nothing half is left.
    """
    root, folder = Path(root), checkpoint_folder(root, step)
    if folder.exists() and not verify_checkpoint(folder):
        raise FileExistsError(errno.EEXIST, "a good checkpoint of this step is there already", str(folder))
    ready = {group: {n: x.detach().contiguous() for n, x in named.items()} for group, named in tensors.items()}
    content = {STATE: json.dumps(state, indent=1) + "\n"}
    header = {
        "format": _FORMAT,
        "step": step,
        "versions": {"rlhf_ppo": __version__, "torch": torch.__version__, "python": platform.python_version()},
        "settings": as_json(settings or {}),
        "fingerprints": as_json(fingerprints or {}),
    }
    root.mkdir(parents=True, exist_ok=True)
    _discard_leftovers(root)
    temporary = root / f"{TEMPORARY}{step}"
    try:
        require_space(root, _bytes(ready, content))
        temporary.mkdir()
        files: dict[str, dict[str, Any]] = {}
        for group, named in ready.items():
            file = temporary / f"{group}.safetensors"
            save_file(named, file)
            files[file.name] = _settle(file)
        for name, text in content.items():
            (temporary / name).write_text(text, encoding="utf-8")
            files[name] = _settle(temporary / name)
        (temporary / MANIFEST).write_text(_manifest_text({**header, "files": files}), encoding="utf-8")
        _settle(temporary / MANIFEST)
        sync_folder(temporary)
        if folder.exists():
            shutil.rmtree(folder)  # a bad one: see above
        os.rename(temporary, folder)
        sync_folder(root)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise OSError(
            getattr(error, "errno", None) or errno.EIO,
            f"checkpoint of step {step} could not be written into {root}: {getattr(error, 'strerror', None) or error}. "
            "Earlier checkpoints are untouched; free some space, or keep fewer checkpoints, then resume from the last",
        ) from error
    if keep is not None:
        prune(root, keep=keep, spare=spare)
    return folder


def prune(root: str | Path, *, keep: int, spare: Collection[int] = ()) -> list[Path]:
    """Delete all checkpoints but the ``keep`` newest good ones and the steps in ``spare``; returns the deleted.

    Bad ones stay (they are evidence) and do not count.
    """
    if keep < 1:
        raise ValueError(f"keep={keep} must be 1 or more: the newest checkpoint is the run")
    # Of an old checkpoint the manifest's presence is enough here: its checksums were right when it was committed, and
    # reading all of them again at every save would take longer than the save.
    good = [p for p in list_checkpoints(root) if (p / MANIFEST).is_file() and _step(p) not in spare]
    deleted = good[:-keep]
    for folder in deleted:
        # Renamed first: a process that is killed while deleting leaves no half checkpoint under that name.
        doomed = folder.with_name(f"{TEMPORARY}old-{folder.name}")
        os.rename(folder, doomed)
        shutil.rmtree(doomed)
    return deleted


def _discard_leftovers(root: Path) -> None:
    """What a killed save left; the run's lock keeps other processes from saving here."""
    for leftover in root.glob(f"{TEMPORARY}*"):
        if leftover.is_dir():
            shutil.rmtree(leftover)
        else:
            leftover.unlink()


def _bytes(tensors: Mapping[str, Mapping[str, Tensor]], content: Mapping[str, str]) -> int:
    """What a checkpoint takes on the disk, and a little more."""
    tensor_bytes = sum(x.numel() * x.element_size() for named in tensors.values() for x in named.values())
    names = sum(len(name) + 128 for named in tensors.values() for name in named)
    return tensor_bytes + names + sum(len(text.encode()) for text in content.values()) + 2**16


def _settle(file: Path) -> dict[str, Any]:
    """Bring a file to the disk; returns its size and checksum."""
    follow_umask(file)
    sync_file(file)
    return _facts(file)


def _facts(file: Path) -> dict[str, Any]:
    with file.open("rb") as handle:
        return {"bytes": os.fstat(handle.fileno()).st_size, "sha256": hashlib.file_digest(handle, "sha256").hexdigest()}


def _manifest_text(manifest: Mapping[str, Any]) -> str:
    """The manifest with a checksum of its own: of this very text without that line's digest."""
    body = {key: value for key, value in manifest.items() if key != "sha256"}
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    return json.dumps({**body, "sha256": digest}, indent=1) + "\n"


# Reading


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
        elif _facts(file) != facts:
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
        intact = isinstance(manifest, dict) and _manifest_text(manifest) == text
    except (ValueError, RecursionError):
        intact, manifest = False, {}
    if not intact:
        raise CheckpointError(f"{MANIFEST}: its checksum is wrong, so its content has changed since it was written")
    if manifest["format"] != _FORMAT:
        raise CheckpointError(
            f"{MANIFEST}: has format {manifest['format']}, and this version ({__version__}) reads {_FORMAT}: use "
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


def newest_good(root: str | Path) -> Checkpoint | None:
    """The newest unharmed checkpoint of a run, with a warning for each newer one that is harmed; None: it has none.

    Raises:
        CheckpointError: there are checkpoints and none is good. A run with a past never starts afresh by itself.
    """
    bad: list[str] = []
    for folder in reversed(list_checkpoints(root)):
        try:
            checkpoint = read_checkpoint(folder)
        except CheckpointError as error:
            bad.append(str(error))
            continue
        for line in bad:
            warnings.warn(f"{line}. Going on from {folder.name} instead", stacklevel=2)
        return checkpoint
    if bad:
        raise CheckpointError(
            f"no checkpoint in {root} is good, and a run that has some never starts afresh by itself. "
            f"{'. '.join(bad)}. Restore one from a copy, or name another output_dir to start anew"
        )
    return None


def find_checkpoint(wanted: str | Path, root: str | Path | None) -> Checkpoint | None:
    """What ``resume_from_checkpoint`` means, verified and read: once, however large it is.

    Args:
        wanted: a checkpoint's folder, a run's folder for the newest good one in it, or "auto": the newest good one in
            ``root``.
        root: the folder of the run that resumes.
    Returns:
        The checkpoint. None: "auto", and there is none, so that the run starts afresh. To ask for one never does.
    Raises:
        ValueError: "auto" without a root.
        FileNotFoundError: what is asked for is not there.
        CheckpointError: it is damaged, or the run has some and none is good.
    """
    if wanted == "auto":
        if root is None:
            raise ValueError("resume_from_checkpoint='auto' looks in output_dir, which is None: set it")
        return newest_good(root)
    path = Path(wanted)
    if not path.is_dir():
        there = ", ".join(folder.name for folder in list_checkpoints(path.parent)) or "none"
        raise FileNotFoundError(
            f"resume_from_checkpoint={path}: there is no such folder; checkpoints in {path.parent}: {there}"
        )
    if _step(path) is not None or (path / MANIFEST).is_file():
        return read_checkpoint(path)
    if (newest := newest_good(path)) is None:
        raise FileNotFoundError(f"resume_from_checkpoint={path}: this is no checkpoint, and no run with one")
    return newest


def as_json(value: Mapping[str, Any]) -> dict[str, Any]:
    """A mapping as JSON gives it back: tuples are lists, and what JSON does not know is its text."""
    return json.loads(json.dumps(dict(value), default=str))
