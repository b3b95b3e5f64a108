"""TrainState: everything that an update changes, and nothing else."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Self

import torch
from torch.optim.lr_scheduler import LambdaLR

from rlhf_ppo.config.groups import CriticSettings
from rlhf_ppo.config.rlhf import RLHFConfig
from rlhf_ppo.core import ValueScale
from rlhf_ppo.models.acceleration.compiled_layers import require_layers
from rlhf_ppo.models.actor_critic import ActorCritic
from rlhf_ppo.training.optimizer import critic_warmup_settings, make_optimizer
from rlhf_ppo.training.rewards import ScoreStatistics


@dataclass
class TrainState:
    """What a checkpoint holds, together with the random generators' state; its counterpart is :class:`Run`."""

    model: ActorCritic
    """Policy and critic."""
    optimizer: torch.optim.AdamW
    scheduler: LambdaLR
    kl_coef: float
    """Weight of the KL in the rewards; controllers move this coefficient and the next two."""
    clip_range: float
    penalty_beta: float
    score_statistics: ScoreStatistics = field(default_factory=ScoreStatistics)
    iteration: int = 0
    """Updates done."""
    episodes: int = 0
    """Responses trained on."""
    optimizer_steps: int = 0
    rollouts_made: int = 0
    """Rollouts sampled and scored, those that a rollback undid included: it numbers the draws of the next one."""
    extra_prompts: int = 0
    """Prompts that passes over the data set gave beside those of the rollouts (``zero_signal_prompts="resample"``)."""
    consecutive_skips: int = 0
    """Non-finite optimizer steps since the last finite one."""
    best: dict[str, float] | None = None
    """The best evaluation so far: its iteration and eval/score_mean."""

    @classmethod
    def start(cls, model: ActorCritic, args: RLHFConfig) -> Self:
        """Return the state before the first update.

        Raises:
            ValueError: ``compile="always"``, and the model has no layers that can be compiled.
        """
        optimizer, scheduler = make_optimizer(model, args)
        if args.compile == "always":
            require_layers(model, "compile='always'")
            model.compiled = True
        if not args.normalize_values:
            model.change_value_scale(ValueScale())
        return cls(model, optimizer, scheduler, args.kl_coef, args.clip_range, args.penalty_beta)

    def warms_up(self, args: CriticSettings) -> bool:
        """Whether the next update trains the critic alone (``critic_warmup_rollouts``)."""
        return self.iteration < args.critic_warmup_rollouts

    def objective(self, args: RLHFConfig) -> RLHFConfig:
        """Return the settings with the clip range and beta that controllers have moved."""
        if (self.clip_range, self.penalty_beta) == (args.clip_range, args.penalty_beta):
            return args
        return dataclasses.replace(args, clip_range=self.clip_range, penalty_beta=self.penalty_beta)

    def effective_settings(self, args: RLHFConfig) -> RLHFConfig:
        """Return the settings of the next update: the objective, changed while the critic warms up."""
        objective = self.objective(args)
        return critic_warmup_settings(objective) if self.warms_up(args) else objective
