"""Recurrent policies: what only they can learn, and cutting rollouts elsewhere changes nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import classic
from classic.advantages import critic_values
from classic.envs.environments import Environments
from classic.networks.actor_critic import ActorCritic
from classic.presets.resolve import resolve
from classic.rollout import collect

MODES = ["next_step", "same_step"]


def play(mode, num_steps, parts, kind="lstm"):
    envs = Environments("tests/Clock-v0", 2, mode)
    envs.reset(seed=0)
    network = ActorCritic(
        envs.observation_shape,
        envs.actions,
        hidden_sizes=(8,),
        generator=torch.Generator().manual_seed(0),
        recurrent=kind,
        recurrent_size=6,
    )
    for parameter in network.parameters():
        parameter.data.mul_(3)  # memories that matter
    generator, state, rollouts = torch.Generator().manual_seed(1), network.initial_state(2), []
    for _ in range(parts):
        rollouts.append(collect(envs, network, num_steps, generator, state))
        state = rollouts[-1].state_after
    envs.close()
    return network, rollouts


@pytest.mark.parametrize("kind", ["lstm", "gru"])
@pytest.mark.parametrize("mode", MODES)
def test_where_a_rollout_is_cut_changes_no_output(mode, kind):
    network, (whole,) = play(mode, 14, 1, kind)
    _, parts = play(mode, 7, 2, kind)
    for name in ("actions", "logprobs", "rewards", "mask"):
        assert torch.equal(getattr(whole, name), torch.cat([getattr(part, name) for part in parts], dim=1)), name
    values, next_values = critic_values(network, whole)
    halves = [critic_values(network, part) for part in parts]
    torch.testing.assert_close(values, torch.cat([v for v, _ in halves], dim=1))
    torch.testing.assert_close(next_values, torch.cat([n for _, n in halves], dim=1))
    new = network.evaluate(whole.decisions())
    torch.testing.assert_close(new.logprobs, whole.logprobs)


def test_both_autoreset_modes_give_the_same_values_on_the_same_trajectories():
    """Clock without reset steps: at an episode's end the last observation's value, with its state."""
    network, (next_step,) = play("next_step", 14, 1)
    same_network, (same_step,) = play("same_step", 12, 1)
    mask = next_step.mask
    for ours, theirs in zip(critic_values(network, next_step), critic_values(same_network, same_step), strict=True):
        torch.testing.assert_close(ours[mask], theirs.flatten())


@pytest.mark.parametrize(
    ("kind", "mode", "shared"),
    [
        ("gru", "same_step", True),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (("gru", "same_step", False), ("lstm", "next_step", True), ("lstm", "next_step", False))
        ),
    ],
)
def test_a_recurrent_policy_recalls_what_is_no_longer_shown(kind, mode, shared, small, learning_seed):
    memory = {"recurrent": kind, "recurrent_size": 16, "shared_network": shared, "autoreset_mode": mode}
    args = small(num_envs=16, num_steps=32, seed=learning_seed, **memory)
    agent = classic.PPO("tests/Recall-v0", args).learn(12_000)
    assert agent.evaluate(episodes=40)["mean_return"] > 0.95


def test_without_recurrence_the_same_run_can_only_guess(small):
    agent = classic.PPO("tests/Recall-v0", small(num_envs=16, num_steps=32)).learn(12_000)
    assert agent.evaluate(episodes=40)["mean_return"] < 0.8


def test_learning_rate_0_keeps_the_ratio_at_1_over_whole_sequences(small, monkeypatch):
    agent = classic.PPO("tests/Clock-v0", small(recurrent="lstm", learning_rate=0.0))
    rows, evaluate = [], agent.network.evaluate

    def watched(taken):
        new = evaluate(taken)
        rows.append(tuple(new.logprobs.shape))
        return new

    monkeypatch.setattr(agent.network, "evaluate", watched)
    agent.learn(100)
    # 4 copies of 16 steps in 2 minibatches: two whole sequences each.
    assert set(rows) == {(2, 16)}


def test_predict_passes_the_state_on_and_resets_it_where_told(small):
    agent = classic.PPO("tests/Recall-v0", small(recurrent="gru", recurrent_size=5, shared_network=True))
    for parameter in agent.network.parameters():
        parameter.data.mul_(5)
    _, first = agent.predict([1.0, 0.0])
    _, second = agent.predict([0.0, 0.0], state=first)
    _, fresh = agent.predict([0.0, 0.0])
    _, cleared = agent.predict([0.0, 0.0], state=first, episode_start=True)
    assert first.shape == (1, 5) and not np.allclose(second, fresh) and np.array_equal(cleared, fresh)
    _, many = agent.predict(np.zeros((2, 2)), state=np.concatenate([first, first]), episode_start=[False, True])
    np.testing.assert_allclose(many, np.concatenate([second, fresh]), atol=1e-6)
    with pytest.raises(ValueError, match=r"takes a state \(1, 5\), got \(1, 3\)"):
        agent.predict([0.0, 0.0], state=np.zeros((1, 3)))
    with pytest.raises(ValueError, match="no state: the policy is not recurrent"):
        classic.PPO("tests/Recall-v0", small()).predict([0.0, 0.0], state=first)


def test_minibatches_of_a_recurrent_policy_are_at_most_one_per_copy(small):
    with pytest.raises(ValueError, match="num_minibatches=5 is more than num_envs=4, but with recurrent='lstm'"):
        classic.PPO("tests/Recall-v0", small(recurrent="lstm", num_minibatches=5))
    assert resolve(classic.PPOArgs(recurrent="lstm", num_envs=4), "tests/Recall-v0").num_minibatches == 4
    with pytest.raises(ValueError, match="recurrent_size=7 is read only by recurrent='lstm' or 'gru'"):
        resolve(classic.PPOArgs(recurrent_size=7), "tests/Recall-v0")


@pytest.mark.parametrize("recurrent", ["lstm", "gru"])
def test_a_single_copy_can_be_recurrent(recurrent, small):
    agent = classic.PPO("tests/Recall-v0", small(recurrent=recurrent, num_envs=1, num_minibatches=1)).learn(40)
    assert agent.state.memory is not None and agent.last_metrics["policy/first_minibatch_max_abs_log_ratio"] < 1e-5


def test_a_recurrent_rollout_holds_a_decision_of_every_copy(small):
    """Under NEXT_STEP one step may be the reset alone."""
    with pytest.raises(ValueError, match="num_steps=1 may hold no decision at all with recurrent='lstm'"):
        classic.PPO("tests/Recall-v0", small(recurrent="lstm", num_steps=1))
    classic.PPO("tests/Recall-v0", small(recurrent="lstm", num_steps=1, autoreset_mode="same_step")).learn(8)
    classic.PPO("tests/Recall-v0", small(recurrent="lstm", num_steps=2)).learn(8)
