"""Rollouts: a fixed number of steps of every environment copy, recorded as [B, T] with time last."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from classic.actor_critic import ActorCritic
from classic.envs import Environments, Episode


@dataclass(frozen=True)
class Rollout:
    """What happened, as recorded under the old policy. B copies, T steps, O features."""

    observations: Tensor
    """[B, T + 1, O] what each action was chosen on, and the one after the last."""
    actions: Tensor
    """[B, T] indices or [B, T, A] numbers."""
    logprobs: Tensor
    """[B, T] log pi(a|s) in nats."""
    rewards: Tensor
    """[B, T]."""
    terminated: Tensor
    """[B, T] bool, the episode ended here."""
    truncated: Tensor
    """[B, T] bool, the episode was cut here."""
    mask: Tensor
    """[B, T] bool, False at autoreset dummy steps."""
    final_index: tuple[Tensor, Tensor]
    """([K], [K]) copies and steps whose next observation in ``observations`` is already a new episode's (SAME_STEP)."""
    final_observations: Tensor
    """[K, O] the true last observations there."""
    episodes: list[Episode]
    """Episodes that ended during the rollout."""


@torch.no_grad()
def collect(envs: Environments, network: ActorCritic, num_steps: int, generator: torch.Generator) -> Rollout:
    """Play ``num_steps`` steps of every copy; episodes go on from one rollout to the next.

    Errors are those of :meth:`Environments.step`.
    """
    observations, actions, logprobs, steps = [], [], [], []
    for _ in range(num_steps):
        observation = envs.observations
        action, logprob = network.act(observation, generator)
        observations.append(observation)
        actions.append(action)
        logprobs.append(logprob)
        steps.append(envs.step(action))
    final_steps = [torch.full_like(step.final_envs, t) for t, step in enumerate(steps)]
    return Rollout(
        observations=torch.stack([*observations, envs.observations], dim=1),
        actions=torch.stack(actions, dim=1),
        logprobs=torch.stack(logprobs, dim=1),
        rewards=torch.stack([step.rewards for step in steps], dim=1),
        terminated=torch.stack([step.terminated for step in steps], dim=1),
        truncated=torch.stack([step.truncated for step in steps], dim=1),
        # The reset step was never chosen by the policy, so it must not be learned from.
        mask=torch.stack([step.mask for step in steps], dim=1),
        final_index=(torch.cat([step.final_envs for step in steps]), torch.cat(final_steps)),
        final_observations=torch.cat([step.final_observations for step in steps]),
        episodes=[episode for step in steps for episode in step.episodes],
    )


@torch.no_grad()
def critic_values(network: ActorCritic, rollout: Rollout) -> tuple[Tensor, Tensor]:
    """V(s_t) and V of the observation that really followed, both [B, T], from one pass of the critic.

    Under NEXT_STEP the last observation of an episode is the one after its last step in ``observations``; under
    SAME_STEP that place already holds the next episode's first, so the recorded last one is evaluated instead.
    """
    batch, length, features = rollout.observations.shape
    everything = torch.cat([rollout.observations.reshape(-1, features), rollout.final_observations])
    values = network.values(everything)
    grid = values[: batch * length].reshape(batch, length)
    next_values = grid[:, 1:].clone()
    next_values[rollout.final_index] = values[batch * length :]
    return grid[:, :-1], next_values
