"""Commit a checkpoint: a folder that is written whole or not at all.

Write into ``.tmp-<step>``, fsync every file, write the manifest (sizes, SHA-256, settings, fingerprints) last, rename
to ``checkpoint-<step>``, fsync the parent, and only then delete older ones. A process that is killed at any point
leaves the earlier checkpoints as they were. Of several processes that share the weights, each writes its pieces; the
first one writes the manifest, with the checksums of all, once the files of all are on disk.
"""

from __future__ import annotations

import errno
import json
import os
import platform
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from rlhf_ppo.runtime.checkpoints.checkpoint import (
    FORMAT,
    IN_PIECES,
    MANIFEST,
    STATE,
    as_json,
    checkpoint_folder,
    checkpoint_step,
    file_facts,
    list_checkpoints,
    manifest_text,
    verify_checkpoint,
)
from rlhf_ppo.runtime.checkpoints.stored_tensors import Piece, bytes_of, open_groups, save_tensors
from rlhf_ppo.runtime.files import TEMPORARY, follow_umask, require_space, sync_file, sync_folder
from rlhf_ppo.runtime.package import __version__
from rlhf_ppo.runtime.processes.group import ALONE, ProcessGroup


def write_checkpoint(
    root: str | Path,
    step: int,
    *,
    tensors: Mapping[str, Mapping[str, Tensor | Piece]],
    state: Mapping[str, Any],
    settings: Mapping[str, Any] | None = None,
    fingerprints: Mapping[str, Any] | None = None,
    keep: int | None = None,
    spare: Collection[int] = (),
    processes: ProcessGroup = ALONE,
) -> Path:
    """Commit ``checkpoint-<step>`` into a run's folder.

    Args:
        root: the run's folder.
        step: number in the folder's name.
        tensors: group -> name -> tensor; each group is one file ``<group>.safetensors``.
        state: everything else, as JSON.
        settings, fingerprints: compared with those of a run that resumes
            (:mod:`rlhf_ppo.runtime.checkpoints.resume`), as JSON.
        keep: number of good checkpoints to keep, this one included; older ones are deleted after the commit. None: all.
        spare: steps that are never deleted, such as the best so far; they do not count toward ``keep``.
        processes: those that hold pieces of tensors, and call together: each writes its own into a file of its own.
            Everything else is the first one's.
    Returns:
        The checkpoint's folder.
    Raises:
        FileExistsError: a good checkpoint of this step exists; committed checkpoints are never overwritten.
        OSError: writing failed, usually on a full disk. Earlier checkpoints are untouched, and nothing partial is left.
    """
    root, folder = Path(root), checkpoint_folder(root, step)
    temporary = root / f"{TEMPORARY}{step}"
    ready = {group: _own(named, processes) for group, named in tensors.items()}
    content = {STATE: json.dumps(state, indent=1) + "\n"}
    header = {
        "format": IN_PIECES
        if any(isinstance(x, Piece) for named in ready.values() for x in named.values())
        else FORMAT,
        "step": step,
        "versions": {"rlhf_ppo": __version__, "torch": torch.__version__, "python": platform.python_version()},
        "settings": as_json(settings or {}),
        "fingerprints": as_json(fingerprints or {}),
    }
    # Each failure reaches all processes as the same error, before anything is committed.
    try:
        needed = sum(processes.facts(lambda: _bytes(ready, content if processes.first else {})))
        processes.on_first(lambda: _begin(folder, temporary, needed))
        written = processes.facts(lambda: _write_tensors(temporary, ready, processes))
        files = {name: facts for part in written for name, facts in part.items()}
        processes.on_first(lambda: _commit(folder, temporary, header, files, content))
    except OSError as error:
        if processes.first:
            shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, FileExistsError):
            raise
        raise OSError(
            error.errno or errno.EIO,
            f"checkpoint of step {step} could not be written into {root}: {error.strerror or error}. "
            "Earlier checkpoints are untouched; free some space, or keep fewer checkpoints, then resume from the last",
        ) from error
    if keep is not None:
        processes.on_first(lambda: len(prune(root, keep=keep, spare=spare)))
    return folder


