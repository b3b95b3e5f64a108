"""`check`: every checkpoint of a run verified, and which one a resumed run would take."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.console import Console
from rich.table import Table

from rlhf_ppo.runtime.checkpoint import (
    CheckpointError,
    list_checkpoints,
    read_manifest,
    verify_checkpoint,
)


@dataclass(frozen=True, kw_only=True)
class CheckArgs:
    """Verify all checkpoints of a run; exit code 1 if one is damaged."""

    run: tyro.conf.Positional[str]
    """Folder of a run (language model or classic), or one checkpoint-<n>."""


def check(args: CheckArgs) -> int:
    """Print a row for each checkpoint; returns the exit code.

    Raises:
        FileNotFoundError: there is no such folder, or no checkpoint in it.
    """
    run = Path(args.run)
    if not run.is_dir():
        raise FileNotFoundError(f"{run} does not exist: name the folder of a run")
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
        console.print(f"a resumed run goes on from {good[-1].name}", highlight=False)
    else:
        console.print("none can be resumed", highlight=False)
    return int(len(good) < len(folders))


def _facts(folder: Path) -> tuple[str, str]:
    """Size in MB and version, as the manifest says, if it can be read."""
    try:
        manifest = read_manifest(folder)
    except CheckpointError:
        return "?", "?"
    size = sum(facts["bytes"] for facts in manifest["files"].values())
    return f"{size / 1e6:.1f}", f"rlhf-ppo {manifest['versions']['rlhf_ppo']}, torch {manifest['versions']['torch']}"
