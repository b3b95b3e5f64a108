"""Analytic gradients equal autograd's, for every network and objective that they are used for."""

from __future__ import annotations

import itertools

import pytest
import torch

from classic.envs.spaces import ActionLayout
from classic.fast.analytic_gradients import AnalyticGradients
from classic.fast.flat_adam import FlatParameters
from classic.gradient_step import Autograd, update_loss
from classic.networks.actor_critic import ActorCritic, Decisions
from rlhf_ppo.core import Experience, PPOConfig

CHOICE, NUMBERS = ActionLayout(choices=(3,)), ActionLayout(dimensions=2)


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
def test_analytic_gradients_equal_autograds(actions, settings, masked, config):
    config = PPOConfig(**config)
    for seed, count in itertools.product(range(3), (1, 40)):
        network, weights = make(actions, seed, **settings)
        decisions, old = minibatch(network, count, seed, masked)
        reference, ours = Autograd(network, weights.gradient.zero_), AnalyticGradients(network, weights)
        expected = reference.evaluate(decisions)
        reference.backward(expected, old, config)
        gradient = weights.gradient.clone()
        weights.gradient.fill_(torch.nan)  # every entry is written
        new = ours.evaluate(decisions)
        ours.backward(new, old, config)
        torch.testing.assert_close(weights.gradient, gradient, rtol=1e-9, atol=1e-12)
        for name in ("logprobs", "values", "entropy"):
            torch.testing.assert_close(getattr(new, name), getattr(expected, name).detach(), rtol=1e-9, atol=1e-12)
        losses = [update_loss(output, old, config).total.item() for output in (new, expected)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-9)
