"""The network acts and learns as it is now: copied, loaded into, frozen, hooked or rebuilt since it was made."""

from __future__ import annotations

import copy

import gymnasium
import numpy as np
import pytest
import torch
from torch import nn

import classic
from classic.fast.analytic_gradients import AnalyticGradients
from classic.fast.standard_networks import is_standard
from classic.gradient_step import Autograd
from rlhf_ppo.runtime.errors import RatioTripwireError

FIRST_RATIO = "policy/first_minibatch_max_abs_log_ratio"


def weights_of(agent):
    return {name: x.detach().clone() for name, x in agent.network.named_parameters()}


def assert_equal_weights(one, other):
    for (name, x), y in zip(weights_of(one).items(), weights_of(other).values(), strict=True):
        assert torch.equal(x, y), name


@pytest.mark.parametrize("steps_before", [0, 100])
@pytest.mark.parametrize("settings", [{}, {"shared_network": True}, {"recurrent": "gru", "recurrent_size": 8}])
def test_a_deep_copy_learns_what_the_original_learns(settings, steps_before, small):
    if tuple(map(int, gymnasium.__version__.split(".")[:2])) < (1, 4):
        pytest.skip("before gymnasium 1.4 its vector environments cannot be copied")
    agent = classic.PPO("tests/Match-v0", small(normalize_observations=True, **settings))
    if steps_before:
        agent.learn(steps_before)
    before, other = weights_of(agent), copy.deepcopy(agent)
    agent.learn(200)
    assert all(torch.equal(x, before[name]) for name, x in weights_of(other).items())
    other.learn(200)
    assert_equal_weights(agent, other)
    assert other.last_metrics == agent.last_metrics
    assert any(not torch.equal(x, before[name]) for name, x in weights_of(other).items())


def test_replaced_weights_are_the_ones_trained(small):
    """By assignment, by a network of its own, and by copying values, which was always right."""
    agents = [classic.PPO("tests/Match-v0", small()) for _ in range(3)]
    given = classic.PPO("tests/Match-v0", small(seed=7)).network
    agents[0].network.load_state_dict(given.state_dict())
    agents[1].network.load_state_dict(copy.deepcopy(given.state_dict()), assign=True)
    agents[2].network = copy.deepcopy(given)
    for agent in agents:
        agent.learn(200)
    assert_equal_weights(agents[0], agents[1])
    assert_equal_weights(agents[0], agents[2])


def hooked(layer, name, hook):
    getattr(layer, name)(hook)


class Doubled(nn.Module):
    def forward(self, x):
        return 2 * x


CHANGES = {
    "another activation": lambda n: n.policy.__setitem__(1, nn.GELU()),
    "torch's own tanh": lambda n: n.policy.__setitem__(1, nn.Tanh()),
    "two kinds of activation": lambda n: n.critic.__setitem__(1, nn.ReLU()),
    "a layer more": lambda n: n.critic.append(nn.Linear(1, 1)),
    "another width": lambda n: setattr(
        n, "policy", nn.Sequential(nn.Linear(1, 9), copy.deepcopy(n.policy[1]), nn.Linear(9, 2))
    ),
    "no bias": lambda n: n.policy[0].register_parameter("bias", None),
    "a layer that both have": lambda n: n.critic.__setitem__(0, n.policy[0]),
    "a forward hook": lambda n: n.policy[0].register_forward_hook(lambda module, args, out: out * 2),
    "a hook before": lambda n: n.policy[0].register_forward_pre_hook(lambda module, args: (args[0] * 2,)),
    "a backward hook": lambda n: n.critic[0].register_full_backward_hook(lambda module, gradients, out: None),
    "a gradient's hook": lambda n: n.policy[0].weight.register_hook(lambda gradient: gradient * 0),
    "a hook after the gradient": lambda n: n.policy[0].weight.register_post_accumulate_grad_hook(lambda p: None),
    "a parametrization": lambda n: nn.utils.parametrize.register_parametrization(n.policy[0], "weight", Doubled()),
    "spectral norm": lambda n: nn.utils.parametrizations.spectral_norm(n.policy[0]),
    "a method of its own": lambda n: setattr(
        n.policy[0], "forward", lambda x: n.policy[2].weight.sum() + x.expand(-1, 16)
    ),
    "a frozen layer": lambda n: n.policy[0].requires_grad_(False),
}


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_changed_network_acts_and_learns_as_changed(change, small):
    agent = classic.PPO("tests/Match-v0", small(vf_coef=0.3, seed=2))
    assert type(agent.state.gradients) is AnalyticGradients
    change(agent.network)
    agent.learn(1)
    assert type(agent.state.gradients) is Autograd
    assert agent.last_metrics[FIRST_RATIO] < 1e-5
    observations, noise = torch.randn(4, 1), agent.network.noise((4,), torch.Generator())
    with torch.no_grad():
        output, _, _ = agent.state.sample(observations, noise, None, torch.zeros(4, dtype=torch.bool), None)
        torch.testing.assert_close(output, agent.network.step(observations)[0], rtol=1e-5, atol=1e-6)


def test_a_subclass_is_not_standard(small):
    agent = classic.PPO("tests/Match-v0", small())

    class Own(type(agent.network)):
        def evaluate(self, decisions):
            return super().evaluate(decisions)

    assert is_standard(agent.network)
    agent.network.__class__ = Own
    assert not is_standard(agent.network)


