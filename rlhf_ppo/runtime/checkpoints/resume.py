"""Resume: choose the checkpoint that a run continues from, and check that it is the same run.

The `check` command says the same of a run's folder: which checkpoints are good, and which one would be resumed.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from rlhf_ppo.runtime.checkpoints.checkpoint import (
    MANIFEST,
    Checkpoint,
    CheckpointError,
    as_json,
    checkpoint_step,
    list_checkpoints,
    read_checkpoint,
    read_manifest,
    verify_checkpoint,
)
from rlhf_ppo.runtime.command_line.commands import CheckArgs


def newest_good(root: str | Path) -> Checkpoint | None:
    """Read the newest good checkpoint of a run; warns of each newer one that is damaged. None: the run has none.

    Raises:
        CheckpointError: there are checkpoints, but none is good; a run never silently starts over.
    """
    bad: list[str] = []
    for folder in reversed(list_checkpoints(root)):
        try:
            checkpoint = read_checkpoint(folder)
        except CheckpointError as error:
            bad.append(str(error))
            continue
        for line in bad:
            warnings.warn(f"{line}. Resuming from {folder.name} instead", stacklevel=2)
        return checkpoint
    if bad:
        raise CheckpointError(
            f"no checkpoint in {root} is good, and a run that has checkpoints never silently starts over. "
            f"{'. '.join(bad)}. Restore one from a backup, or start over in another output_dir"
        )
    return None


def find_checkpoint(wanted: str | Path, root: str | Path | None) -> Checkpoint | None:
    """Find the checkpoint that ``resume_from_checkpoint`` names; verify and read it, each file once.

    Args:
        wanted: a checkpoint's folder, a run's folder for the newest good one in it, or "auto": the newest good one in
            ``root``.
        root: the folder of the run that resumes.
    Returns:
        The checkpoint; None for "auto" where there is none, so that the run starts from scratch.
    Raises:
        ValueError: "auto" without a root.
        FileNotFoundError: the checkpoint or folder does not exist.
        CheckpointError: it is damaged, or the run has checkpoints and none is good.
    """
    if wanted == "auto":
        if root is None:
            raise ValueError("resume_from_checkpoint='auto' looks in output_dir, which is None: set it")
        return newest_good(root)
    path = Path(wanted)
    if not path.is_dir():
        there = ", ".join(folder.name for folder in list_checkpoints(path.parent)) or "none"
        raise FileNotFoundError(
            f"resume_from_checkpoint={path}: the folder does not exist; checkpoints in {path.parent}: {there}"
        )
    if checkpoint_step(path) is not None or (path / MANIFEST).is_file():
        return read_checkpoint(path)
    if (newest := newest_good(path)) is None:
        raise FileNotFoundError(f"resume_from_checkpoint={path}: this is neither a checkpoint nor a run that has one")
    return newest


def require_unchanged(
    checkpoint: Checkpoint,
    *,
    settings: Mapping[str, Any],
    fingerprints: Mapping[str, Any],
    defaults: Mapping[str, Any] | None = None,
    removed: Mapping[str, tuple[Any, str]] | None = None,
    free: Collection[str] = (),
    override: bool = False,
) -> None:
    """Refuse to resume with other settings or data than the checkpoint's, or only warn with ``override``.

    Args:
        checkpoint: the one to resume.
        settings, fingerprints: of the run that resumes.
        defaults: values of settings that the checkpoint's version did not have yet.
        removed: removed setting -> its old default, at which it is ignored, and what to do instead.
        free: settings that may change from one part of a run to the next.
        override: warn instead of raising.
    Raises:
        CheckpointError: any other setting or fingerprint differs; shows each as old -> new.
    """
    removed = removed or {}
    known = {
        name: value
        for name, value in checkpoint.settings.items()
        if name not in removed or name in settings or value != removed[name][0]
    }
    pairs = [({**(defaults or {}), **known}, settings), (checkpoint.fingerprints, fingerprints)]
    changed = [
        f"{name}: {_short(old.get(name))} -> "
        + (f"removed; {removed[name][1]}" if name in removed and name not in new else _short(new.get(name)))
        for old, new in ((as_json(old), as_json(new)) for old, new in pairs)
        for name in sorted({*old, *new} - set(free))
        if old.get(name) != new.get(name)
    ]
    if not changed:
        return
    listed = "\n  ".join(changed)
    message = f"checkpoint {checkpoint.folder} was saved with other settings or data (old -> new):\n  {listed}\n"
    if not override:
        raise CheckpointError(
            f"{message}Restore them, or continue with the new ones by resume_override=True (--resume-override); the "
            "result then differs from an uninterrupted run"
        )
    warnings.warn(f"{message}Continuing with the new ones (resume_override)", stacklevel=3)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def check(args: CheckArgs) -> int:
    """Run the `check` command: print a row for each checkpoint; returns the exit code.

    Raises:
        FileNotFoundError: the folder does not exist or has no checkpoint.
    """
    run = Path(args.run)
    if not run.is_dir():
        raise FileNotFoundError(f"{run} does not exist: name a run's folder")
    folders = list_checkpoints(run) or ([run] if (run / "manifest.json").is_file() else [])
    if not folders:
        raise FileNotFoundError(f"{run} holds no checkpoint-<n>: runs write them with save_every")
    table = Table(title=f"checkpoints of {run}", title_justify="left")
    for heading in ("checkpoint", "state", "MB", "written by", "problems"):
        table.add_column(heading, overflow="fold")
    good: list[Path] = []
    for folder in folders:
        problems = verify_checkpoint(folder)
        if not problems:
            good.append(folder)
        table.add_row(folder.name, "BAD" if problems else "good", *_facts(folder), "\n".join(problems))
    console = Console(markup=False, emoji=False)  # a folder's name may hold [/x] or :x:
    console.print(table)
    if good:
        console.print(f"a resumed run continues from {good[-1].name}", highlight=False)
    else:
        console.print("none of them can be resumed", highlight=False)
    return int(len(good) < len(folders))


def _facts(folder: Path) -> tuple[str, str]:
    """Return size in MB and versions from the manifest, "?" if it cannot be read."""
    try:
        manifest = read_manifest(folder)
    except CheckpointError:
        return "?", "?"
    size = sum(facts["bytes"] for facts in manifest["files"].values())
    return f"{size / 1e6:.1f}", f"rlhf-ppo {manifest['versions']['rlhf_ppo']}, torch {manifest['versions']['torch']}"
