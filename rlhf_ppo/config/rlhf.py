"""RLHFConfig: all groups of settings, the checks between groups, and the values derived from several settings."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self, TypeVar

from rlhf_ppo.config.engine import VLLMSettings
from rlhf_ppo.config.groups import (
    AdvantageSettings,
    CriticSettings,
    KLSettings,
    OptimizationSettings,
    RewardSettings,
    RolloutSettings,
)
from rlhf_ppo.config.name_hints import REMOVED, REMOVED_VALUES, SETTINGS
from rlhf_ppo.config.presets import preset_settings
from rlhf_ppo.config.prompt_settings import PromptSettings
from rlhf_ppo.config.run_groups import MemorySettings, RecordingSettings, RunSettings, SafetySettings, WatchSettings
from rlhf_ppo.core.config import PPOConfig
from rlhf_ppo.core.validation import refuse_unread
from rlhf_ppo.runtime.command_line.presets import naming_preset
from rlhf_ppo.runtime.command_line.unknown_names import refuse_unknown_settings

_FILTERS = (
    "it would sample from another distribution than the one whose log-probs are trained, so ratios and KL would be "
    "wrong; use temperature, which sampling, training and reference share"
)

_OF_A_CRITIC = (
    *("vf_coef", "clip_range_vf", "gae_lambda", "gae_lambda_value", "adaptive_lambda_alpha", "critic"),
    *("normalize_values", "value_head_from", "value_learning_rate", "critic_warmup_rollouts"),
    *("critic_epochs", "critic_minibatches", "critic_frozen"),
)
"""Settings of a critic, or of advantages that need one."""


Restored = TypeVar("Restored", bound="RLHFConfig")


# Groups come in the order of --help; those that give a setting of PPOConfig another default stand before it.
@dataclass(frozen=True, kw_only=True)
class RLHFConfig(
    RolloutSettings,
    VLLMSettings,
    PromptSettings,
    RewardSettings,
    KLSettings,
    AdvantageSettings,
    CriticSettings,
    OptimizationSettings,
    PPOConfig,
    SafetySettings,
    WatchSettings,
    MemorySettings,
    RecordingSettings,
    RunSettings,
):
    """Settings of a language-model run, with defaults that learn on a small model; only `output_dir` is required."""

    REFUSED: ClassVar[Mapping[str, str]] = dict.fromkeys(("top_k", "top_p", "repetition_penalty"), _FILTERS) | {
        name: f"it has been removed; {remedy}" for name, (_, remedy) in REMOVED.items()
    }
    """Settings that do not exist here, and why or what to do instead."""

    REFUSED_VALUES: ClassVar[Mapping[str, Mapping[str, str]]] = REMOVED_VALUES
    """Setting -> value that does not exist here any more -> what to do instead."""

    ELSEWHERE: ClassVar[Mapping[str, str]] = SETTINGS
    """Names of settings in other libraries, and ours."""

    def __new__(cls, *args: Any, **settings: Any) -> Self:
        """Name our setting, or the reason, where Python would only say that an argument is unknown."""
        refuse_unknown_settings(cls, settings)
        return super().__new__(cls)

    @classmethod
    def from_preset(cls, name: str, **settings: Any) -> Self:
        """Return the settings of a paper's recipe, which ``settings`` override.

        Args:
            name: one of those that `rlhf-ppo presets` lists.
            settings: ``output_dir`` and whatever else.
        Raises:
            ValueError: no such recipe, or a setting contradicts it.
        """
        preset = preset_settings(name)
        with naming_preset(name, preset, settings):
            return cls(**{**preset, **settings})

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_batch()
        self._check_turns()
        self._check_engine()
        self._check_objective()
        self._check_critic()
        self._check_estimator()
        self._check_prompts()
        self._check_length()
        if self.on_nonfinite == "rollback" and self.save_every == 0:
            raise ValueError("on_nonfinite='rollback' resumes from a checkpoint, but save_every=0 writes none: set it")
        if self.on_nonfinite == "rollback" and self.replay is not None:
            raise ValueError(
                "on_nonfinite='rollback' goes on with other responses, and replay has only the recorded ones: set "
                "on_nonfinite to 'skip' or 'stop'"
            )
        if self.kl_target is not None and self.kl_horizon < self.rollout_batch_size:
            raise ValueError(
                f"kl_horizon={self.kl_horizon} must be at least rollout_batch_size={self.rollout_batch_size}, "
                "or the controller overshoots"
            )

    def _check_batch(self) -> None:
        batch, parts, group = self.rollout_batch_size, self.num_minibatches, self.num_generations
        both = math.lcm(parts, group)
        if batch % both == 0:
            return
        below, above = batch // both * both, math.ceil(batch / both) * both
        sizes = " or ".join(str(size) for size in (below, above) if size)
        if batch % group:
            problem = f"whole groups of num_generations={group} responses"
        else:
            problem = f"num_minibatches={parts} whole minibatches"
        raise ValueError(
            f"rollout_batch_size={batch} does not divide into {problem}; the nearest valid rollout_batch_size is "
            f"{sizes}"
        )

    def _check_turns(self) -> None:
        if self.turn_credit == "turn" and self.max_turns == 1:
            raise ValueError("turn_credit='turn' tells turns apart, but max_turns=1 allows one: raise max_turns")

    def _check_engine(self) -> None:
        names = ("vllm_url", "vllm_timeout_s", "vllm_retries", "rollouts_ahead", "max_sampler_gap")
        if self.generation != "vllm":
            refuse_unread(self, f"generation={self.generation!r} asks no server", *names)
            return
        if self.replay is not None:
            raise ValueError(
                f"generation='vllm' samples, and replay={self.replay!r} trains on what was sampled: drop one of them"
            )

    def importance_level(self, *, foreign: bool) -> str:
        """Return what importance weights are taken over: none, token or sequence.

        Args:
            foreign: another program sampled the rollout.
        """
        if self.importance_weights != "auto":
            return self.importance_weights
        on = foreign or self.generation == "vllm" or self.importance_weight_cap is not None
        return "token" if on and self.objective != "dis" else "none"

    def _check_objective(self) -> None:
        objective = f"objective={self.objective!r}"
        if self.objective in ("penalty", "a2c", "reinforce"):
            refuse_unread(self, f"{objective} clips no ratio", "clip_range", "clip_range_high")
        if self.objective == "cispo" and self.clip_range_high is not None:
            refuse_unread(self, f"{objective} reads only clip_range_high={self.clip_range_high}", "clip_range")
        if self.objective != "dual_clip":
            refuse_unread(self, f"{objective} does not bound the loss of bad actions", "dual_clip")
        if self.objective != "penalty":
            refuse_unread(self, f"{objective} has no KL penalty against the old policy", "penalty_beta")
        if self.objective == "dis":
            weighs = f"{objective} itself weighs each action by its ratio to the sampler's log-probs"
            refuse_unread(self, weighs, "importance_weights", "importance_weight_cap", "importance_weight_mode")
        if self.positive_loss_coef == 0:
            refuse_unread(self, "positive_loss_coef=0 imitates no response", "positive_score_above")

    def _check_critic(self) -> None:
        if not self.has_critic:
            refuse_unread(self, f"it needs a critic, and {self.critic_free} has none", *_OF_A_CRITIC)
        elif self.vf_coef == 0:
            no_loss = "vf_coef=0 leaves the critic no loss"
            refuse_unread(self, no_loss, "clip_range_vf", "value_learning_rate", "gae_lambda_value")
            refuse_unread(self, no_loss, "critic_epochs", "critic_minibatches", "critic_frozen")
            if self.value_head_from is None:
                refuse_unread(self, "under vf_coef=0 its values stay constant, wherever they come from", "critic")
            if self.adaptive_lambda_alpha is not None:
                replaced = f"adaptive_lambda_alpha={self.adaptive_lambda_alpha} replaces it for the policy"
                refuse_unread(self, f"{replaced}, and {no_loss}", "gae_lambda")
        if self.adaptive_lambda_alpha is not None and self.gae_lambda_value is not None:
            both = f"adaptive_lambda_alpha={self.adaptive_lambda_alpha} and gae_lambda_value={self.gae_lambda_value}"
            refuse_unread(self, f"{both} replace it for the policy and for the critic", "gae_lambda")

        if self.critic_frozen != "none" and self.critic in ("shared", "adapter"):
            raise ValueError(
                f"critic_frozen={self.critic_frozen!r} is about a critic with a trunk of its own, but critic="
                f"{self.critic!r} uses the policy's: change one of the two"
            )
        if self.critic_epochs is not None and self.critic_epochs < self.num_epochs:
            raise ValueError(
                f"critic_epochs={self.critic_epochs} is below num_epochs={self.num_epochs}, in which policy and critic "
                "learn together: raise the first or lower the second"
            )
        if self.critic_only_epochs == 0:
            none = f"no epoch trains the critic alone (critic_epochs={self.critic_epochs})"
            refuse_unread(self, none, "critic_minibatches")
        elif self.critic_only_minibatches > self.rollout_batch_size:
            raise ValueError(
                f"critic_minibatches={self.critic_minibatches} is more than the rollout_batch_size="
                f"{self.rollout_batch_size} responses to fill them with: lower the first or raise the second"
            )

    def _check_estimator(self) -> None:
        if self.advantage_estimator in ("rloo", "grpo") and self.num_generations < 2:
            raise ValueError(
                f"advantage_estimator={self.advantage_estimator!r} compares responses to one prompt, but "
                f"num_generations={self.num_generations} gives each only one: set num_generations to 2 or more"
            )

    def _check_prompts(self) -> None:
        alike = f"zero_signal_prompts={self.zero_signal_prompts!r}"
        if self.zero_signal_prompts != "keep" and self.num_generations < 2:
            raise ValueError(
                f"{alike} compares the responses to a prompt, but num_generations={self.num_generations} gives each "
                "only one: set num_generations to 2 or more"
            )
        if self.replay is not None:
            only = f"replay={self.replay!r} trains on recorded prompts in their own order"
            refuse_unread(self, only, "curriculum_column")
            if self.zero_signal_prompts == "resample":
                raise ValueError(f"{alike} draws further prompts, but {only}: set it to 'drop' or 'keep'")

    def _check_length(self) -> None:
        steps, episodes = self.num_optimizer_steps, f"total_episodes={self.total_episodes}"
        if self.warmup_steps > steps:
            raise ValueError(
                f"warmup_steps={self.warmup_steps} is longer than the run: {episodes} makes {steps} optimizer steps, "
                "so learning_rate would never be reached. Lower the first or raise the second"
            )
        if self.critic_warmup_rollouts and self.critic_warmup_rollouts >= self.num_rollouts:
            raise ValueError(
                f"critic_warmup_rollouts={self.critic_warmup_rollouts} leaves none of the {self.num_rollouts} rollouts "
                f"of {episodes} to train the policy"
            )

    @property
    def critic_free(self) -> str | None:
        """The setting that makes advantages independent of values, as messages name it; None: there is a critic."""
        if self.advantage_estimator != "gae":
            return f"advantage_estimator={self.advantage_estimator!r}"
        return f"objective={self.objective!r}" if self.objective == "reinforce" else None

    @property
    def has_critic(self) -> bool:
        """Whether advantages need values."""
        return self.critic_free is None

    @property
    def num_rollouts(self) -> int:
        """Number of rollouts in the run."""
        return math.ceil(self.total_episodes / self.rollout_batch_size)

    @property
    def critic_only_epochs(self) -> int:
        """Epochs per rollout that train the critic alone."""
        return 0 if self.critic_epochs is None else self.critic_epochs - self.num_epochs

    @property
    def critic_only_minibatches(self) -> int:
        """Minibatches of each of them."""
        return self.num_minibatches if self.critic_minibatches is None else self.critic_minibatches

    @property
    def steps_per_rollout(self) -> int:
        """Number of optimizer steps on a rollout, those of the critic alone included."""
        return self.num_epochs * self.num_minibatches + self.critic_only_epochs * self.critic_only_minibatches

    @property
    def num_optimizer_steps(self) -> int:
        """Number of optimizer steps in the run: rollouts x epochs x minibatches."""
        return self.num_rollouts * self.steps_per_rollout


def restore_settings(saved: Mapping[str, Any], cls: type[Restored] = RLHFConfig, **changes: Any) -> Restored:
    """Restore settings that JSON held: lists become tuples; what ``cls`` has not, and what was removed, is left out.

    Args:
        saved: as run.json, a checkpoint or a recording has them.
        cls: RLHFConfig, or a class that adds a command's own settings.
        changes: win over those that were saved.
    """
    known = {field.name for field in dataclasses.fields(cls)}
    known -= {name for name, values in REMOVED_VALUES.items() if saved.get(name) in values}
    settings: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in saved.items() if k in known}
    return cls(**{**settings, **changes})
