"""Rollouts: a fixed number of steps of every environment copy, recorded as [B, T] with time last."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from classic.envs.environments import Environments, Episode
from classic.envs.normalization import Normalizer
from classic.networks.actor_critic import ActorCritic, Decisions, Sample
from rlhf_ppo.core import PPOConfig, compute_gae


@dataclass(frozen=True)
class Rollout:
    """What happened, as recorded under the old policy. B copies, T steps, *O one observation."""

    observations: Tensor
    """[B, T + 1, *O] what each action was chosen on, and the one after the last."""
    starts: Tensor
    """[B, T + 1] bool, True where an observation begins an episode."""
    state: Tensor | None
    """[B, K] the memory's state before the first step, or None without a memory."""
    state_after: Tensor | None
    """[B, K] the memory's state after the last step."""
    actions: Tensor
    """[B, T] or [B, T, choices] indices, or [B, T, numbers]."""
    action_masks: Tensor | None
    """[B, T, options] bool, what was allowed, or None if the environment does not say."""
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
    """[K, *O] the true last observations there."""
    final_state: Tensor | None
    """[K, state] the memory's state before those, or None without a memory."""
    episodes: list[Episode]
    """Episodes that ended during the rollout."""

    def decisions(self) -> Decisions:
        """What the policy is asked about again, in the rows that :meth:`rows` makes of anything [B, T]."""
        masks = self.action_masks
        return Decisions(
            self.rows(self.observations[:, :-1]),
            self.rows(self.actions),
            action_masks=None if masks is None else self.rows(masks),
            starts=None if self.state is None else self.starts[:, :-1],
            state=self.state,
        )

    def rows(self, x: Tensor) -> Tensor:
        """[B, T, ...] as rows for minibatches: real decisions alone [N, ...], or with a memory whole sequences."""
        return x[self.mask] if self.state is None else x


@torch.no_grad()
def collect(
    envs: Environments,
    network: ActorCritic,
    num_steps: int,
    generator: torch.Generator,
    state: Tensor | None = None,
    normalizer: Normalizer | None = None,
    *,
    sample: Sample | None = None,
) -> Rollout:
    """Play ``num_steps`` steps of every copy; episodes go on from one rollout to the next.

    Args:
        state: [B, K] of the network's memory, where the last rollout left it; None without a memory.
        normalizer: moves with what it sees; the rollout holds what the network saw and is to learn from.
        sample: samples the actions; None: ``network.sample``.
    Raises:
        BrokenEnvironmentError: see :meth:`Environments.step`.
    """
    observations, starts, masks, outputs, actions, steps, rewards = [], [], [], [], [], [], []
    final_envs, final_steps, finals, final_states = [], [], [], []
    before = state
    normalizer = normalizer or Normalizer(None, None, 1.0)
    noise = network.noise((num_steps, envs.num_envs), generator).unbind()
    sample = sample or network.sample
    for t in range(num_steps):
        observation = normalizer.observe(envs.observations, ~envs.resetting)
        output, action, state = sample(observation, noise[t], envs.action_masks, envs.starting, state)
        observations.append(observation)
        starts.append(envs.starting)
        masks.append(envs.action_masks)
        outputs.append(output)
        actions.append(action)
        step = envs.step(action)
        steps.append(step)
        reward = step.rewards
        if normalizer.returns is not None:
            reward = normalizer.scale_rewards(reward, step.terminated | step.truncated, step.mask)
        rewards.append(reward)
        if step.final_envs.shape[0]:
            final_envs.append(step.final_envs)
            final_steps.append(torch.full_like(step.final_envs, t))
            finals.append(normalizer.normalize(step.final_observations))
            if state is not None:
                final_states.append(state[step.final_envs])
    observations.append(normalizer.normalize(envs.observations))
    starts.append(envs.starting)
    none = torch.empty(0, dtype=torch.int64)
    taken = torch.stack(actions, dim=1)
    allowed = None if masks[0] is None else torch.stack(masks, dim=1)
    return Rollout(
        observations=torch.stack(observations, dim=1),
        starts=torch.stack(starts, dim=1),
        state=before,
        state_after=state,
        actions=taken,
        action_masks=allowed,
        logprobs=network.logprobs(torch.stack(outputs, dim=1), taken, allowed),
        rewards=torch.stack(rewards, dim=1),
        terminated=torch.stack([step.terminated for step in steps], dim=1),
        truncated=torch.stack([step.truncated for step in steps], dim=1),
        # The reset step was never chosen by the policy, so it must not be learned from.
        mask=torch.stack([step.mask for step in steps], dim=1),
        final_index=(torch.cat(final_envs), torch.cat(final_steps)) if finals else (none, none),
        final_observations=torch.cat(finals) if finals else observations[0][:0],
        final_state=None if state is None else torch.cat(final_states) if finals else state[:0],
        episodes=[episode for step in steps for episode in step.episodes],
    )


@torch.no_grad()
def critic_values(network: ActorCritic, rollout: Rollout) -> tuple[Tensor, Tensor]:
    """V(s_t) and V of the observation that really followed, both [B, T], from one pass of the critic.

    Under NEXT_STEP the last observation of an episode is the one after its last step in ``observations``; under
    SAME_STEP that place already holds the next episode's first, so the recorded last one is evaluated instead.
    """
    grid_shape = rollout.observations.shape[:2]
    if rollout.state is None:
        everything = torch.cat([rollout.observations.flatten(0, 1), rollout.final_observations])
        values = network.values(everything)
        grid, finals = values[: grid_shape.numel()].unflatten(0, grid_shape), values[grid_shape.numel() :]
    else:
        grid = network.values(rollout.observations, rollout.starts, rollout.state)
        last = rollout.final_observations.unsqueeze(1)
        never = torch.zeros(last.shape[:2], dtype=torch.bool)
        finals = network.values(last, never, rollout.final_state).squeeze(1) if len(last) else grid[:0, 0]
    next_values = grid[:, 1:].clone()
    next_values[rollout.final_index] = finals
    return grid[:, :-1], next_values


class Estimate(NamedTuple):
    """What the critic made of a rollout, each [B, T]; nothing is whitened."""

    values: Tensor
    """V(s_t)."""
    next_values: Tensor
    """V of the observation that really followed."""
    advantages: Tensor
    """GAE, or the returns under reinforce."""
    returns: Tensor
    """What the critic is to learn."""


def estimate_advantages(network: ActorCritic, rollout: Rollout, config: PPOConfig) -> Estimate:
    """Values, advantages and returns of a rollout, with the critic as it is now."""
    values, next_values = critic_values(network, rollout)
    advantages, returns = compute_gae(
        rollout.rewards,
        values,
        next_values,
        rollout.terminated,
        rollout.truncated,
        gamma=config.gamma,
        gae_lambda=config.gae_lambda,
        mask=rollout.mask,
    )
    if config.objective == "reinforce":
        # Monte Carlo returns without a baseline; the critic closes the sums that the rollout's end cut off.
        advantages = returns
    return Estimate(values, next_values, advantages, returns)
