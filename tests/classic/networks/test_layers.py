"""Layers: recurrent ones against a loop over steps, resets, one call per sequence; images; what is shared."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from classic.envs.spaces import ActionLayout
from classic.networks.actor_critic import ActorCritic, Decisions
from classic.networks.layers import Memory, Tanh, image_network

KINDS = ["lstm", "gru"]


def draw(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make(shape=(3,), choices=(4,), **settings) -> ActorCritic:
    return ActorCritic(shape, ActionLayout(choices=choices), hidden_sizes=(8,), generator=draw(), **settings)


def sequences(batch=4, length=9):
    """(observations, starts, state): episodes of all lengths, one step among them; copy 0 begins inside an episode."""
    observations = torch.randn(batch, length, 3, generator=draw(1))
    starts = torch.rand(batch, length, generator=draw(2)) < 0.3
    if batch > 2:
        starts[0, 0], starts[1, 0], starts[2, 4:6] = False, True, True
    return observations, starts


@pytest.mark.parametrize("length", [9, 70])
@pytest.mark.parametrize("kind", KINDS)
def test_whole_sequences_equal_steps_one_by_one_with_gradients(kind, length):
    memory = Memory(kind, 3, 5, draw())
    x, starts = sequences(length=length)
    starts[3, 20:] = False
    state = torch.randn(4, memory.state_size, generator=draw(3))
    x.requires_grad_()
    whole = memory(x, starts, state)
    ours = torch.autograd.grad(whole.square().sum(), [x, *memory.parameters()])
    outputs, at = [], state
    for t in range(x.shape[1]):
        output, at = memory.step(x[:, t], starts[:, t], at)
        outputs.append(output)
    stepped = torch.stack(outputs, dim=1)
    theirs = torch.autograd.grad(stepped.square().sum(), [x, *memory.parameters()])
    torch.testing.assert_close(whole, stepped)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("kind", KINDS)
def test_sequences_of_similar_length_are_one_call(kind, monkeypatch):
    memory = Memory(kind, 3, 5, draw())
    calls, forward = [], memory.rnn.forward
    monkeypatch.setattr(memory.rnn, "forward", lambda *a: (calls.append(1), forward(*a))[1])
    x, starts = sequences()
    memory(x, starts, torch.zeros(4, memory.state_size))
    assert calls == [1]


@pytest.mark.parametrize("kind", KINDS)
def test_the_recurrent_state_is_reset_where_episodes_start(kind):
    memory = Memory(kind, 3, 5, draw())
    x, starts = sequences(1, 6)
    starts[:] = False
    starts[0, 3] = True
    state = torch.randn(1, memory.state_size, generator=draw(3))
    before = memory(x, starts, state)
    changed = x.clone()
    changed[0, :3] += 1
    after = memory(changed, starts, state + 1)
    assert torch.equal(before[0, 3:], after[0, 3:]) and not torch.equal(before[0, :3], after[0, :3])


def test_images_become_features_and_the_global_generator_is_left_alone():
    before = torch.get_rng_state()
    network = image_network((3, 36, 40), draw())
    make(recurrent="lstm", shared=True)
    assert torch.equal(before, torch.get_rng_state())
    pixels = torch.randint(0, 256, (2, 3, 36, 40), dtype=torch.uint8, generator=draw())
    assert network(pixels).shape == (2, 512)


@pytest.mark.parametrize("recurrent", ["none", *KINDS])
@pytest.mark.parametrize("shared", [False, True])
def test_the_critic_trains_the_policys_layers_only_when_shared(shared, recurrent):
    network = make(shared=shared, recurrent=recurrent)
    observations, starts = sequences()
    if recurrent == "none":
        values = network.values(observations.flatten(0, 1))
    else:
        values = network.values(observations, starts, network.initial_state(4))
    values.sum().backward()
    policy = list(network.bodies[0].parameters()) if len(network.bodies) else list(network.policy.parameters())
    assert all((p.grad is not None) == shared for p in policy)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_acting_step_by_step_equals_evaluating_the_sequence(kind, shared):
    network = make(recurrent=kind, shared=shared)
    nn.init.normal_(network.policy[-1].weight, generator=draw(4))
    observations, starts = sequences()
    first = at = torch.randn(4, network.state_size, generator=draw(5))
    actions, logprobs = [], []
    generator = draw(6)
    for t in range(observations.shape[1]):
        action, logprob, at = network.act(observations[:, t], generator, starts=starts[:, t], state=at)
        actions.append(action)
        logprobs.append(logprob)
    decisions = Decisions(observations, torch.stack(actions, dim=1), starts=starts, state=first)
    new = network.evaluate(decisions)
    torch.testing.assert_close(new.logprobs, torch.stack(logprobs, dim=1))
    torch.testing.assert_close(new.values, network.values(observations, starts, first))
    # A minibatch of whole sequences says the same about them.
    torch.testing.assert_close(network.evaluate(decisions[torch.tensor([2, 0])]).logprobs, new.logprobs[[2, 0]])


def test_masked_options_have_probability_zero_in_acting_and_evaluating():
    network = make(choices=(3, 2))
    masks = torch.tensor([[True, False, True, False, True]]).expand(500, 5)
    observations = torch.randn(500, 3, generator=draw(1))
    actions, logprobs, _ = network.act(observations, draw(2), action_masks=masks)
    assert set(actions[:, 0].tolist()) == {0, 2} and set(actions[:, 1].tolist()) == {1}
    new = network.evaluate(Decisions(observations, actions, action_masks=masks))
    torch.testing.assert_close(new.logprobs, logprobs)
    # Weights near 0: two options of equal probability, and one alone.
    torch.testing.assert_close(new.entropy, torch.full((500,), 0.6931), atol=1e-2, rtol=0)
    assert network.act(observations, None, action_masks=masks)[0][:, 1].tolist() == [1] * 500


def test_tanh_is_torchs_to_a_rounding_and_so_is_its_gradient():
    for dtype, tolerance in ((torch.float32, 3e-7), (torch.float64, 1e-15)):
        x = torch.cat([torch.linspace(-6, 6, 1001), torch.tensor([0.0, 50.0, -50.0])]).to(dtype).requires_grad_()
        ours, theirs = Tanh()(x), torch.tanh(x)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance)
        slopes = [torch.autograd.grad(y.sum(), x)[0] for y in (ours, theirs)]
        torch.testing.assert_close(*slopes, rtol=0, atol=4 * tolerance)
        with torch.no_grad():
            assert torch.equal(Tanh()(x), ours)
