"""Proves what each KL estimator is worth, as a number and as a loss, against the exact KL of a small vocabulary."""

import math

import pytest
import torch
from helpers import f64
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from rlhf_ppo.core import kl_estimate, kl_from_logits, kl_penalized_rewards

ESTIMATORS = ["k1", "k2", "k3"]
seeds = st.integers(0, 10_000)


def two_policies(seed=0, vocabulary=6):
    """Logits of a policy (with gradients) and log-probs of a reference, over one small vocabulary."""
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(vocabulary, generator=g, dtype=torch.float64).requires_grad_()
    return logits, torch.randn(vocabulary, generator=g, dtype=torch.float64).log_softmax(0)


def exact_kl(logp, logq):
    return (logp.exp() * (logp - logq)).sum()


def gradient(loss, logits):
    return torch.autograd.grad(loss, logits, retain_graph=True)[0]


class TestEstimators:
    def test_by_hand(self):
        # log-ratios ln 2, -ln 2, 0. k3 = q/p - 1 + log p/q: .5 - 1 + ln 2, 2 - 1 - ln 2, 0.
        ln2 = math.log(2)
        p, q = f64([ln2, 0, -3]), f64([0, ln2, -3])
        assert_close(kl_estimate(p, q), f64([ln2, -ln2, 0]))
        assert_close(kl_estimate(p, q, "k1"), f64([ln2, -ln2, 0]))
        assert_close(kl_estimate(p, q, "k2"), f64([ln2**2 / 2, ln2**2 / 2, 0]))
        assert_close(kl_estimate(p, q, "k3"), f64([ln2 - 0.5, 1 - ln2, 0]))

    @given(seeds)
    def test_k1_and_k3_have_the_exact_kl_as_mean_and_k2_does_not(self, seed):
        logits, logq = two_policies(seed)
        logp = logits.log_softmax(0)
        exact = exact_kl(logp, logq)
        for estimator in ("k1", "k3"):
            assert_close((logp.exp() * kl_estimate(logp, logq, estimator)).sum(), exact)

    def test_k2_is_biased_far_away_and_right_nearby(self):
        # p = (.9, .1) against q = (.1, .9): KL = .9 ln 9 - .1 ln 9 = .8 ln 9; k2 is (ln 9)^2 / 2 whatever the action.
        p, q, ln9 = f64([0.9, 0.1]).log(), f64([0.1, 0.9]).log(), math.log(9)
        assert_close(exact_kl(p, q).item(), 0.8 * ln9)
        assert_close((p.exp() * kl_estimate(p, q, "k2")).sum().item(), ln9**2 / 2)
        near = (p + 1e-3 * (q - p)).log_softmax(0)
        # 1 %: the bias is of third order in a step of 1e-3.
        assert_close((p.exp() * kl_estimate(p, near, "k2")).sum(), exact_kl(p, near), rtol=1e-2, atol=0)

    @given(seeds)
    def test_signs(self, seed):
        logits, logq = two_policies(seed)
        logp = logits.log_softmax(0)
        assert kl_estimate(logp, logq, "k1").min() < 0 < kl_estimate(logp, logq, "k1").max()
        for estimator in ("k2", "k3"):
            assert kl_estimate(logp, logq, estimator).min() >= 0
        for estimator in ESTIMATORS:
            assert torch.all(kl_estimate(logp, logp, estimator) == 0)

    def test_k3_is_exact_for_tiny_drifts_in_float32(self):
        # 1e-3 nats: k3 = x^2 / 2 - x^3 / 6 = 5e-7; exp(x) - 1 in float32 would be off by 1e-7, a fifth of it.
        x = torch.tensor([1e-3])
        assert_close(kl_estimate(-x, 0 * x, "k3"), x**2 / 2, rtol=1e-3, atol=0)  # 1e-3: the cubic term


class TestAsLosses:
    """Actions come from pi, and the gradient flows through the estimator alone, never through the sampling."""

    def expected_gradient(self, estimator, seed):
        logits, logq = two_policies(seed)
        logp = logits.log_softmax(0)
        loss = (logp.exp().detach() * kl_estimate(logp, logq, estimator)).sum()
        return gradient(loss, logits), gradient(exact_kl(logp, logq), logits), gradient(exact_kl(logq, logp), logits)

    @given(seeds)
    def test_k1_has_no_gradient_at_all(self, seed):
        # E_pi[grad log pi] = 0: what is left is noise.
        got, exact, _ = self.expected_gradient("k1", seed)
        assert_close(got, torch.zeros_like(got))
        assert exact.abs().max() > 1e-3

    @given(seeds)
    def test_k2_has_the_gradient_of_the_exact_kl(self, seed):
        # E_pi[(log pi - log ref) grad log pi] = grad KL(pi || ref).
        got, exact, _ = self.expected_gradient("k2", seed)
        assert_close(got, exact)

    @given(seeds)
    def test_k3_has_the_gradient_of_the_other_kl(self, seed):
        # E_pi[(1 - ref/pi) grad log pi] = -E_ref[grad log pi] = grad KL(ref || pi): another direction.
        got, exact, other = self.expected_gradient("k3", seed)
        assert_close(got, other)
        assert not torch.allclose(got, exact)

    def test_k3_of_the_sampling_policy_against_the_new_one_is_right(self):
        # PPO-Penalty's use: actions from the fixed old policy, gradient of KL(old || new).
        logits, old = two_policies(3)
        new = logits.log_softmax(0)
        loss = (old.exp() * kl_estimate(old, new, "k3")).sum()
        assert_close(gradient(loss, logits), gradient(exact_kl(old, new), logits))

    @pytest.mark.parametrize("estimator", ESTIMATORS)
    def test_gradcheck(self, estimator):
        p, q = (torch.randn(5, dtype=torch.float64, requires_grad=True) for _ in range(2))
        assert torch.autograd.gradcheck(lambda p, q: kl_estimate(p, q, estimator), (p, q))


