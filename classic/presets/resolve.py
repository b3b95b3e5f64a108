"""Presets: one YAML file an environment in ``presets/``, named after its id."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from classic.envs.make_env import registered_id
from rlhf_ppo.runtime.settings import read_yaml

FOLDER = Path(__file__).parent


def preset_ids() -> list[str]:
    """The environments that have a preset."""
    return sorted(file.stem for file in FOLDER.glob("*.yaml"))


@cache
def preset(env_id: str | None, cls: type) -> dict[str, Any]:
    """An environment's settings, checked against the fields of ``cls``; {} without a preset.

    Raises:
        ValueError: the file has an unknown key (with the closest known one), or a value of the wrong type.
    """
    name = None if env_id is None else registered_id(env_id)
    return read_yaml(FOLDER / f"{name}.yaml", cls) if name in preset_ids() else {}
