"""Rewards per token by hand: where the score lands, what the KL costs, and what is refused."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from rlhf_ppo.core import kl_penalized_rewards

seeds = st.integers(0, 10_000)


def f64(x):
    return torch.tensor(x, dtype=torch.float64)


class TestPenalizedRewards:
    mask = torch.tensor([[True, True, False, False], [True, True, True, True], [False] * 4])
    kl = f64([[0.1, 0.2, 9, 9], [1, 2, 3, 4], [9, 9, 9, 9]])

    def test_the_score_sits_on_the_last_real_token(self):
        rewards = kl_penalized_rewards(f64([1, -2, 7]), self.kl, self.mask, 0.5)
        assert_close(rewards, f64([[-0.05, 1 - 0.1, 0, 0], [-0.5, -1, -1.5, -2 - 2], [0, 0, 0, 0]]))

    def test_the_last_true_step_counts_even_after_a_gap_or_padding_on_the_left(self):
        mask = torch.tensor([[False, True, False, True, False], [False, False, False, False, True]])
        rewards = kl_penalized_rewards(f64([5, 6]), torch.zeros(2, 5, dtype=torch.float64), mask, 1.0)
        assert_close(rewards, f64([[0, 0, 0, 5, 0], [0, 0, 0, 0, 6]]))

    def test_scores_per_token(self):
        scores = torch.arange(12.0, dtype=torch.float64).view(3, 4)
        rewards = kl_penalized_rewards(scores, self.kl, self.mask, 0.5)
        assert_close(rewards, f64([[-0.05, 0.9, 0, 0], [4 - 0.5, 5 - 1, 6 - 1.5, 7 - 2], [0, 0, 0, 0]]))

    def test_zeros_are_numbers_like_any_other(self):
        zero_score = kl_penalized_rewards(f64([0, 0, 0]), self.kl, self.mask, 0.5)
        assert_close(zero_score, -0.5 * self.kl * self.mask)
        zero_coef = kl_penalized_rewards(f64([1, -2, 7]), self.kl, self.mask, 0)
        assert_close(zero_coef, f64([[0, 1, 0, 0], [0, 0, 0, -2], [0, 0, 0, 0]]))
        assert torch.all(kl_penalized_rewards(f64([0, 0, 0]), self.kl, self.mask, 0.0) == 0)

    @given(seeds, st.floats(0, 2))
    def test_a_response_gets_its_score_once_and_pays_for_all_its_kl(self, seed, coef):
        g = torch.Generator().manual_seed(seed)
        kl, scores = torch.randn(4, 5, generator=g, dtype=torch.float64), torch.randn(4, generator=g).double()
        mask = torch.rand(4, 5, generator=g) > 0.5
        rewards = kl_penalized_rewards(scores, kl, mask, coef)
        assert_close(rewards.sum(1), (scores - coef * (kl * mask).sum(1)) * torch.where(mask.any(1), 1.0, coef * 0))
        padded = kl_penalized_rewards(
            scores,
            torch.cat([kl[:, :2] * 0 + 5, kl, kl[:, :3]], dim=1),
            torch.cat([mask[:, :2] & False, mask, mask[:, :3] & False], dim=1),
            coef,
        )
        assert_close(padded[:, 2:-3], rewards)

    @pytest.mark.parametrize("per_token", [False, True])
    def test_nan_in_masked_slots_changes_no_value_and_no_gradient(self, per_token):
        nan = float("nan")
        outs, grads = [], []
        for fill in (0.0, nan):
            kl = self.kl.masked_fill(~self.mask, fill).requires_grad_()
            scores = (
                f64([1, 2, fill])[:, None].expand(3, 4).masked_fill(~self.mask, fill)
                if per_token
                else f64([1, 2, fill])
            )
            scores = scores.clone().requires_grad_()
            out = kl_penalized_rewards(scores, kl, self.mask, 0.3)
            out.square().sum().backward()
            outs.append(out.detach())
            grads += [[kl.grad, scores.grad]]
        assert torch.equal(*outs)
        assert torch.equal(grads[0][0], grads[1][0])
        assert torch.equal(grads[0][1], grads[1][1])
        assert torch.all(outs[1][~self.mask] == 0)

    def test_a_coefficient_per_response(self):
        rewards = kl_penalized_rewards(f64([0, 0, 0]), self.kl, self.mask, f64([[1], [0.5], [0]]))
        assert_close(rewards, f64([[-0.1, -0.2, 0, 0], [-0.5, -1, -1.5, -2], [0, 0, 0, 0]]))

    def test_empty_responses(self):
        none = torch.zeros(2, 0)
        assert kl_penalized_rewards(torch.ones(2), none, none.bool(), 0.1).shape == (2, 0)

    def test_errors_and_inputs_left_alone(self):
        scores = f64([1, 2, 3])
        before = scores.clone(), self.kl.clone(), self.mask.clone()
        kl_penalized_rewards(scores, self.kl, self.mask, 0.5)
        for x, y in zip((scores, self.kl, self.mask), before, strict=True):
            assert torch.equal(x, y)
        with pytest.raises(ValueError, match=r"kl \(3, 4\) and mask \(3, 1\)"):
            kl_penalized_rewards(scores, self.kl, self.mask[:, :1], 0.5)
        with pytest.raises(ValueError, match="bool"):
            kl_penalized_rewards(scores, self.kl, self.mask.float(), 0.5)
        for wrong in (scores[:2], scores[:, None], f64(1.0), torch.zeros(4)):  # [B, 1] would spread over the response
            with pytest.raises(ValueError, match=rf"scores \({', '.join(map(str, wrong.shape))},?\).*\(3, 4\)"):
                kl_penalized_rewards(wrong, self.kl, self.mask, 0.5)
        with pytest.raises(ValueError, match=r"\[B, T\] \(4,\)"):
            kl_penalized_rewards(scores, self.kl[0], self.mask[0], 0.5)
        with pytest.raises(ValueError, match=r"\[B, T\] \(3,\)"):
            kl_penalized_rewards(scores, scores, scores > 0, 0.5)


@pytest.mark.parametrize("shape", [(2,), (3, 1), (2, 2), (1, 2, 3)])
def test_a_coefficient_that_does_not_broadcast_is_refused(shape):
    mask = torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"kl_coef .* does not broadcast to kl \[B, T\] \(2, 3\)"):
        kl_penalized_rewards(torch.ones(2), torch.ones(2, 3), mask, torch.full(shape, 0.1))


@pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 1), (2, 3)])
def test_a_coefficient_that_broadcasts_is_taken(shape):
    mask = torch.ones(2, 3, dtype=torch.bool)
    rewards = kl_penalized_rewards(torch.ones(2), torch.ones(2, 3), mask, torch.full(shape, 0.5))
    assert rewards.tolist() == [[-0.5, -0.5, 0.5]] * 2  # -0.5 a token, and the score 1 on the last
