"""Adam on one vector: the network's parameters are views of it, and its steps are torch's."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from classic.envs.spaces import ActionLayout
from classic.fast.flat_adam import FlatAdam, FlatParameters
from classic.gradient_step import Adam
from classic.networks.actor_critic import ActorCritic


def make(**settings) -> ActorCritic:
    generator = torch.Generator().manual_seed(0)
    return ActorCritic((3,), ActionLayout(choices=(2,)), hidden_sizes=(5, 4), generator=generator, **settings)


@pytest.mark.parametrize("settings", [{}, {"shared": True}, {"recurrent": "lstm", "recurrent_size": 6}])
def test_the_network_keeps_its_values_and_shares_the_vectors_memory(settings):
    network, other = make(**settings), make(**settings)
    weights = FlatParameters(network)
    assert list(network.state_dict()) == list(other.state_dict())
    assert all(torch.equal(x, y) for x, y in zip(network.parameters(), other.parameters(), strict=True))
    assert weights.vector.numel() == sum(p.numel() for p in network.parameters())
    weights.vector.data.zero_()
    assert all((p == 0).all() for p in network.parameters())
    network.load_state_dict(other.state_dict())
    parts = weights.split(weights.vector.detach())
    assert all(torch.equal(parts[name], p) for name, p in other.named_parameters())
    assert torch.equal(weights.joined(parts), weights.vector)


def test_actor_and_critic_are_adjacent_if_shapes_agree():
    network = make()
    weights = FlatParameters(network)
    both = weights.of(weights.vector.detach(), "policy.2.weight", "critic.2.weight")
    assert torch.equal(both, torch.stack([network.policy[2].weight, network.critic[2].weight]))
    with pytest.raises(ValueError, match=r"policy\.4\.weight, critic\.4\.weight are not adjacent"):
        weights.of(weights.vector, "policy.4.weight", "critic.4.weight")


def test_gradients_of_autograd_arrive_in_the_vector():
    network = make()
    weights = FlatParameters(network)
    network.critic(torch.ones(2, 3)).sum().mul(100).backward()
    norm = torch.stack([p.grad.norm() for p in network.critic.parameters()]).norm().item()
    assert norm > 1 and weights.gradient.norm().item() == pytest.approx(norm)


@pytest.mark.parametrize("kind", [FlatAdam, Adam])
def test_the_gradient_is_clipped_as_one(kind):
    network = make()
    optimizer = kind(network, lr=1e-2)
    network.critic(torch.ones(2, 3)).sum().mul(100).backward()

    def norm() -> float:
        return torch.stack([p.grad.norm() for p in network.critic.parameters()]).norm().item()

    before = norm()
    assert before > 1 and optimizer.clip_gradient(0.5) == pytest.approx(before)
    assert norm() == pytest.approx(0.5, rel=1e-5)
    assert optimizer.clip_gradient(0.6) == pytest.approx(0.5, rel=1e-5)
    assert norm() == pytest.approx(0.5, rel=1e-5)


def test_replaced_parameters_are_copied_into_the_vector():
    network = make()
    weights = FlatParameters(network)
    network.policy[0].weight.data = torch.full((5, 3), 7.0)
    network.critic[0].weight = nn.Parameter(torch.full((5, 3), 8.0))
    weights.attach(network)
    assert (weights.of(weights.vector, "policy.0.weight") == 7).all()
    assert (weights.of(weights.vector, "critic.0.weight") == 8).all()
    weights.vector.data.zero_()
    assert (network.policy[0].weight == 0).all() and (network.critic[0].weight == 0).all()


def test_adam_on_one_vector_is_torchs():
    networks = [make(), make()]
    ours, theirs = FlatAdam(networks[0], lr=1e-2), Adam(networks[1], lr=1e-2)
    assert ours.state() == theirs.state() == {}
    generator = torch.Generator().manual_seed(1)
    for k in range(5):
        ours.lr = theirs.lr = 1e-2 / (k + 1)
        for mine, other in zip(*(network.parameters() for network in networks), strict=True):
            mine.grad.copy_(torch.randn(mine.shape, generator=generator))
            other.grad = mine.grad.clone()
        ours.step()
        theirs.step()
    for mine, other in zip(*(network.parameters() for network in networks), strict=True):
        torch.testing.assert_close(mine, other)
    state, expected = ours.state(), theirs.state()
    assert state.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(state[name], value)


@pytest.mark.parametrize("kind", [FlatAdam, Adam])
def test_moments_are_loaded_and_stay_when_parameters_are_replaced(kind):
    network = make()
    before = kind(network, lr=1e-2)
    network.critic(torch.ones(2, 3)).sum().backward()
    network.policy(torch.ones(2, 3)).sum().backward()
    before.step()
    state = before.state()
    again = kind(make(), lr=1.0)
    again.load(state)
    copied = make()
    assert again.fits(copied)
    again.attach(copied)
    assert again.lr == 1.0 and again.state().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in again.state().items())
    assert state["policy.0.weight/step"] == 1
    copied.policy[0].requires_grad_(False)
    assert not again.fits(copied)
