"""Actor and critic: initialisation, separation, sampling and densities against torch.distributions."""

from __future__ import annotations

import math

import torch

from classic.envs.spaces import ActionLayout
from classic.networks.actor_critic import ActorCritic, Decisions


def make(continuous=False, num_actions=3, hidden=(32, 16), seed=0):
    generator = torch.Generator().manual_seed(seed)
    layout = ActionLayout(dimensions=num_actions) if continuous else ActionLayout(choices=(num_actions,))
    return ActorCritic((4,), layout, hidden_sizes=hidden, generator=generator)


def linears(network):
    return [layer for layer in network if isinstance(layer, torch.nn.Linear)]


def test_orthogonal_initialisation_with_the_documented_gains():
    network = make()
    for part, output_gain in ((network.policy, 0.01), (network.critic, 1.0)):
        *hidden, last = linears(part)
        for layer, gain in [*((layer, math.sqrt(2)) for layer in hidden), (last, output_gain)]:
            # All singular values of an orthogonal matrix with gain g are g.
            singular = torch.linalg.svdvals(layer.weight.detach())
            torch.testing.assert_close(singular, torch.full_like(singular, gain))
            assert not layer.bias.any()


def test_actor_and_critic_share_nothing():
    network = make()
    observations = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    network.values(observations).sum().backward()
    assert all(parameter.grad is None for parameter in network.policy.parameters())
    network.zero_grad()
    network.evaluate(Decisions(observations, torch.zeros(5, dtype=torch.int64))).logprobs.sum().backward()
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in network.critic.parameters())


def test_discrete_logprobs_and_entropy_equal_torch_distributions():
    network = make()
    torch.nn.init.normal_(linears(network.policy)[-1].weight, generator=torch.Generator().manual_seed(1))
    observations = torch.randn(7, 4, generator=torch.Generator().manual_seed(2))
    actions = torch.tensor([0, 1, 2, 0, 1, 2, 0])
    new = network.evaluate(Decisions(observations, actions))
    reference = torch.distributions.Categorical(logits=network.policy(observations))
    torch.testing.assert_close(new.logprobs, reference.log_prob(actions))
    torch.testing.assert_close(new.entropy, reference.entropy())
    assert new.values is not None and new.values.shape == (7,)


def test_gaussian_logprobs_and_entropy_equal_torch_distributions():
    network = make(continuous=True, num_actions=2)
    assert network.log_std is not None
    network.log_std.data = torch.tensor([-0.5, 0.3])
    observations = torch.randn(7, 4, generator=torch.Generator().manual_seed(2))
    actions, logprobs, _ = network.act(observations, torch.Generator().manual_seed(3))
    reference = torch.distributions.Normal(network.policy(observations), network.log_std.exp())
    new = network.evaluate(Decisions(observations, actions))
    torch.testing.assert_close(logprobs, reference.log_prob(actions).sum(-1).detach())
    torch.testing.assert_close(new.logprobs, reference.log_prob(actions).sum(-1))
    torch.testing.assert_close(new.entropy, reference.entropy().sum(-1))


def test_sampled_frequencies_match_the_softmax():
    network = make(hidden=(8,))
    last = linears(network.policy)[-1]
    torch.nn.init.zeros_(last.weight)
    last.bias.data = torch.tensor([0.0, 1.0, 2.0])
    count = 20_000
    actions, _, _ = network.act(torch.zeros(count, 4), torch.Generator().manual_seed(0))
    expected = torch.tensor([0.0, 1.0, 2.0]).softmax(0) * count
    chi_square = ((torch.bincount(actions, minlength=3) - expected) ** 2 / expected).sum()
    assert chi_square < 13.8  # 0.999 quantile with 2 degrees of freedom
    assert network.act(torch.zeros(5, 4), None)[0].tolist() == [2] * 5


def test_the_global_generator_is_left_alone():
    state = torch.get_rng_state()
    network = make()
    network.act(torch.zeros(3, 4), torch.Generator().manual_seed(0))
    assert torch.equal(state, torch.get_rng_state())
