"""Modules that had other names: an import of the old name gives the new module, with a DeprecationWarning."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.util
import sys
import warnings
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

MOVED = {
    "rlhf_ppo.adapters": "rlhf_ppo.models.lora",
    "rlhf_ppo.before_after": "rlhf_ppo.pipeline.before_after",
    "rlhf_ppo.conversation": "rlhf_ppo.generation.multi_turn",
    "rlhf_ppo.data_files": "rlhf_ppo.data.files",
    "rlhf_ppo.demo": "rlhf_ppo.pipeline.demo",
    "rlhf_ppo.evaluate": "rlhf_ppo.pipeline.evaluate",
    "rlhf_ppo.generate": "rlhf_ppo.pipeline.generate",
    "rlhf_ppo.http_reward": "rlhf_ppo.rewards.http_client",
    "rlhf_ppo.openenv": "rlhf_ppo.generation.environments",
    "rlhf_ppo.reward_model": "rlhf_ppo.rewards.reward_model",
    "rlhf_ppo.reward_server": "rlhf_ppo.rewards.http_server",
    "rlhf_ppo.reward_training": "rlhf_ppo.pipeline.reward_training",
    "rlhf_ppo.rollout": "rlhf_ppo.generation.rollout",
    "rlhf_ppo.sft": "rlhf_ppo.pipeline.sft",
    "rlhf_ppo.toy_rewards": "rlhf_ppo.rewards.toy",
    "rlhf_ppo.verifiable": "rlhf_ppo.rewards.gsm8k",
    "classic.comparison": "classic.compare",
    "classic.train": "classic.ppo",
}
"""Old name -> new name, for the modules that documentation and configs named."""


class MovedModules(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Find a module by the name it had."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        return importlib.util.spec_from_loader(fullname, self) if fullname in MOVED else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        warnings.warn(f"{spec.name} is now {MOVED[spec.name]}", DeprecationWarning, stacklevel=2)
        return importlib.import_module(MOVED[spec.name])

    def exec_module(self, module: ModuleType) -> None:
        """The module has run under its new name."""


def find_moved_modules() -> None:
    """Make Python look here for modules that it does not find."""
    if not any(isinstance(finder, MovedModules) for finder in sys.meta_path):
        sys.meta_path.append(MovedModules())
