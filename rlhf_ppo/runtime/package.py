"""The package as Python loads it: its version, variables that torch reads, modules that moved.

Imported before torch, so it imports the standard library alone.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.abc
import importlib.util
import os
import platform
import sys
import warnings
from importlib.machinery import ModuleSpec
from importlib.metadata import version
from types import ModuleType
from typing import Any

__version__ = "0.1.0"

# torch backs large CPU tensors with huge pages if it finds this before the first one is made (Linux; elsewhere nothing
# happens): logits and gradients of a vocabulary otherwise cost thousands of page faults each time.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

if sys.platform == "linux" and not any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
    # Freed tensors up to 32 MiB stay in the process for the next ones. By default glibc returns them, and the system
    # clears their pages again. Larger ones are returned: gaps between them would make the process half as large again.
    _allocator: Any = ctypes.CDLL(None)
    _M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD, _M_TOP_PAD = -3, -1, -2
    if hasattr(_allocator, "mallopt") and _allocator.mallopt(_M_MMAP_THRESHOLD, 2**25):  # glibc's
        _allocator.mallopt(_M_TRIM_THRESHOLD, 2**29)
        _allocator.mallopt(_M_TOP_PAD, 2**26)

# OpenMP threads that wait for each other sleep instead of keeping a CPU busy, which on a machine with other work makes
# an iteration many times slower (docs/performance.md). Worker processes inherit it. GOMP_SPINCOUNT and KMP_BLOCKTIME,
# if set, still win.
THREADS_SPIN = "torch" in sys.modules and os.environ.keys().isdisjoint(
    ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
)
"""Whether torch was loaded before this could be set; runs with several threads then say so."""
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def versions(*packages: str) -> dict[str, str]:
    """Return this package's version, Python's, and those of installed packages."""
    return {"rlhf_ppo": __version__, **{name: version(name) for name in packages}, "python": platform.python_version()}


MOVED = {
    "rlhf_ppo.trl": "rlhf_ppo.migration",
    "rlhf_ppo.adapters": "rlhf_ppo.models.adapters.lora",
    "rlhf_ppo.actor_critic": "rlhf_ppo.models.actor_critic",
    "rlhf_ppo.before_after": "rlhf_ppo.pipeline.before_after",
    "rlhf_ppo.checkpoint": "rlhf_ppo.trainer",
    "rlhf_ppo.conversation": "rlhf_ppo.generation.multi_turn",
    "rlhf_ppo.data_files": "rlhf_ppo.data.files",
    "rlhf_ppo.demo": "rlhf_ppo.pipeline.demo",
    "rlhf_ppo.evaluate": "rlhf_ppo.pipeline.evaluation.evaluate",
    "rlhf_ppo.generate": "rlhf_ppo.pipeline.generate",
    "rlhf_ppo.guard": "rlhf_ppo.training.stability",
    "rlhf_ppo.http_reward": "rlhf_ppo.rewards.http_client",
    "rlhf_ppo.identity": "rlhf_ppo.models.compare",
    "rlhf_ppo.migrate": "rlhf_ppo.migration.migrate",
    "rlhf_ppo.openenv": "rlhf_ppo.generation.environments",
    "rlhf_ppo.replay": "rlhf_ppo.pipeline.replay",
    "rlhf_ppo.reward_calls": "rlhf_ppo.rewards.validation",
    "rlhf_ppo.reward_model": "rlhf_ppo.rewards.reward_model",
    "rlhf_ppo.reward_server": "rlhf_ppo.rewards.http_server",
    "rlhf_ppo.reward_training": "rlhf_ppo.pipeline.labelled.reward_training",
    "rlhf_ppo.rollout": "rlhf_ppo.generation.rollout",
    "rlhf_ppo.runtime.lock": "rlhf_ppo.runtime.logs.run_directory",
    "rlhf_ppo.sft": "rlhf_ppo.pipeline.labelled.sft",
    "rlhf_ppo.training.trainer_attributes": "rlhf_ppo.training.trainer.attributes",
    "rlhf_ppo.toy_rewards": "rlhf_ppo.rewards.toy",
    "rlhf_ppo.verifiable": "rlhf_ppo.rewards.gsm8k",
    "classic.comparison": "classic.compare",
    "classic.making": "classic.envs.make_env",
    "classic.train": "classic.ppo",
}
_ROOMS = {
    "rlhf_ppo.runtime.command_line": (
        "settings settings_help settings_page unknown_names yaml_files presets commands user_code"
    ),
    "rlhf_ppo.runtime.checkpoints": "checkpoint checkpoint_commit resume stored_tensors",
    "rlhf_ppo.runtime.diagnosis": "advice rules symptoms healthy run_watch",
    "rlhf_ppo.runtime.logs": "metrics progress run_directory trackers",
    "rlhf_ppo.runtime.machine": "device threads transfers signals",
    "rlhf_ppo.config.arguments": "commands critic_fit data doctor inference plan reward_training sft train verify",
    "rlhf_ppo.models.sharded": "sharding sharded_traffic deferred skeleton in_step",
    "rlhf_ppo.models.adapters": "lora policy_adapter quantization",
    "rlhf_ppo.models.acceleration": "activation_memory compiled_layers named_kernels working_copy",
    "rlhf_ppo.models.forward": "forward_checks",
    "rlhf_ppo.training.checkpoints": "checkpoint resume fingerprints black_box",
    "rlhf_ppo.training.recorded": "recording recorded_rollouts replayed_rollouts",
    "rlhf_ppo.training.reports": "reporting watching explain",
    "rlhf_ppo.training.rollouts": "collect generate resample turns",
    "rlhf_ppo.training.trainer": "callbacks",
    "rlhf_ppo.training.models": "load_models shard_models model_facts fitted_critic learning_rates compilation",
    "rlhf_ppo.pipeline.critic": "critic_fit critic_report",
    "rlhf_ppo.pipeline.evaluation": "evaluate evaluation_settings intervals",
    "rlhf_ppo.pipeline.labelled": "sft reward_training supervised",
}
"""Package -> the modules that moved into it from the package around it."""
MOVED |= {
    f"{room.rpartition('.')[0]}.{name}": f"{room}.{name}" for room, names in _ROOMS.items() for name in names.split()
}
"""Old name -> new name, for the modules that documentation, configs and scripts named."""


class MovedModules(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Import a module by its old name: the same module object, with a DeprecationWarning."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        return importlib.util.spec_from_loader(fullname, self) if fullname in MOVED else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        new_name = MOVED[spec.name]
        warnings.warn(f"{spec.name} is now {new_name}", DeprecationWarning, stacklevel=2)
        module = importlib.import_module(new_name)
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Restore the module's own spec, which importlib has just replaced by the old name's; its code has run."""
        assert module.__spec__ is not None
        module.__spec__ = module.__spec__.loader_state


def find_moved_modules() -> None:
    """Let Python find modules by their old names, after it has looked everywhere else."""
    if not any(isinstance(finder, MovedModules) for finder in sys.meta_path):
        sys.meta_path.append(MovedModules())
