"""Minimum length: the renormalised distribution is one in sampling, training, reference and entropy."""

from __future__ import annotations

import math

import pytest
import torch

from rlhf_ppo.core import BannedTokens, linear_logprobs
from rlhf_ppo.models.actor_critic import ActorCritic

STOPS = (0, 12, 16)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "gemma2"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_with_learning_rate_0_every_ratio_stays_1(make_trainer, make_model, prompts, kind, temperature):
    """gemma2 caps its logits, so it takes the way over whole logits; the others the fused output layer."""
    trainer = make_trainer(
        model=make_model(kind), learning_rate=0.0, min_new_tokens=3, temperature=temperature, stop_token_ids=STOPS
    )
    assert (trainer.model.runner.head is None) == (kind == "gemma2")
    rollout = trainer.rollout(prompts)
    assert int(rollout.lengths.min()) >= 3 and rollout.finished.any()
    assert not torch.isin(rollout.response_ids[:, :3], torch.tensor(STOPS)).any()
    torch.testing.assert_close(rollout.ref_logprobs, rollout.logprobs, atol=1e-5, rtol=1e-5)
    assert trainer.step(rollout)["policy/max_abs_log_ratio"] < 1e-5
    # Without the renormalisation the first tokens' probabilities would sum to less than 1, and their ratio be below it.
    plain = trainer.model(*rollout.sequences(range(8))[:4], temperature=temperature).logprobs
    assert (plain[:, :3] < rollout.logprobs[:, :3] - 1e-3).any()
    torch.testing.assert_close(plain[:, 3:], rollout.logprobs[:, 3:], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("chunk_size", [2, 5])
def test_the_renormalised_log_probs_and_their_gradients_are_exact(chunk_size):
    """log p - log(1 - sum p(stop)), written out over the whole vocabulary in float64; entropy over what is left."""
    torch.manual_seed(0)
    hidden = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(7, 3, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(7, dtype=torch.float64, requires_grad=True)
    tokens, banned = torch.tensor([0, 1, 2, 3, 6]), torch.tensor([True, False, True, False, True])

    def ours(hidden, weight, bias):
        ban = BannedTokens(banned, (4, 5))
        return linear_logprobs(
            hidden, weight, tokens, bias=bias, temperature=0.7, return_entropy=True, chunk_size=chunk_size, ban=ban
        )

    def written_out(hidden, weight, bias):
        p = ((hidden @ weight.T + bias) / 0.7).softmax(-1)
        left = torch.ones(5, 7, dtype=torch.float64)
        left[banned] = torch.tensor([1.0, 1, 1, 1, 0, 0, 1], dtype=torch.float64)
        q = p * left / (p * left).sum(-1, keepdim=True)
        entropy = -(q * torch.where(q > 0, q, 1).log()).sum(-1)
        return q.gather(1, tokens[:, None]).squeeze(1).log(), entropy

    weights = torch.linspace(-1, 1, 5, dtype=torch.float64), torch.linspace(2, 1, 5, dtype=torch.float64)
    grads = []
    for function in (ours, written_out):
        results = function(hidden, weight, bias)
        total = sum((w * x).sum() for w, x in zip(weights, results, strict=True))
        grads.append((*results, *torch.autograd.grad(total, (hidden, weight, bias))))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)
    assert torch.autograd.gradcheck(ours, (hidden, weight, bias))


def test_a_stop_token_with_nearly_all_probability_is_no_cancellation():
    """p(stop) rounds to 1 in float32, yet the other two tokens share what is left as 1 to e."""
    hidden, weight = torch.ones(1, 1), torch.tensor([[60.0], [0.0], [1.0]])
    logprobs = linear_logprobs(hidden, weight, torch.tensor([2]), ban=BannedTokens(torch.tensor([True]), (0,)))
    assert float(logprobs[0]) == pytest.approx(-math.log(1 + math.exp(-1)), abs=1e-6)


def test_tokens_banned_nowhere_give_the_plain_distribution(make_model, prompts):
    model = ActorCritic(make_model())
    ids, mask = torch.randint(1, 30, (3, 4)), torch.ones(3, 4, dtype=torch.bool)
    nowhere = BannedTokens(torch.zeros(3, 4, dtype=torch.bool), STOPS)
    with torch.no_grad():
        plain = model(ids, mask, ids, mask)
        banned = model(ids, mask, ids, mask, None, nowhere)
    torch.testing.assert_close(banned.logprobs, plain.logprobs)
    torch.testing.assert_close(banned.entropy, plain.entropy)


def test_the_entropy_bonus_sees_the_same_distribution(make_trainer, prompts):
    trainer = make_trainer(min_new_tokens=2, stop_token_ids=STOPS, ent_coef=0.1, learning_rate=0.0)
    rollout = trainer.rollout(prompts)
    now = trainer.model(*rollout.sequences(range(8)))
    torch.testing.assert_close(now.entropy, rollout.entropy, atol=1e-5, rtol=1e-5)
    trainer.step(rollout)
