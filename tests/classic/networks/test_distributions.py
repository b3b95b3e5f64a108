"""Distributions against torch.distributions, or against integrals and hand-computed numbers."""

from __future__ import annotations

import math

import pytest
import torch

from classic.networks.distributions import (
    categorical_logprobs,
    gaussian_entropy,
    gaussian_logprobs,
    gumbel_noise,
    log_tanh_slope,
    normal_noise,
    sample_categorical,
    sample_gaussian,
    split_choices,
    squashed_entropy,
    squashed_logprobs,
)

INF = math.inf


def draw(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_categorical_equals_torch():
    logits = 3 * torch.randn(6, 4, generator=draw())
    actions = torch.tensor([0, 1, 2, 3, 0, 1])
    logprobs, entropy = categorical_logprobs(logits, actions)
    reference = torch.distributions.Categorical(logits=logits)
    torch.testing.assert_close(logprobs, reference.log_prob(actions))
    torch.testing.assert_close(entropy, reference.entropy())


def test_an_option_at_minus_infinity_has_probability_zero_and_gives_no_nan():
    """Among two allowed options at equal logits each has probability 1/2 and the entropy is log 2."""
    logits = torch.tensor([[1.0, 5.0, 1.0]], requires_grad=True)
    masked = logits.masked_fill(torch.tensor([[False, True, False]]), -INF)
    logprobs, entropy = categorical_logprobs(masked, torch.tensor([0]))
    assert logprobs.item() == pytest.approx(-math.log(2)) and entropy.item() == pytest.approx(math.log(2))
    (logprobs.sum() + entropy.sum()).backward()
    assert logits.grad is not None and torch.isfinite(logits.grad).all() and logits.grad[0, 1] == 0
    taken = sample_categorical(masked.detach(), gumbel_noise((2_000, 3), draw()))
    assert set(taken.tolist()) == {0, 2}


def test_a_single_allowed_option_has_entropy_zero():
    logprobs, entropy = categorical_logprobs(torch.tensor([[-INF, 3.0]]), torch.tensor([1]))
    assert logprobs.item() == 0 and entropy.item() == 0


def test_choices_of_different_sizes_are_split_without_mixing_them():
    logits = torch.randn(5, 5, generator=draw(), requires_grad=True)
    split = split_choices(logits, (2, 3))
    actions = torch.tensor([[0, 0], [1, 1], [0, 2], [1, 0], [0, 1]])
    logprobs, entropy = categorical_logprobs(split, actions)
    parts = [torch.distributions.Categorical(logits=part) for part in logits.split([2, 3], dim=-1)]
    torch.testing.assert_close(logprobs, torch.stack([p.log_prob(actions[:, i]) for i, p in enumerate(parts)], dim=1))
    torch.testing.assert_close(entropy, torch.stack([p.entropy() for p in parts], dim=1))
    logprobs.sum().backward()
    assert logits.grad is not None and torch.isfinite(logits.grad).all()
    # The option that the first choice does not have is never drawn.
    assert sample_categorical(split.detach(), gumbel_noise((500, 5, 2, 3), draw()))[..., 0].max() == 1
    assert torch.equal(split_choices(logits[:, :4], (2, 2)), logits[:, :4].reshape(5, 2, 2))


def test_gaussian_equals_torch():
    mean, log_std = torch.randn(7, 3, generator=draw()), torch.tensor([-1.0, 0.0, 0.5])
    actions = sample_gaussian(mean, log_std, normal_noise((7, 3), draw(1)))
    reference = torch.distributions.Normal(mean, log_std.exp())
    torch.testing.assert_close(gaussian_logprobs(mean, log_std, actions), reference.log_prob(actions).sum(-1))
    torch.testing.assert_close(gaussian_entropy(log_std).expand(7), reference.entropy().sum(-1))
    assert torch.equal(sample_gaussian(mean, log_std, None), mean)
    many = sample_gaussian(torch.zeros(20_000, 3), log_std, normal_noise((20_000, 3), draw(2)))
    torch.testing.assert_close(many.std(0), log_std.exp(), rtol=0.03, atol=0)


@pytest.mark.parametrize("noise", [gumbel_noise, normal_noise])
def test_noise_for_many_steps_is_that_of_step_after_step(noise):
    generator = draw(3)
    steps = torch.stack([noise((5, 2), generator) for _ in range(40)])
    assert torch.equal(noise((40, 5, 2), draw(3)), steps) and torch.isfinite(steps).all()
    mean, std = {gumbel_noise: (0.5772, math.pi / 6**0.5), normal_noise: (0.0, 1.0)}[noise]
    many = noise((50_000,), draw(4))
    assert many.mean().item() == pytest.approx(mean, abs=0.02) and many.std().item() == pytest.approx(std, rel=0.02)


def test_squashed_density_equals_torch_and_integrates_to_one():
    mean, log_std = torch.tensor([[0.3]]), torch.tensor([-0.4])
    base = torch.distributions.Normal(mean, log_std.exp())
    reference = torch.distributions.TransformedDistribution(base, [torch.distributions.TanhTransform()])
    before = torch.linspace(-2, 2, 9).unsqueeze(1)
    torch.testing.assert_close(
        squashed_logprobs(mean, log_std, before), reference.log_prob(before.tanh()).sum(-1), rtol=1e-4, atol=1e-4
    )
    after = torch.linspace(-0.99999, 0.99999, 200_001, dtype=torch.float64).unsqueeze(1)
    density = squashed_logprobs(mean.double(), log_std.double(), after.atanh()).exp()
    assert torch.trapezoid(density, after[:, 0]).item() == pytest.approx(1, abs=1e-3)


def test_the_slope_of_tanh_stays_finite_where_tanh_rounds_to_one():
    """log(1 - tanh(x)^2) -> 2 log 2 - 2 |x| for large |x|; the plain formula gives -inf from about 9 on."""
    x = torch.tensor([-50.0, 0.0, 20.0, 50.0], requires_grad=True)
    slope = log_tanh_slope(x)
    torch.testing.assert_close(slope.detach(), torch.tensor([-100.0, 0.0, -40.0, -100.0]) + 2 * math.log(2) * (x != 0))
    slope.sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, torch.tensor([2.0, 0.0, -2.0, -2.0]))


@pytest.mark.parametrize("std", [0.1, 0.6, 1.0, 2.0])
@pytest.mark.parametrize("mean", [0.0, 0.7, -2.0])
def test_squashed_entropy_equals_a_numerical_integral(mean, std):
    """H = -integral of p(u) log p(tanh u) du, on a fine grid over +- 10 standard deviations."""
    means, log_std = torch.tensor([[mean]]), torch.tensor([math.log(std)])
    u = torch.linspace(mean - 10 * std, mean + 10 * std, 20_001, dtype=torch.float64).unsqueeze(1)
    density = gaussian_logprobs(means.double(), log_std.double(), u).exp()
    exact = -torch.trapezoid(density * squashed_logprobs(means.double(), log_std.double(), u), u[:, 0])
    assert squashed_entropy(means, log_std).item() == pytest.approx(exact.item(), abs=2e-3)
