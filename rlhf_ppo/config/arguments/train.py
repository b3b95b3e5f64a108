"""TrainArgs: what `rlhf-ppo train` reads beside RLHFConfig."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, ClassVar

import tyro

from rlhf_ppo.config.arguments.data import HeldOutPromptArgs
from rlhf_ppo.config.presets import PRESETS, preset_settings
from rlhf_ppo.config.rlhf import RLHFConfig
from rlhf_ppo.core.validation import Settings
from rlhf_ppo.runtime.command_line.presets import naming_preset


def require_reward(reward: Sequence[str], environment: str | None) -> None:
    """Raise a ValueError if nothing scores responses."""
    if not reward and environment is None:
        raise ValueError("nothing scores the responses: name a reward (reward), or an environment that rewards turns")


@dataclass(frozen=True, kw_only=True)
class LoRAArgs(Settings):
    """LoRA: train an adapter instead of all weights."""

    lora_rank: int | None = None
    """Train a LoRA adapter of this rank instead of all weights."""
    lora_alpha: int | None = None
    """Scale the adapter by lora_alpha / lora_rank. None: twice the rank."""
    lora_target_modules: tuple[str, ...] | None = None
    """Names of the layers that get the adapter, or "all-linear" (all but the output layer). None: those that PEFT
    chooses for the architecture."""
    merge_adapter: bool = False
    """Also save the model with the adapter merged, in the run's folder merged/."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_at_least(1, "lora_rank", "lora_alpha")
        for name in ("lora_alpha", "lora_target_modules"):
            if getattr(self, name) is not None and self.lora_rank is None:
                raise ValueError(f"{name}={getattr(self, name)!r} is about a LoRA adapter: set lora_rank")
        if self.merge_adapter and self.lora_rank is None:
            raise ValueError("merge_adapter=True needs an adapter to merge: set lora_rank, or drop merge_adapter")


@dataclass(frozen=True, kw_only=True)
class ResumeArgs(Settings):
    """Resume: continue an earlier run."""

    resume_from_checkpoint: Annotated[str | None, tyro.conf.arg(aliases=("--resume",))] = None
    """Resume an earlier run of the same command (made with save_every): its folder checkpoint-<n>, or the run's folder
    for its newest intact one. "auto": the newest intact one in output_dir, or a fresh start if there is none."""
    resume_override: bool = False
    """Resume although settings or data differ from those of the checkpoint (the error shows how)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.resume_override and self.resume_from_checkpoint is None:
            raise ValueError(
                "resume_override=True has no effect without a checkpoint to resume from: set resume_from_checkpoint"
            )


@dataclass(frozen=True, kw_only=True)
class ModelArgs(Settings):
    """Models and rewards: what is trained, and toward what."""

    model: str
    """The policy: a hub id or folder, or "embedded" (the small GPT-2 in the package)."""
    reward: tuple[str, ...] = ()
    """One or more rewards: file.py:function, module:function, a sequence-classification model's folder or hub id, or a
    reward server's http(s) address (its token comes from the environment: RLHF_PPO_REWARD_TOKEN). None is needed
    beside an environment, which rewards turns."""
    judge: tuple[str, ...] = ()
    """Rewards, named likewise, that score some responses of each rollout and are never trained on; if their score falls
    while the reward rises, the run warns."""
    respond: str | None = None
    """What answers the policy's turns where max_turns is above 1: file.py:function or module:function."""
    tools: tuple[str, ...] = ()
    """Functions that the policy may call where max_turns is above 1: file.py (all of its public functions with a
    docstring), file.py:f,g or module:f,g."""
    environment: str | None = None
    """What answers and rewards the policy's turns instead: file.py:Class, module:Class, or a function that makes one
    for each conversation. Its reward is the first of the rewards."""
    ref_model: str | None = None
    """Reference model for the KL; None: the policy as it starts."""
    value_model: str | None = None
    """Trunk of a separate critic; None: a value head on the policy's own trunk."""

    SCORED: ClassVar[bool] = True
    """Whether responses must be scored."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.SCORED:
            require_reward(self.reward, self.environment)


@dataclass(frozen=True, kw_only=True)
class PresetArgs(Settings):
    """Recipe: where the settings start from."""

    PRESETS: ClassVar[Path] = PRESETS
    """Folder of the presets that ``preset`` may name."""

    preset: str | None = None
    """A paper's recipe to start from, by its name in `rlhf-ppo presets`; your YAML file and flags override it."""


@dataclass(frozen=True, kw_only=True)
class TrainArgs(ModelArgs, HeldOutPromptArgs, PresetArgs, LoRAArgs, RLHFConfig, ResumeArgs):
    """Fine-tune a language model from a reward with PPO."""

    FIRST: ClassVar[tuple[str, ...]] = (
        *("model", "reward", "dataset", "output_dir", "total_episodes", "max_new_tokens", "learning_rate", "kl_coef"),
        *("rollout_batch_size", "lora_rank"),
    )
    """Settings that a beginner needs first, as help and docs list them."""

    def __post_init__(self) -> None:
        preset = {} if self.preset is None else preset_settings(self.preset)
        usual = {field.name: preset.get(field.name, field.default) for field in fields(self)}
        with naming_preset(self.preset, preset, [name for name, x in usual.items() if getattr(self, name) != x]):
            super().__post_init__()


@dataclass(frozen=True, kw_only=True)
class CriticRecordArgs(TrainArgs):
    """Record scored responses of a policy that is not trained; takes the flags and files of `train`."""

    save_rollouts: bool = True
    """Record the rollouts into output_dir/rollouts, which is what this command does."""

    def __post_init__(self) -> None:
        if self.replay is not None:
            raise ValueError(
                f"replay={self.replay!r} trains on rollouts that are recorded already, but `critic record` samples new "
                "ones: drop it, or replay with train"
            )
        super().__post_init__()
        if not self.save_rollouts:
            raise ValueError("save_rollouts=False leaves `critic record` nothing to do: drop it")
        if self.resume_from_checkpoint is not None:
            raise ValueError(
                f"resume_from_checkpoint={self.resume_from_checkpoint!r}, but `critic record` samples from model as it "
                "is: drop it; to record a trained policy, name its folder as model"
            )
