"""The switch: which network takes which shortcut, and a run by shortcuts is the run of the plain way."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import classic
from classic.envs.spaces import ActionLayout
from classic.fast.analytic_gradients import AnalyticGradients
from classic.fast.flat_adam import FlatAdam
from classic.fast.switch import choose
from classic.gradient_step import Adam, Autograd
from classic.networks.actor_critic import ActorCritic
from rlhf_ppo.core import PPOConfig

CHOICE, NUMBERS = ActionLayout(choices=(3,)), ActionLayout(dimensions=2)
MATCH = "tests/Match-v0"


def make(actions: ActionLayout, **settings) -> ActorCritic:
    return ActorCritic((4,), actions, hidden_sizes=(8, 8), generator=torch.Generator().manual_seed(0), **settings)


@pytest.mark.parametrize(
    ("actions", "settings", "config", "shortcuts"),
    [
        (CHOICE, {}, {}, "acting, gradients"),
        (CHOICE, {"shared": True}, {"objective": "dual_clip"}, "acting, gradients"),
        (NUMBERS, {}, {"objective": "adaptive_clip"}, "acting, gradients"),
        (NUMBERS, {"squash": True}, {}, "acting"),
        (NUMBERS, {"state_dependent_std": True}, {}, ""),
        (ActionLayout(choices=(2, 3)), {}, {}, ""),
        (CHOICE, {"recurrent": "gru"}, {}, ""),
        (CHOICE, {"recurrent": "lstm"}, {}, ""),
        *((CHOICE, {}, {"objective": name}, "acting") for name in ("penalty", "cispo", "a2c", "reinforce")),
    ],
)
def test_who_takes_which_shortcut(actions, settings, config, shortcuts):
    network = make(actions, **settings)
    sample, gradients, optimizer = choose(network, PPOConfig(**config), batch=1, learning_rate=1e-3)
    assert (sample != network.sample) is ("acting" in shortcuts)
    assert type(gradients) is (AnalyticGradients if "gradients" in shortcuts else Autograd)
    assert type(optimizer) is FlatAdam


def test_large_batches_act_in_torch_which_keeps_to_its_threads():
    network = make(CHOICE)
    assert choose(network, PPOConfig(), batch=10_000, learning_rate=1e-3).sample == network.sample


def test_the_optimizer_goes_on_while_the_trained_parameters_stay_the_same():
    network = make(CHOICE)
    optimizer = choose(network, PPOConfig(), batch=8, learning_rate=1e-3).optimizer
    again = choose(make(CHOICE), PPOConfig(), batch=8, learning_rate=1e-3, optimizer=optimizer)
    assert again.optimizer is optimizer
    network.policy[0].requires_grad_(False)
    assert choose(network, PPOConfig(), batch=8, learning_rate=1e-3, optimizer=optimizer).optimizer is not optimizer


@pytest.mark.parametrize(
    ("env_id", "settings"),
    [
        (MATCH, {}),
        ("tests/Aim-v0", {}),
        ("tests/Allowed_info-v0", {}),
        (MATCH, {"normalize_observations": True, "objective": "penalty", "target_kl": 0.01}),
        ("tests/Recall-v0", {"recurrent": "lstm", "recurrent_size": 8}),
        ("tests/Side-v0", {}),
    ],
)
def test_a_run_the_plain_way_takes_the_same_course(env_id, settings, small, monkeypatch):
    """Up to rounding: sums are taken in another order."""
    runs = []
    for enabled in (True, False):
        monkeypatch.setattr("classic.fast.switch.ENABLED", enabled)
        agent = classic.PPO(env_id, small(ent_coef=0.01, **settings)).learn(200)
        assert type(agent.optimizer) is (FlatAdam if enabled else Adam)
        assert enabled or (type(agent.state.gradients) is Autograd and agent.state.sample == agent.network.sample)
        runs.append((dict(agent.network.named_parameters()), agent.last_metrics))
    for name, parameter in runs[0][0].items():
        torch.testing.assert_close(runs[1][0][name], parameter, rtol=1e-4, atol=1e-5)
    assert runs[1][1] == pytest.approx(runs[0][1], rel=1e-3, abs=1e-5)


def test_a_run_by_shortcuts_resumes_the_plain_way(small, tmp_path, monkeypatch):
    """Checkpoints are the same either way."""
    args = small(output_dir=str(tmp_path), save_every=1)
    expected = classic.PPO(MATCH, dataclasses.replace(args, output_dir=None, save_every=0)).learn(192)
    classic.PPO(MATCH, args).learn(192, callbacks=[lambda agent, metrics: agent.counters["iteration"] == 2])
    monkeypatch.setattr("classic.fast.switch.ENABLED", False)
    plain = classic.PPO(MATCH, args).learn(192, resume_from_checkpoint="auto")
    assert type(plain.optimizer) is Adam
    for name, parameter in expected.network.named_parameters():
        torch.testing.assert_close(plain.network.get_parameter(name), parameter, rtol=1e-4, atol=1e-5)