class TestOverflow:
    @pytest.mark.parametrize("estimator", ESTIMATORS)
    @pytest.mark.parametrize("drift", [100.0, -100.0, 1e4, -1e4])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_a_100_nat_drift_is_finite_with_a_finite_gradient(self, estimator, drift, dtype):
        p = torch.tensor([drift], dtype=dtype, requires_grad=True)
        kl = kl_estimate(p, torch.zeros(1, dtype=dtype), estimator)
        kl.sum().backward()
        assert torch.isfinite(kl).all()
        assert torch.isfinite(p.grad).all()

    def test_k3_is_exact_up_to_20_nats_and_flat_beyond(self):
        p = f64([-19, -21, -500]).requires_grad_()
        kl = kl_estimate(p, f64([0, 0, 0]), "k3")
        assert_close(kl, f64([math.exp(19) - 20, math.exp(20) - 21, math.exp(20) - 21]))
        kl.sum().backward()
        # Flat, not reversed: a positive gradient would lower log p still further when minimised.
        assert_close(p.grad, f64([1 - math.exp(19), 0, 0]))

    def test_k3_is_linear_where_the_policy_puts_far_more_mass(self):
        assert_close(kl_estimate(f64([100]), f64([0]), "k3"), f64([99]))


def test_errors_of_the_estimators_and_inputs_left_alone():
    p, q = torch.randn(3), torch.randn(3)
    before = p.clone(), q.clone()
    for estimator in ESTIMATORS:
        kl_estimate(p, q, estimator)
    assert torch.equal(p, before[0])
    assert torch.equal(q, before[1])
    with pytest.raises(ValueError, match=r"logprobs \(3, 1\) and ref_logprobs \(3,\)"):
        kl_estimate(p[:, None], q)
    with pytest.raises(ValueError, match="'k4'; known: k1, k2, k3"):
        kl_estimate(p, q, "k4")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dtype_and_device_are_kept(dtype, device):
    p, q = (torch.randn(2, 50).to(device, dtype) for _ in range(2))
    mask = torch.rand(2, 50).to(device) > 0.3
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for estimator in ESTIMATORS:
        kl = kl_estimate(p, q, estimator)
        assert kl.dtype == dtype
        assert kl.device.type == device.type
        assert torch.equal(kl, kl_estimate(p.to(wide), q.to(wide), estimator).to(dtype))
    for scores in (p[:, 0], q):
        rewards = kl_penalized_rewards(scores, p, mask, 0.1)
        assert rewards.dtype == dtype
        assert torch.equal(rewards, kl_penalized_rewards(scores.to(wide), p.to(wide), mask, 0.1).to(dtype))


class TestExact:
    def test_by_hand(self):
        # p = (.8, .2), q = (.5, .5): .8 log 1.6 + .2 log .4
        p, q = f64([[0.8, 0.2]]).log(), f64([[0.5, 0.5]]).log()
        assert_close(kl_from_logits(p, q), f64([0.8 * math.log(1.6) + 0.2 * math.log(0.4)]))
        assert kl_from_logits(p, p + 3) == 0  # a shift of all logits is no difference

    def test_the_gradient_is_p_times_what_the_log_ratio_exceeds_the_kl_by(self):
        logits, ref = torch.randn(4, 6, dtype=torch.float64, requires_grad=True), torch.randn(4, 6, dtype=torch.float64)
        kl = kl_from_logits(logits, ref, temperature=0.7)
        log_p, log_q = ((x / 0.7).log_softmax(-1) for x in (logits.detach(), ref))
        expected = log_p.exp() * (log_p - log_q - kl.detach()[:, None]) / 0.7
        assert_close(torch.autograd.grad(kl.sum(), logits)[0], expected)

    def test_banned_tokens_add_nothing(self):
        ban = f64([0, 0, -math.inf, 0])
        logits, ref = f64([1.0, 2, 5, 0]).requires_grad_(), f64([0.5, 0, 1, 3])
        open_only = [0, 1, 3]
        for reference in (ref + ban, ref):  # with the reference banning it too, or not
            kl = kl_from_logits(logits + ban, reference)
            log_p, log_q = (logits + ban).log_softmax(-1)[open_only], reference.log_softmax(-1)[open_only]
            assert_close(kl, (log_p.exp() * (log_p - log_q)).sum())
            gradient = torch.autograd.grad(kl, logits)[0]
            assert torch.isfinite(gradient).all() and gradient[2] == 0

    def test_what_the_reference_alone_bans_is_infinite(self):
        assert kl_from_logits(f64([1.0, 2]), f64([1.0, -math.inf])) == math.inf
