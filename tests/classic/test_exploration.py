"""gSDE: its variance and log-probs by hand, noise that stays for some steps, training and files."""

from __future__ import annotations

import gymnasium
import pytest
import torch
from helpers import seeded
from torch.distributions import Normal

import classic
from classic.networks.exploration import exploration_log_std, exploration_noise, explore


def test_actions_have_the_variance_that_their_log_probs_assume():
    """Features (1, 2), deviations (0.5, 1): variance 1 * 0.25 + 4 * 1 = 4.25."""
    features, log_std = torch.tensor([[1.0, 2.0]]), torch.tensor([[0.5], [1.0]]).log()
    std = exploration_log_std(features, log_std).exp()
    assert std.item() == pytest.approx(4.25**0.5, rel=1e-5)
    noise = exploration_noise((20_000,), log_std.shape, 1, seeded())
    drawn = explore(features.expand(20_000, 2), log_std, noise)
    assert drawn.std().item() == pytest.approx(std.item(), rel=0.03) and drawn.mean().abs() < 0.05


def test_noise_stays_for_its_steps_and_differs_between_copies():
    noise = exploration_noise((5, 3), torch.Size([4, 2]), 2, seeded())
    assert noise.shape == (5, 3, 4, 2)
    assert torch.equal(noise[0], noise[1]) and torch.equal(noise[2], noise[3])
    assert not torch.equal(noise[1], noise[2]) and not torch.equal(noise[0, 0], noise[0, 1])


def always_one():
    """Aim whose observation is 1 at every step."""
    aim = gymnasium.make("tests/Aim-v0")
    return gymnasium.wrappers.TransformObservation(aim, lambda x: x + 1, gymnasium.spaces.Box(0, 2, (1,)))


@pytest.mark.parametrize("squash", [False, True])
def test_it_trains_and_its_recorded_log_probs_are_the_networks(squash, small, tmp_path):
    agent = classic.PPO("tests/Aim-v0", small(use_sde=True, squash=squash, log_std_init=-1.0)).learn(200)
    assert agent.last_metrics["policy/first_minibatch_max_abs_log_ratio"] < 1e-5
    rollout = agent.last_update.rollout
    if not squash:
        output = agent.network.step(rollout.observations[:, :-1].flatten(0, 1))[0]
        mean, log_std = agent.network._gaussian(output)
        expected = Normal(mean, log_std.exp()).log_prob(rollout.actions.flatten(0, 1)).sum(-1)
        torch.testing.assert_close(agent.network.logprobs(output, rollout.actions.flatten(0, 1)), expected)
    agent.save(tmp_path)
    loaded = classic.PPO.load(tmp_path)
    assert loaded.evaluate(3) == agent.evaluate(3)
    assert loaded.evaluate(3, deterministic=False) == agent.evaluate(3, deterministic=False)
    agent = classic.PPO(always_one, small(use_sde=True, sde_sample_freq=4, num_steps=5)).learn(20)
    actions = agent.last_update.rollout.actions[0, :, 0]
    assert len(set(actions[:4].tolist())) == 1 and actions[4] != actions[3]


def test_the_matrix_is_learned_and_the_hidden_layers_get_no_gradient_from_it(small):
    agent = classic.PPO("tests/MatrixAction-v0", small(use_sde=True, ent_coef=1.0))
    before = agent.network.log_std.detach().clone()
    output = agent.network.step(torch.ones(3, 1))[0]
    agent.network._gaussian(output)[1].sum().backward()
    assert agent.network.log_std.grad.abs().sum() > 0
    assert agent.network.policy.hidden[0].weight.grad is None or not agent.network.policy.hidden[0].weight.grad.any()
    agent.learn(100)
    assert not torch.equal(agent.network.log_std, before)


def test_contradictions_are_refused(small):
    with pytest.raises(ValueError, match="state_dependent_std=True is another exploration than use_sde=True"):
        classic.PPO("tests/Aim-v0", small(use_sde=True, state_dependent_std=True))
    with pytest.raises(ValueError, match="sde_sample_freq=9 is read only by use_sde=True"):
        classic.PPO("tests/Aim-v0", small(sde_sample_freq=9))
    with pytest.raises(ValueError, match="use_sde=True is for continuous actions, but"):
        classic.PPO("tests/Match-v0", small(use_sde=True))


@pytest.mark.slow
def test_pendulum_is_learned_with_it():
    agent = classic.PPO("Pendulum-v1", classic.PPOArgs(seed=1, quiet=True, use_sde=True)).learn(60_000)
    assert agent.evaluate(20)["mean_return"] > -250