def _own(named: Mapping[str, Tensor | Piece], processes: ProcessGroup) -> dict[str, Tensor | Piece]:
    """Return what this process writes of a group: its pieces, and on the first one whole tensors."""
    return {n: x for n, x in named.items() if (len(x.rows) > 0 if isinstance(x, Piece) else processes.first)}


def _begin(folder: Path, temporary: Path, needed: int) -> None:
    """Make the temporary folder of a checkpoint."""
    if folder.exists() and not verify_checkpoint(folder):
        raise FileExistsError(errno.EEXIST, "a good checkpoint of this step already exists", str(folder))
    folder.parent.mkdir(parents=True, exist_ok=True)
    _discard_leftovers(folder.parent)
    require_space(folder.parent, needed)
    temporary.mkdir()


def _write_tensors(
    temporary: Path, ready: Mapping[str, Mapping[str, Tensor | Piece]], processes: ProcessGroup
) -> dict[str, dict[str, Any]]:
    """Write this process's files; returns their names with size and checksum."""
    files: dict[str, dict[str, Any]] = {}
    for group, named in ready.items():
        if named or processes.first:
            file = temporary / (f"{group}.safetensors" if processes.first else f"{group}.{processes.rank}.safetensors")
            try:
                save_tensors(named, file)
            except SafetensorError as error:  # a full disk
                raise OSError(errno.EIO, str(error)) from error
            files[file.name] = _settle(file)
    return files


def _commit(
    folder: Path,
    temporary: Path,
    header: Mapping[str, Any],
    files: dict[str, dict[str, Any]],
    content: Mapping[str, str],
) -> None:
    """Write the other files of a checkpoint, the manifest last, and give the folder its name."""
    if lost := [name for name in files if not (temporary / name).is_file()]:
        raise OSError(errno.ENOENT, f"{', '.join(lost)} of another process is not there: is the disk shared by all?")
    try:
        open_groups(temporary, files)
    except ValueError as error:
        raise OSError(errno.EIO, f"{error}: a process that holds them has not written") from None
    for name, text in content.items():
        (temporary / name).write_text(text, encoding="utf-8")
        files[name] = _settle(temporary / name)
    (temporary / MANIFEST).write_text(manifest_text({**header, "files": files}), encoding="utf-8")
    _settle(temporary / MANIFEST)
    sync_folder(temporary)
    if folder.exists():
        shutil.rmtree(folder)  # a damaged one: see above
    os.rename(temporary, folder)
    sync_folder(folder.parent)


def prune(root: str | Path, *, keep: int, spare: Collection[int] = ()) -> list[Path]:
    """Delete all but the ``keep`` newest good checkpoints and the steps in ``spare``; returns the deleted folders.

    Incomplete ones stay, as evidence, and do not count.
    """
    if keep < 1:
        raise ValueError(f"keep={keep} must be at least 1: without a checkpoint the run cannot resume")
    # An old checkpoint with a manifest counts as good here: hashing all of them again would take longer than the save.
    good = [p for p in list_checkpoints(root) if (p / MANIFEST).is_file() and checkpoint_step(p) not in spare]
    deleted = good[:-keep]
    for folder in deleted:
        # Renamed first, so that a kill during deletion leaves no partial checkpoint under that name.
        doomed = folder.with_name(f"{TEMPORARY}old-{folder.name}")
        os.rename(folder, doomed)
        shutil.rmtree(doomed)
    return deleted


def _discard_leftovers(root: Path) -> None:
    """Delete what a killed save left behind; the run's lock keeps other processes from saving here."""
    for leftover in root.glob(f"{TEMPORARY}*"):
        if leftover.is_dir():
            shutil.rmtree(leftover)
        else:
            leftover.unlink()


def _bytes(tensors: Mapping[str, Mapping[str, Tensor | Piece]], content: Mapping[str, str]) -> int:
    """Return an upper bound of a checkpoint's size on disk."""
    return sum(map(bytes_of, tensors.values())) + sum(len(text.encode()) for text in content.values()) + 2**16


def _settle(file: Path) -> dict[str, Any]:
    """Fsync a file; returns its size and checksum."""
    follow_umask(file)
    sync_file(file)
    return file_facts(file)
