"""What a trainer shows of its run and state: the attributes that callbacks and users read."""

from __future__ import annotations

from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedTokenizerBase

from rlhf_ppo.config.rlhf import RLHFConfig
from rlhf_ppo.data.prompts import PromptSet
from rlhf_ppo.models.actor_critic import ActorCritic
from rlhf_ppo.models.reference import Reference
from rlhf_ppo.runtime.run_directory import RunDirectory
from rlhf_ppo.training.rewards import ScoreStatistics
from rlhf_ppo.training.run import Run
from rlhf_ppo.training.state import TrainState


class TrainerAttributes:
    """Attributes of :class:`rlhf_ppo.PPOTrainer`; each is a field of :class:`Run` or :class:`TrainState`."""

    fixed: Run
    """Everything that is fixed for the run."""
    state: TrainState
    """Everything that an update changes."""

    @property
    def args(self) -> RLHFConfig:
        """The run's settings."""
        return self.fixed.args

    @property
    def run(self) -> RunDirectory:
        """The run's folder."""
        return self.fixed.folder

    @property
    def device(self) -> torch.device:
        """Where the models are."""
        return self.fixed.device

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The policy's."""
        return self.fixed.tokenizer

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        """Tokens that end a response."""
        return self.fixed.sampling.stop_token_ids

    @property
    def train_prompts(self) -> PromptSet | None:
        """The prompts of ``train_dataset``, checked."""
        return self.fixed.train_prompts

    @property
    def eval_prompts(self) -> PromptSet | None:
        """The prompts of ``eval_dataset``, checked."""
        return self.fixed.eval_prompts

    @property
    def reference(self) -> Reference:
        """The frozen policy that the KL is measured against."""
        return self.fixed.reference

    @property
    def model(self) -> ActorCritic:
        """Policy and critic."""
        return self.state.model

    @property
    def optimizer(self) -> torch.optim.AdamW:
        """One optimizer for policy and critic."""
        return self.state.optimizer

    @property
    def scheduler(self) -> LambdaLR:
        """The learning rates' schedule."""
        return self.state.scheduler

    @property
    def objective(self) -> RLHFConfig:
        """The settings with the clip range and beta that controllers have moved."""
        return self.state.objective(self.args)

    @property
    def kl_coef(self) -> float:
        """Weight of the KL in the rewards now; may be set."""
        return self.state.kl_coef

    @kl_coef.setter
    def kl_coef(self, value: float) -> None:
        self.state.kl_coef = value

    @property
    def score_statistics(self) -> ScoreStatistics:
        """Running mean and spread of each reward function's scores."""
        return self.state.score_statistics

    @property
    def iteration(self) -> int:
        """Updates done."""
        return self.state.iteration

    @property
    def episodes(self) -> int:
        """Responses trained on."""
        return self.state.episodes

    @property
    def optimizer_steps(self) -> int:
        """Optimizer steps done, skipped ones included."""
        return self.state.optimizer_steps

    @property
    def rollouts_made(self) -> int:
        """Rollouts sampled and scored: the number of the last one's draws; may be set."""
        return self.state.rollouts_made

    @rollouts_made.setter
    def rollouts_made(self, value: int) -> None:
        self.state.rollouts_made = value

    @property
    def best(self) -> dict[str, float] | None:
        """The best evaluation during training so far: its iteration and eval/score_mean."""
        return self.state.best

    @property
    def warming_up(self) -> bool:
        """Whether the next update trains the critic alone (``critic_warmup_rollouts``)."""
        return self.state.warms_up(self.args)

    @property
    def sources(self) -> dict[str, str | None]:
        """Where model, ref_model and reference came from."""
        return self.fixed.sources

    @property
    def fingerprints(self) -> dict[str, Any]:
        """Digests of data, reference and adapter, by which a checkpoint recognises its run."""
        return self.fixed.fingerprints
