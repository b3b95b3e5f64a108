"""Rollouts: autoreset steps, truncation, reused buffers."""

from __future__ import annotations

import pytest
import torch

from classic.advantages import critic_values
from classic.envs.environments import Environments
from classic.networks.actor_critic import ActorCritic
from classic.rollout import collect
from rlhf_ppo.core import compute_gae, masked_whiten


def network_for(envs: Environments) -> ActorCritic:
    return ActorCritic(
        envs.observation_shape, envs.actions, hidden_sizes=(8,), generator=torch.Generator().manual_seed(0)
    )


def play(env_id: str, mode: str, num_steps: int, parts: int = 1):
    """(envs, network, rollouts): ``parts`` rollouts of ``num_steps`` steps, two copies, with autoreset ``mode``."""
    envs = Environments(env_id, 2, mode)
    envs.reset(seed=0)
    network = network_for(envs)
    generator = torch.Generator().manual_seed(1)
    return envs, network, [collect(envs, network, num_steps, generator) for _ in range(parts)]


def estimate(network, rollout):
    values, next_values = critic_values(network, rollout)
    return compute_gae(
        rollout.rewards,
        values,
        next_values,
        rollout.terminated,
        rollout.truncated,
        gamma=0.9,
        gae_lambda=0.8,
        mask=rollout.mask,
    )


def test_next_step_reset_steps_are_masked_and_carry_no_reward():
    _, _, (rollout,) = play("tests/Clock-v0", "next_step", 14)
    # Four decisions, then the step that Gymnasium spends on the reset.
    assert rollout.mask[0].tolist() == [True] * 4 + [False] + [True] * 4 + [False] + [True] * 4
    assert rollout.rewards[0, 4] == 0
    assert not (rollout.terminated | rollout.truncated)[~rollout.mask].any()
    assert rollout.terminated[0].nonzero().flatten().tolist() == [3, 13]
    assert rollout.truncated[0].nonzero().flatten().tolist() == [8]


def test_same_step_has_no_reset_steps_and_keeps_the_true_last_observation():
    _, _, (rollout,) = play("tests/Clock-v0", "same_step", 12)
    assert rollout.mask.all()
    assert rollout.final_index[1].tolist() == [3, 3, 7, 7, 11, 11]
    # Clock's last observation of episode e is t / 4 = 1, e / 5; the grid already holds t = 0 of the next one.
    assert torch.allclose(rollout.final_observations[:, 0], torch.ones(6))
    assert torch.allclose(rollout.observations[:, 4, 0], torch.zeros(2))


def test_both_autoreset_modes_give_the_same_advantages_on_the_same_trajectories():
    _, network, (next_step,) = play("tests/Clock-v0", "next_step", 14)
    _, same_network, (same_step,) = play("tests/Clock-v0", "same_step", 12)
    mask = next_step.mask
    assert torch.equal(next_step.observations[:, :-1][mask], same_step.observations[:, :-1].flatten(0, 1))
    assert torch.equal(next_step.rewards[mask], same_step.rewards.flatten())
    for ours, theirs in zip(estimate(network, next_step), estimate(same_network, same_step), strict=True):
        torch.testing.assert_close(ours[mask], theirs.flatten())
    whitened = masked_whiten(estimate(network, next_step)[0], mask)
    expected = masked_whiten(estimate(same_network, same_step)[0], same_step.mask)
    torch.testing.assert_close(whitened[mask], expected.flatten())


@pytest.mark.parametrize("mode", ["next_step", "same_step"])
def test_truncation_bootstraps_from_the_true_final_observation(mode):
    _, network, (rollout,) = play("tests/Clock-v0", mode, 14)
    _, next_values = critic_values(network, rollout)
    last = rollout.truncated[0].nonzero().flatten()[0]
    # Clock's episode 1 ends on observation [4 / 4, 1 / 5, (4 * 1) % 3].
    with torch.no_grad():
        expected = network.values(torch.tensor([[1.0, 0.2, 1.0]]))[0]
    torch.testing.assert_close(next_values[0, last], expected)


@pytest.mark.parametrize("split", [2, 7])
def test_where_a_rollout_is_cut_changes_nothing_recorded(split):
    """14 steps at once or in parts: also when a part begins with the reset step of an episode (14 / 2 = 7, 5 in 2)."""
    _, _, (whole,) = play("tests/Clock-v0", "next_step", 14)
    _, _, parts = play("tests/Clock-v0", "next_step", 14 // split, parts=split)
    for name in ("mask", "rewards", "terminated", "truncated", "actions", "logprobs"):
        assert torch.equal(getattr(whole, name), torch.cat([getattr(part, name) for part in parts], dim=1)), name


def test_a_rollout_that_begins_with_a_reset_step_masks_it():
    _, _, (first, second) = play("tests/Clock-v0", "next_step", 4, parts=2)
    assert first.mask.all()
    assert second.mask[0].tolist() == [False, True, True, True]


def test_observations_are_copied_out_of_a_reused_buffer():
    envs = Environments("tests/ReusedBuffer-v0", 2)
    envs.reset(seed=0)
    rollout = collect(envs, network_for(envs), 5, torch.Generator().manual_seed(0))
    assert rollout.observations[0, :, 0].tolist() == [0, 1, 2, 3, 4, 5]
    assert rollout.observations.dtype == torch.float32


def test_episode_lengths_count_only_decisions():
    for mode, steps in (("next_step", 14), ("same_step", 12)):
        envs, _, (rollout,) = play("tests/Clock-v0", mode, steps)
        # Rewards 0.5 * (1 + 2 + 3 + 4) + 4 * episode.
        assert [tuple(episode) for episode in rollout.episodes if episode.env == 0] == [
            (0, 5.0, 4),
            (0, 9.0, 4),
            (0, 13.0, 4),
        ]
        envs.close()


def test_recorded_logprobs_are_the_policys():
    _, network, (rollout,) = play("tests/Match-v0", "next_step", 12)
    new = network.evaluate(rollout.decisions())
    torch.testing.assert_close(new.logprobs, rollout.logprobs[rollout.mask])
