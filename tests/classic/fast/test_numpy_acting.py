"""Sampling in numpy gives what the network gives, with its weights as they are at each call."""

from __future__ import annotations

import pytest
import torch

from classic.envs.spaces import ActionLayout
from classic.fast.numpy_acting import NumpyPolicy
from classic.networks.actor_critic import ActorCritic

CHOICE, NUMBERS = ActionLayout(choices=(3,)), ActionLayout(dimensions=2)


def draw(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(
    ("actions", "settings"),
    [
        (CHOICE, {}),
        (CHOICE, {"shared": True, "activation": "relu"}),
        (NUMBERS, {"log_std_init": -1.0}),
        (NUMBERS, {"squash": True}),
    ],
)
def test_numpy_gives_what_the_network_gives(actions, settings):
    network = ActorCritic((4,), actions, hidden_sizes=(8, 6), generator=draw(0), **settings)
    assert NumpyPolicy.fits(network, 50)
    policy = NumpyPolicy(network)
    observations, noise = torch.randn(50, 4, generator=draw(1)), network.noise((50,), draw(2))
    for _ in range(2):
        output, taken, _ = policy.sample(observations, noise)
        expected, _, _ = network.sample(observations, noise)
        torch.testing.assert_close(output, expected.detach(), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(taken, network.choose(output, noise).detach())
        with torch.no_grad():
            network.policy[-1].weight.normal_(generator=draw(3))
            if network.log_std is not None:
                network.log_std.normal_(generator=draw(4))


def test_masked_options_are_never_taken():
    network = ActorCritic((4,), CHOICE, hidden_sizes=(8,), generator=draw(0))
    observations, noise = torch.randn(500, 4, generator=draw(1)), network.noise((500,), draw(2))
    allowed = torch.tensor([True, False, True]).expand(500, 3)
    _, taken, _ = NumpyPolicy(network).sample(observations, noise, allowed)
    assert set(taken.tolist()) == {0, 2}
