"""Collect rollouts: a fixed number of steps of every environment copy, recorded as [B, T] with time last."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from classic.envs.environments import Environments, Episode
from classic.envs.normalization import Normalizer
from classic.envs.truncation import Step
from classic.networks.actor_critic import ActorCritic
from classic.networks.decisions import Decisions, Sample

NOWHERE = torch.empty(0, dtype=torch.int64)


@dataclass(frozen=True)
class Rollout:
    """Steps recorded under the old policy. B copies, T steps, *O one observation."""

    observations: Tensor
    """[B, T + 1, *O] the observation of each action, and the one after the last."""
    starts: Tensor
    """[B, T + 1] bool, True where an observation begins an episode."""
    state: Tensor | None
    """[B, K] recurrent state before the first step, or None without a recurrent layer."""
    state_after: Tensor | None
    """[B, K] recurrent state after the last step."""
    actions: Tensor
    """[B, T] or [B, T, choices] indices, or [B, T, numbers]."""
    action_masks: Tensor | None
    """[B, T, options] bool, True for allowed options, or None if the environment has no masks."""
    logprobs: Tensor
    """[B, T] log pi(a|s) in nats."""
    rewards: Tensor
    """[B, T] float64, or float32 if they are scaled (normalize_rewards)."""
    terminated: Tensor
    """[B, T] bool, the episode ended here: no value follows."""
    truncated: Tensor
    """[B, T] bool, the episode was cut here (a time limit): the value of the next observation still counts."""
    mask: Tensor
    """[B, T] bool, False at steps that only reset (NEXT_STEP autoreset)."""
    final_index: tuple[Tensor, Tensor]
    """([K], [K]) copies and steps after which ``observations`` is already in the new episode (SAME_STEP)."""
    final_observations: Tensor
    """[K, *O] the last observations of those episodes."""
    final_state: Tensor | None
    """[K, state] recurrent state before those, or None without a recurrent layer."""
    episodes: list[Episode]
    """Episodes that ended during the rollout."""

    def decisions(self) -> Decisions:
        """Return what the policy is evaluated on again, in the rows of :meth:`rows`."""
        masks = self.action_masks
        return Decisions(
            self.rows(self.observations[:, :-1]),
            self.rows(self.actions),
            action_masks=None if masks is None else self.rows(masks),
            starts=None if self.state is None else self.starts[:, :-1],
            state=self.state,
        )

    def rows(self, x: Tensor) -> Tensor:
        """Turn [B, T, ...] into minibatch rows: unmasked steps [N, ...], or whole sequences with a recurrent layer."""
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
    on_step: Callable[[Step], None] | None = None,
    sde_sample_freq: int = 1,
) -> Rollout:
    """Play ``num_steps`` steps of every copy; episodes continue from one rollout to the next.

    Args:
        state: [B, K] recurrent state after the last rollout; None without a recurrent layer.
        normalizer: its statistics are updated; the rollout holds normalised observations and rewards.
        sample: samples the actions; None: ``network.sample``.
        on_step: called with each step.
        sde_sample_freq: see the setting of this name.
    Raises:
        BrokenEnvironmentError: see :meth:`Environments.step`.
    """
    observations, starts, masks, outputs, actions, steps, rewards = [], [], [], [], [], [], []
    final_envs, final_steps, finals, final_states = [], [], [], []
    before, sample, normalizer = state, sample or network.sample, normalizer or Normalizer(None, None, 1.0)
    noise = network.noise((num_steps, envs.num_envs), generator, sde_sample_freq).unbind()
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
        if on_step is not None:
            on_step(step)
        reward = step.rewards
        if normalizer.returns is not None:
            reward = normalizer.scale_rewards(reward.float(), step.terminated | step.truncated, step.mask)
        rewards.append(reward)
        if step.final_envs.shape[0]:
            final_envs.append(step.final_envs)
            final_steps.append(torch.full_like(step.final_envs, t))
            finals.append(normalizer.normalize(step.final_observations))
            if state is not None:
                final_states.append(state[step.final_envs])
    observations.append(normalizer.normalize(envs.observations))
    starts.append(envs.starting)
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
        final_index=(torch.cat(final_envs), torch.cat(final_steps)) if finals else (NOWHERE, NOWHERE),
        final_observations=torch.cat(finals) if finals else observations[0][:0],
        final_state=None if state is None else torch.cat(final_states) if finals else state[:0],
        episodes=[episode for step in steps for episode in step.episodes],
    )
