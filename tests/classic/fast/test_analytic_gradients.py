"""The gradient in closed form is autograd's, for every network and objective that it is used for."""

from __future__ import annotations

import itertools

import pytest
import torch

import classic
from classic.envs.spaces import ActionLayout
from classic.fast.analytic_gradients import Autograd, ClosedForm, gradient_method, update_loss
from classic.fast.flat_adam import FlatParameters
from classic.networks.actor_critic import ActorCritic, Decisions
from rlhf_ppo.core import Experience, PPOConfig

CHOICE, NUMBERS = ActionLayout(choices=(3,)), ActionLayout(numbers=2)


def make(actions: ActionLayout, seed: int = 0, **settings) -> tuple[ActorCritic, FlatParameters]:
    """A network in float64 whose last layers are large enough for ratios far from 1."""
    generator = torch.Generator().manual_seed(seed)
    settings = {"hidden_sizes": (7, 5), "generator": generator, **settings}
    network = ActorCritic((4,), actions, **settings).double()
    for parameter in network.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return network, FlatParameters(network)


def minibatch(network: ActorCritic, count: int, seed: int, masked: bool = False) -> tuple[Decisions, Experience]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    actions = torch.randint(3, (count,), generator=generator) if network.actions.choices else normal(count, 2)
    masks = None
    if masked:
        masks = torch.rand(count, 3, generator=generator) > 0.4
        masks[torch.arange(count), actions] = True
    decisions = Decisions(normal(count, 4), actions, action_masks=masks)
    with torch.no_grad():
        now = network.evaluate(decisions)
    assert now.values is not None
    old = Experience(
        logprobs=now.logprobs + 0.3 * normal(count),
        values=now.values + 0.5 * normal(count),
        advantages=normal(count),
        returns=now.values + normal(count),
        mask=torch.ones(count, dtype=torch.bool),
    )
    return decisions, old


CONFIGS = {
    "plain": {},
    "entropy": {"ent_coef": 0.1, "vf_coef": 0.7},
    "value clip": {"clip_range_vf": 0.3},
    "two-sided": {"clip_range": 0.1, "clip_range_high": 0.5},
    "dual": {"objective": "dual_clip", "dual_clip": 1.3, "ent_coef": 0.01},
    "adaptive": {"objective": "adaptive_clip", "clip_range": 0.05},
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize(
    ("actions", "settings", "masked"),
    [
        (CHOICE, {}, False),
        (CHOICE, {}, True),
        (CHOICE, {"shared": True}, False),
        (CHOICE, {"activation": "relu", "hidden_sizes": (6,)}, False),
        (NUMBERS, {"log_std_init": -0.5}, False),
        (NUMBERS, {"shared": True, "activation": "relu", "hidden_sizes": (5, 6, 7)}, False),
    ],
)
def test_closed_form_is_autograd(actions, settings, masked, config):
    config = PPOConfig(**config)
    for seed, count in itertools.product(range(3), (1, 40)):
        network, weights = make(actions, seed, **settings)
        decisions, old = minibatch(network, count, seed, masked)
        reference, ours = Autograd(network, weights), ClosedForm(network, weights)
        expected = reference.evaluate(decisions)
        reference.differentiate(expected, old, config)
        gradient = weights.gradient.clone()
        weights.gradient.fill_(torch.nan)  # every entry is written
        new = ours.evaluate(decisions)
        ours.differentiate(new, old, config)
        torch.testing.assert_close(weights.gradient, gradient, rtol=1e-9, atol=1e-12)
        for name in ("logprobs", "values", "entropy"):
            torch.testing.assert_close(getattr(new, name), getattr(expected, name).detach(), rtol=1e-9, atol=1e-12)
        losses = [update_loss(output, old, config).total.item() for output in (new, expected)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-9)


@pytest.mark.parametrize(
    ("actions", "settings", "config", "kind"),
    [
        (CHOICE, {}, {}, ClosedForm),
        (CHOICE, {"shared": True}, {"objective": "dual_clip"}, ClosedForm),
        (NUMBERS, {}, {"objective": "adaptive_clip"}, ClosedForm),
        (NUMBERS, {"squash": True}, {}, Autograd),
        (NUMBERS, {"state_dependent_std": True}, {}, Autograd),
        (ActionLayout(choices=(2, 3)), {}, {}, Autograd),
        (CHOICE, {"recurrent": "gru"}, {}, Autograd),
        *((CHOICE, {}, {"objective": name}, Autograd) for name in ("penalty", "cispo", "a2c", "reinforce")),
    ],
)
def test_where_the_closed_form_is_used(actions, settings, config, kind):
    network, weights = make(actions, **settings)
    assert type(gradient_method(network, weights, PPOConfig(**config))) is kind


@pytest.mark.parametrize("env_id", ["tests/Match-v0", "tests/Aim-v0"])
def test_a_run_by_autograd_takes_the_same_way(env_id, small, monkeypatch):
    """Not to the last digit: sums are taken in another order."""
    runs = []
    for kind in (ClosedForm, Autograd):
        monkeypatch.setattr(
            "classic.ppo.gradient_method", lambda network, weights, _, kind=kind: kind(network, weights)
        )
        agent = classic.PPO(env_id, small(ent_coef=0.01)).learn(300)
        assert type(agent.gradients) is kind
        runs.append((agent.weights.vector.detach(), agent.last_metrics))
    torch.testing.assert_close(runs[0][0], runs[1][0], rtol=1e-3, atol=1e-4)
    assert runs[0][1] == pytest.approx(runs[1][1], rel=1e-2, abs=1e-3)
