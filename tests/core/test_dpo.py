"""Proves DPO's loss against its closed form, its limits, and the gradient of Bradley-Terry's likelihood."""

import math

import pytest
import torch
from helpers import f64
from torch.testing import assert_close

from rlhf_ppo.core import dpo_loss


def test_by_hand():
    # Margins of log pi/ref: (-1 - -2) - (-3 - -3) = 1; (-5 - -4) - (-2 - -6) = -5.
    loss = dpo_loss(f64([-1.0, -5]), f64([-3.0, -2]), f64([-2.0, -4]), f64([-3.0, -6]), beta=0.5)
    assert_close(loss, f64([math.log(1 + math.exp(-0.5)), math.log(1 + math.exp(2.5))]))


def test_at_the_reference_the_loss_is_log_2_and_the_gradient_half_of_beta():
    ref_chosen, ref_rejected = f64([-3.0, -40]), f64([-5.0, -7])
    chosen, rejected = ref_chosen.clone().requires_grad_(), ref_rejected.clone().requires_grad_()
    loss = dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta=0.3)
    assert_close(loss.detach(), torch.full((2,), math.log(2), dtype=torch.float64))
    by_chosen, by_rejected = torch.autograd.grad(loss.sum(), (chosen, rejected))
    # d/dm -log sigmoid(beta m) = -beta * sigmoid(-beta m), a half of beta at m = 0.
    assert_close(by_chosen, f64([-0.15, -0.15]))
    assert_close(by_rejected, f64([0.15, 0.15]))


def test_gradcheck():
    x = [torch.randn(5, dtype=torch.float64, requires_grad=True) for _ in range(4)]
    assert torch.autograd.gradcheck(lambda *x: dpo_loss(*x, beta=0.7), x)


def test_what_both_responses_share_does_not_matter():
    a, b, c, d = (torch.randn(6, dtype=torch.float64) for _ in range(4))
    expected = dpo_loss(a, b, c, d)
    assert_close(dpo_loss(a + 3, b + 3, c, d), expected)
    assert_close(dpo_loss(a, b, c - 2, d - 2), expected)
    # Swapping chosen and rejected turns sigma(m) into 1 - sigma(m): the two likelihoods sum to 1.
    assert_close((-expected).exp() + (-dpo_loss(b, a, d, c)).exp(), torch.ones(6, dtype=torch.float64))


def test_its_optimum_is_the_kl_regularised_policy():
    """Preferences drawn from Bradley-Terry scores over four answers: the minimum is ref * exp(score / beta)."""
    scores, ref = f64([0.0, 1.0, -0.5, 2.0]), torch.randn(4, dtype=torch.float64).log_softmax(0)
    beta = 0.5
    policy = (ref + scores / beta).log_softmax(0).requires_grad_()
    pairs = torch.cartesian_prod(torch.arange(4), torch.arange(4))
    chosen, rejected = pairs[:, 0], pairs[:, 1]
    likelihood = torch.sigmoid(scores[chosen] - scores[rejected])
    loss = dpo_loss(policy[chosen], policy[rejected], ref[chosen], ref[rejected], beta=beta)
    gradient = torch.autograd.grad((likelihood * loss).sum(), policy)[0]
    assert_close(gradient, torch.zeros_like(gradient))


def test_large_margins_stay_finite_with_a_gradient():
    big = torch.tensor([1e4, -1e4], requires_grad=True)
    loss = dpo_loss(big, torch.zeros(2), torch.zeros(2), torch.zeros(2), beta=1.0)
    assert loss.tolist() == [0, 1e4]
    assert torch.autograd.grad(loss.sum(), big)[0].tolist() == [0, -1]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dtype_and_device_are_kept(dtype, device):
    x = [torch.randn(4).to(device, dtype) for _ in range(4)]
    loss = dpo_loss(*x)
    assert loss.dtype == dtype and loss.device.type == device.type
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert torch.equal(loss, dpo_loss(*[y.to(wide) for y in x]).to(dtype))


def test_errors():
    x = torch.zeros(3)
    with pytest.raises(ValueError, match=r"ref_rejected \(3, 1\) and policy_chosen \(3,\)"):
        dpo_loss(x, x, x, x[:, None])
    with pytest.raises(ValueError, match=r"beta must be positive, got 0.0"):
        dpo_loss(x, x, x, x, beta=0.0)
