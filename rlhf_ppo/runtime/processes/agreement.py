"""Agreement: what must be the same on every process is compared before it makes results differ."""

from __future__ import annotations

import dataclasses
import json
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from rlhf_ppo.runtime.package import __version__
from rlhf_ppo.runtime.processes.group import ProcessGroup

_OWN_SETTINGS = ("device", "num_threads", "quiet", "report_to")

_PACKAGES = ("torch", "transformers", "tokenizers", "peft", "safetensors", "numpy")


def require_same(processes: ProcessGroup, remedy: str, facts: Mapping[str, Any]) -> None:
    """Raise a ValueError that names both sides unless ``facts``, as JSON, are the same on all processes.

    Args:
        processes: nothing happens where there is one.
        remedy: what to do, as the end of the message.
        facts: by name, the same names on each.
    """
    if processes.alone:
        return
    rows = processes.facts(lambda: json.loads(json.dumps(dict(facts), default=str)))
    for rank, row in enumerate(rows):
        for name, first in rows[0].items():
            if row[name] != first:
                raise ValueError(
                    f"process {rank} of {processes.size} has {name}={row[name]!r} where the first one has {first!r}: "
                    f"{remedy}"
                )


def require_same_settings(processes: ProcessGroup, args: Any) -> None:
    """Raise a ValueError unless all processes were started with the same settings, but for what is each one's own."""
    shared = {f.name: getattr(args, f.name) for f in dataclasses.fields(args) if f.name not in _OWN_SETTINGS}
    require_same(processes, "start all processes with the same settings", shared)


def package_versions() -> dict[str, str]:
    """Return the versions of Python, of this package and of those that compute, by name."""
    return {"rlhf_ppo": __version__, "python": platform.python_version(), **{p: _version(p) for p in _PACKAGES}}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
