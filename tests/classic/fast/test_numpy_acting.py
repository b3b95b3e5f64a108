"""Acting in numpy says what the network itself says, with weights as they are at each call."""

from __future__ import annotations

import pytest
import torch

from classic.envs.spaces import ActionLayout
from classic.fast import numpy_acting as acting_module
from classic.fast.numpy_acting import acting
from classic.networks.actor_critic import ActorCritic

CHOICE, NUMBERS = ActionLayout(choices=(3,)), ActionLayout(numbers=2)


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
def test_numpy_says_what_the_network_says(actions, settings, monkeypatch):
    network = ActorCritic((4,), actions, hidden_sizes=(8, 6), generator=draw(0), **settings)
    monkeypatch.setattr(acting_module, "_with_torch", None)  # not this way
    act = acting(network, 50)
    observations, noise = torch.randn(50, 4, generator=draw(1)), network.noise((50,), draw(2))
    for _ in range(2):
        output, taken, _ = act(observations, noise, None, torch.zeros(50), None)
        expected, _ = network.step(observations)
        torch.testing.assert_close(output, expected.detach(), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(taken, network.choose(output, noise).detach())
        with torch.no_grad():
            network.policy[-1].weight.normal_(generator=draw(3))


def test_masked_options_are_never_taken():
    network = ActorCritic((4,), CHOICE, hidden_sizes=(8,), generator=draw(0))
    observations, noise = torch.randn(500, 4, generator=draw(1)), network.noise((500,), draw(2))
    allowed = torch.tensor([True, False, True]).expand(500, 3)
    _, taken, _ = acting(network, 500)(observations, noise, allowed, torch.zeros(500), None)
    assert set(taken.tolist()) == {0, 2}


@pytest.mark.parametrize(
    ("actions", "settings", "rows"),
    [
        (CHOICE, {"recurrent": "gru", "recurrent_size": 5}, 3),
        (CHOICE, {"recurrent": "lstm", "recurrent_size": 5}, 1),  # however few rows
        (NUMBERS, {"state_dependent_std": True}, 3),
        (ActionLayout(choices=(2, 3)), {}, 3),
        (CHOICE, {}, 10_000),  # large products are torch's, which keeps to the threads it was given
    ],
)
def test_everything_else_is_the_networks_own_way(actions, settings, rows):
    network = ActorCritic((4,), actions, hidden_sizes=(8, 8), generator=draw(0), **settings)
    observations, noise = torch.randn(rows, 4, generator=draw(1)), network.noise((rows,), draw(2))
    state, starts = network.initial_state(rows), torch.ones(rows, dtype=torch.bool)
    with torch.no_grad():
        output, taken, after = acting(network, rows)(observations, noise, None, starts, state)
        expected, expected_after = network.step(observations, starts, state)
    assert torch.equal(output, expected) and torch.equal(taken, network.choose(expected, noise).detach())
    assert after is expected_after is None or torch.equal(after, expected_after)
