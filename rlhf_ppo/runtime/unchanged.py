"""Whether the run that resumes is the run that was saved: settings and fingerprints, with a diff of what changed."""

from __future__ import annotations

import json
import warnings
from collections.abc import Collection, Mapping
from typing import Any

from rlhf_ppo.runtime.checkpoint import Checkpoint, CheckpointError, as_json


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
    """Refuse to resume another run than the checkpoint's, or warn of it under ``override``.

    Args:
        checkpoint: the one to resume.
        settings, fingerprints: of the run that resumes.
        defaults: what settings that the checkpoint does not know were then (they came with a later version).
        removed: removed setting -> its old default, at which it is ignored, and what to do instead.
        free: settings that may change from one part of a run to the next.
        override: the user wants it so.
    Raises:
        CheckpointError: something else differs; shows each as old -> new.
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
    message = f"checkpoint {checkpoint.folder} is of a run with other settings or data (old -> new):\n  {listed}\n"
    if not override:
        raise CheckpointError(
            f"{message}Put them back, or go on with the new ones by resume_override=True (--resume-override): the run "
            "is then no longer the one that it would have been"
        )
    warnings.warn(f"{message}Going on with the new ones (resume_override)", stacklevel=3)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
