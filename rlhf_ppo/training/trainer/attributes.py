"""What a trainer shows of its run and state: the attributes that callbacks and users read and set."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedTokenizerBase

from rlhf_ppo.config.rlhf import RLHFConfig
from rlhf_ppo.data.prompts import PromptSet
from rlhf_ppo.models.actor_critic import ActorCritic
from rlhf_ppo.models.reference import Reference
from rlhf_ppo.runtime.logs.run_directory import RunDirectory
from rlhf_ppo.runtime.processes.group import ProcessGroup
from rlhf_ppo.training.rewards import ScoreStatistics
from rlhf_ppo.training.run import Run
from rlhf_ppo.training.state import TrainState


def _of_run(name: str, doc: str) -> Any:
    """Make a field of the run an attribute of the trainer, too; setting it counts from the next iteration on."""

    def change(trainer: TrainerAttributes, value: Any) -> None:
        trainer.fixed = dataclasses.replace(trainer.fixed, **{name: value})

    return property(lambda trainer: getattr(trainer.fixed, name), change, doc=doc)


def _of_state(name: str, doc: str) -> Any:
    """Make a field of the state an attribute of the trainer, too."""
    return property(
        lambda trainer: getattr(trainer.state, name),
        lambda trainer, value: setattr(trainer.state, name, value),
        doc=doc,
    )


class TrainerAttributes:
    """Attributes of :class:`rlhf_ppo.PPOTrainer`; each is a field of :class:`Run` or :class:`TrainState`."""

    fixed: Run
    """Everything that is fixed for the run."""
    state: TrainState
    """Everything that an update changes."""

    args: RLHFConfig = _of_run("args", "The run's settings.")
    run: RunDirectory = _of_run("folder", "The run's folder.")
    device: torch.device = _of_run("device", "Where the models are.")
    tokenizer: PreTrainedTokenizerBase = _of_run("tokenizer", "The policy's.")
    train_prompts: PromptSet | None = _of_run("train_prompts", "The prompts of ``train_dataset``, checked.")
    eval_prompts: PromptSet | None = _of_run("eval_prompts", "The prompts of ``eval_dataset``, checked.")
    reference: Reference = _of_run("reference", "The frozen policy that the KL is measured against.")
    processes: ProcessGroup = _of_run(
        "processes", "The processes that share the work: ``size`` of them; ``first`` on the one that writes and prints."
    )
    sources: dict[str, str | None] = _of_run("sources", "Where model, ref_model and reference came from.")

    model: ActorCritic = _of_state("model", "Policy and critic.")
    optimizer: torch.optim.Optimizer = _of_state("optimizer", "One optimizer for policy and critic.")
    scheduler: LambdaLR = _of_state("scheduler", "The learning rates' schedule.")
    kl_coef: float = _of_state("kl_coef", "Weight of the KL in the rewards now.")
    score_statistics: ScoreStatistics = _of_state(
        "score_statistics", "Running mean and spread of each reward function's scores."
    )
    iteration: int = _of_state("iteration", "Updates done.")
    episodes: int = _of_state("episodes", "Responses trained on.")
    optimizer_steps: int = _of_state("optimizer_steps", "Optimizer steps done, skipped ones included.")
    rollouts_made: int = _of_state("rollouts_made", "Rollouts sampled and scored: the number of the last one's draws.")
    best: dict[str, float] | None = _of_state(
        "best", "The best evaluation during training so far: its iteration and eval/score_mean."
    )

    @property
    def objective(self) -> RLHFConfig:
        """The settings of the loss, with the clip range and beta that controllers have moved; may be set."""
        return self.state.objective(self.args)

    @objective.setter
    def objective(self, objective: RLHFConfig) -> None:
        moved = {"clip_range": self.args.clip_range, "penalty_beta": self.args.penalty_beta}
        self.state.clip_range, self.state.penalty_beta = objective.clip_range, objective.penalty_beta
        self.args = dataclasses.replace(objective, **moved)

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        """Tokens that end a response."""
        return self.fixed.sampling.stop_token_ids

    @property
    def warming_up(self) -> bool:
        """Whether the next update trains the critic alone (``critic_warmup_rollouts``)."""
        return self.state.warms_up(self.args)

    @property
    def fingerprints(self) -> dict[str, Any]:
        """Digests of data, reference and adapter, by which a checkpoint recognises its run."""
        return self.fixed.fingerprints
