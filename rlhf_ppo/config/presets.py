"""Recipes of papers as presets: their files, what they set, and the `presets` command."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from rlhf_ppo.core.validation import Settings
from rlhf_ppo.runtime.command_line.presets import find_preset, preset_names

PRESETS = Path(__file__).parents[1] / "assets" / "presets"
"""Folder of the recipes: a YAML file each, every setting with its source; the first line says what it is."""


@dataclass(frozen=True, kw_only=True)
class PresetsArgs(Settings):
    """List the named recipes for `train --preset`, or show one with the source of each setting."""

    name: tyro.conf.Positional[str | None] = None
    """The recipe to show; None: list them."""


def preset_settings(name: str) -> dict[str, Any]:
    """Return what a recipe sets.

    Raises:
        ValueError: no such recipe; lists the known ones.
    """
    from rlhf_ppo.runtime.command_line.yaml_files import load_yaml

    return load_yaml(find_preset(PRESETS, name))


def print_presets(args: PresetsArgs) -> None:
    """Run the `presets` command."""
    if args.name is not None:
        print(find_preset(PRESETS, args.name).read_text(encoding="utf-8"), end="")
        return
    for name in preset_names(PRESETS):
        first = (PRESETS / f"{name}.yaml").read_text(encoding="utf-8").splitlines()[0]
        print(f"{name:<20}{first.removeprefix('# ')}")
    print("\nrlhf-ppo presets NAME shows one; rlhf-ppo train --preset NAME starts from it.")