@pytest.mark.parametrize("settings", [{}, {"shared_network": True}, {"recurrent": "lstm", "recurrent_size": 8}])
def test_frozen_parameters_stay_frozen(settings, small, tmp_path):
    """In the middle Adam's momentum would move it on; thawed by a saved file, it would train again."""
    agent = classic.PPO("tests/Match-v0", small(**settings)).learn(100)
    layer = (agent.network.bodies[0] if settings else agent.network.policy[0]).requires_grad_(False)
    before, rest = [x.clone() for x in layer.parameters()], agent.network.critic[-1].weight.detach().clone()
    agent.learn(200).save(tmp_path)
    assert all(torch.equal(x, y) for x, y in zip(layer.parameters(), before, strict=True))
    assert not torch.equal(agent.network.critic[-1].weight, rest)
    loaded, names = (
        classic.PPO.load(tmp_path),
        [name for name, x in agent.network.named_parameters() if not x.requires_grad],
    )
    kept = {name: x for name, x in weights_of(loaded.learn(200)).items() if name in names}
    assert len(kept) == len(before) and all(torch.equal(x, weights_of(agent)[name]) for name, x in kept.items())


def test_a_callback_may_freeze_layers_and_a_resumed_run_keeps_them_frozen(small, tmp_path):

    def freeze(agent, metrics):
        if agent.counters["iteration"] == 2:
            agent.network.policy[0].requires_grad_(False)

    runs = []
    for name in ("whole", "parts"):
        agent = classic.PPO("tests/Match-v0", small(output_dir=str(tmp_path / name), save_every=3))
        if name == "whole":
            runs.append(agent.learn(400, callbacks=[freeze]))
            continue
        agent.learn(400, callbacks=[freeze, lambda agent, metrics: agent.counters["iteration"] == 4])
        again = classic.PPO("tests/Match-v0", small(output_dir=str(tmp_path / name), save_every=3))
        runs.append(again.learn(400, resume_from_checkpoint="auto", callbacks=[freeze]))
    assert_equal_weights(*runs)


def test_untrainable_networks_are_refused(small):
    agent = classic.PPO("tests/Match-v0", small())
    agent.network.requires_grad_(False)
    with pytest.raises(ValueError, match="every parameter of the network is frozen"):
        agent.learn(100)
    agent = classic.PPO("tests/Match-v0", small())
    agent.network.double()
    with pytest.raises(
        ValueError, match=r"torch\.float64 on cpu, but classic computes in float32 on cpu: .*\.to\('cpu'\)"
    ):
        agent.learn(100)
    agent.network.float()
    agent.learn(100)


def test_a_network_with_other_layers_warns_when_loaded(small, tmp_path):
    agent = classic.PPO("tests/Match-v0", small())
    agent.network.policy[1] = nn.GELU()
    agent.learn(100).save(tmp_path)
    with pytest.warns(UserWarning, match=r"other layers than its settings make \(policy\.1 was GELU, now it is Tanh\)"):
        loaded = classic.PPO.load(tmp_path)
    loaded.network.policy[1] = nn.GELU()
    observations = np.random.default_rng(0).normal(size=(50, 1))
    assert np.array_equal(agent.predict(observations)[0], loaded.predict(observations)[0])


def test_dropout_between_acting_and_training_ends_the_run(small):
    def noisy(**settings):
        agent = classic.PPO("tests/Match-v0", small(**settings))
        agent.network.policy[1] = nn.Sequential(agent.network.policy[1], nn.Dropout(0.5))
        agent.network.policy[-1].weight.data *= 100
        return agent

    agent = noisy()
    before = weights_of(agent)
    with pytest.raises(
        RatioTripwireError, match=r"'tests/Match-v0', iteration 1: .*max_initial_log_ratio=0\.1.*dropout"
    ):
        agent.learn(100)
    assert all(torch.equal(x, before[name]) for name, x in weights_of(agent).items())
    agent.network.eval()
    agent.learn(100)
    noisy(max_initial_log_ratio=100.0).learn(100)


ENVIRONMENTS = {
    "choices": ("tests/Match-v0", {}),
    "numbers": ("tests/Aim-v0", {"log_std_init": -1}),
    "squashed": ("tests/Aim-v0", {"squash": True, "state_dependent_std": True}),
    "memory": ("tests/Recall-v0", {"recurrent": "lstm", "recurrent_size": 8}),
    "pixels": ("tests/Side-v0", {}),
    "masks": ("tests/Allowed_info-v0", {"normalize_observations": True, "normalize_rewards": True}),
    "its own vector version": ("CartPole-v1", {"objective": "penalty", "target_kl": 0.01}),
}


@pytest.mark.parametrize(("env_id", "settings"), ENVIRONMENTS.values(), ids=ENVIRONMENTS)
def test_torchs_default_dtype_changes_nothing(env_id, settings, small, tmp_path):
    agents = []
    for kind in (torch.float32, torch.float64):
        torch.set_default_dtype(kind)
        try:
            agent = classic.PPO(env_id, small(**settings)).learn(100)
            agent.save(tmp_path)
            loaded = classic.PPO.load(tmp_path)
            assert loaded.evaluate(2) == agent.evaluate(2)
            env = gymnasium.make(env_id)
            agent.predict(env.reset(seed=1)[0], deterministic=False)
            env.close()
        finally:
            torch.set_default_dtype(torch.float32)
        agents.append(agent)
    assert_equal_weights(*agents)
    assert agents[0].last_metrics == agents[1].last_metrics
