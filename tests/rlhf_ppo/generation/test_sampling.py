"""Draws follow the distribution to the last digit, and no token without probability is ever drawn."""

from __future__ import annotations

import math

import pytest
import torch

from rlhf_ppo.core import token_logprobs
from rlhf_ppo.generation.sampling import draw, sample_from_logits, uniforms


def sample_tokens(logits: torch.Tensor, seed: int) -> torch.Tensor:
    """One draw per row from softmax(logits)."""
    u = uniforms(1, len(logits), torch.Generator().manual_seed(seed), logits.device)[0]
    return sample_from_logits(logits.clone(), u, 1.0)[0]


def test_tokens_of_tiny_or_no_probability():
    # softmax of (0, -inf, -2) is (0.881, 0, 0.119).
    logits = torch.tensor([0.0, -math.inf, -2.0]).expand(50_000, 3)
    counts = torch.bincount(sample_tokens(logits, 1), minlength=3)
    assert counts[1] == 0
    p = 1 / (1 + math.exp(2))
    # Four standard deviations of a binomial share.
    assert counts[2] / 50_000 == pytest.approx(p, abs=4 * math.sqrt(p * (1 - p) / 50_000))
    # A banned last token is not drawn either.
    assert sample_tokens(torch.tensor([[0.0, -math.inf]]).expand(10_000, 2), 2).max() == 0


def test_same_generator_same_tokens():
    logits = torch.randn(64, 50, generator=torch.Generator().manual_seed(0))
    draws = [sample_tokens(logits, seed) for seed in (3, 3, 4)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def spread(vocabulary: int, seed: int = 0) -> torch.Tensor:
    """Weights over a few powers of ten, with single zeros and, if there is room, a whole block of them."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(vocabulary, generator=generator).mul(2).exp()
    weights[torch.rand(vocabulary, generator=generator) < 0.2] = 0
    if vocabulary > 512:
        weights[256:512] = 0
    weights[-1] = 0
    return weights


@pytest.mark.parametrize("vocabulary", [255, 256, 257, 600, 768, 1000])
def test_draws_follow_the_weights(vocabulary):
    """An even grid of u instead of random ones: each token's share is its weight to within one grid step."""
    weights = spread(vocabulary)
    n = 20_000
    u = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    tokens = draw(weights.expand(n, vocabulary), u)
    counts = torch.bincount(tokens, minlength=vocabulary)
    expected = weights.double() / weights.double().sum() * n
    assert counts.shape == (vocabulary,)
    assert (counts[weights == 0] == 0).all()
    # A token covers an interval of u; a grid of step 1/n puts its length * n in it, give or take one.
    assert (counts - expected).abs().max() <= 1 + 1e-3
    # Inverting the cumulative distribution never goes down as u goes up.
    assert (tokens.diff() >= 0).all()


@pytest.mark.parametrize("vocabulary", [255, 256, 257, 600, 768, 1000])
def test_the_ends_of_u_never_reach_a_token_without_weight(vocabulary):
    weights = torch.stack([spread(vocabulary, seed) for seed in range(50)])
    weights[:, :3] = 0
    if vocabulary > 512:
        weights[25:, :256] = 0
    first, last = (weights > 0).int().argmax(dim=1), vocabulary - 1 - (weights > 0).flip(1).int().argmax(dim=1)
    for dtype in (torch.float64, torch.float32):
        one = torch.ones(50, dtype=dtype)
        assert torch.equal(draw(weights, torch.zeros_like(one)), first)
        drawn = draw(weights, torch.nextafter(one, torch.zeros_like(one)))
        assert (weights[torch.arange(50), drawn] > 0).all()
        if dtype == torch.float64:
            assert torch.equal(drawn, last)


def test_tokens_of_tiny_weight():
    """Alone they share all the mass; beside a token of weight 1 a weight that float64 still sees keeps its share."""
    weights = torch.zeros(1, 1000)
    weights[0, [5, 300, 999]] = 1e-30
    u = torch.tensor([0.0, 0.2, 0.4, 0.6, 0.7, 0.999])
    assert draw(weights.expand(6, -1), u.double()).tolist() == [5, 5, 300, 300, 999, 999]
    # 1 + 1e-9 is 1 in float32, so a sum of the block in float32 must not hide the token at its end.
    for end in (255, 511, 999):
        weights = torch.zeros(1, 1000)
        weights[0, end // 256 * 256], weights[0, end] = 1.0, 1e-9
        for u, expected in ((1 - 2e-9, end // 256 * 256), (1 - 5e-10, end)):
            assert draw(weights, torch.tensor([u], dtype=torch.float64)).tolist() == [expected]
    # Beyond float64 it is as good as impossible, and nothing else is drawn in its place.
    weights = torch.zeros(1, 600)
    weights[0, [0, 599]] = torch.tensor([1.0, 1e-30])
    assert draw(weights, torch.tensor([math.nextafter(1, 0)], dtype=torch.float64)).item() in (0, 599)


def test_banned_tokens_are_never_drawn_and_the_log_prob_is_that_of_the_distribution_drawn_from():
    """Over a vocabulary of three blocks, the middle one banned whole."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 700, generator=generator) * 3
    logits[:, 256:512] = -math.inf
    logits[:, ::7] = -math.inf
    n = 20_000
    u = torch.rand(n, generator=generator, dtype=torch.float64)
    token, logprob, entropy = sample_from_logits(logits.repeat(n, 1), u, 0.7)
    assert torch.isfinite(logits[0, token]).all()
    torch.testing.assert_close(logprob, token_logprobs(logits.expand(n, -1), token, temperature=0.7))
    exact = torch.distributions.Categorical(logits=(logits[0, torch.isfinite(logits[0])] / 0.7).double())
    torch.testing.assert_close(entropy, exact.entropy().float().expand(n))
    expected = (logits[0].double() / 0.7).softmax(-1) * n
    counts = torch.bincount(token, minlength=700)
    common = expected >= 5  # the chi-square approximation needs 5 expected counts a cell; the rest share one cell
    counts = torch.cat([counts[common], counts[~common].sum()[None]])
    expected = torch.cat([expected[common], expected[~common].sum()[None]])
    freedom = len(expected) - 1
    # chi-square passes this with probability 1e-4 (Wilson-Hilferty).
    bound = freedom * (1 - 2 / (9 * freedom) + 3.719 * math.sqrt(2 / (9 * freedom))) ** 3
    assert float(((counts - expected) ** 2 / expected).sum()) < bound
