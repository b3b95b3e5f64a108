"""Proves each loss and its gradient against numbers by hand, closed forms and limits, whole or in parts."""

import math

import pytest
import torch
from helpers import f64
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from rlhf_ppo.core import (
    Experience,
    PolicyOutput,
    PPOConfig,
    aggregate_loss,
    cispo_policy_loss,
    clipped_policy_loss,
    clipped_value_loss,
    dis_policy_loss,
    loss_denominator,
    masked_mean,
    penalty_policy_loss,
    policy_gradient_loss,
    ppo_loss,
)
from rlhf_ppo.core.ratios import probability_ratio

seeds = st.integers(0, 10_000)
AGGREGATIONS = ["token_mean", "sequence_mean", "sequence_sum"]
OBJECTIVES = ["clip", "penalty", "adaptive_clip", "dual_clip", "cispo", "dis", "a2c", "reinforce"]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def with_gradient(loss, leaf):
    """The loss per action and d(sum of losses) / d leaf."""
    return loss.detach(), torch.autograd.grad(loss.sum(), leaf)[0]


# Six actions with their ratios and advantages; the old log-probs are -1 throughout.
RATIOS = [1.5, 0.5, 1.5, 0.5, 4.0, 1.1]
ADVANTAGES = [1.0, 1.0, -1.0, -1.0, -1.0, 2.0]


def six_actions():
    logprobs = (f64(RATIOS).log() - 1).requires_grad_()
    return logprobs, torch.full_like(logprobs, -1).detach(), f64(ADVANTAGES)


class TestClippedPolicyLoss:
    @pytest.mark.parametrize(("sign", "expected"), [(1, -0.17117784), (-1, 0.19333333)])
    def test_published_vector(self, sign, expected):
        ratios, advantages = f64([1, 1, math.exp(-2)]), sign * f64([0.3, 0.2, 0.1])
        loss = clipped_policy_loss(ratios.log(), torch.zeros_like(ratios), advantages, clip_range=0.2)
        # 5e-9: the figures are printed to eight decimals.
        assert_close(loss.mean().item(), expected, rtol=0, atol=5e-9)

    def test_by_hand(self):
        # A > 0: r 1.5 is clipped to 1.2, gradient 0; r .5 is not, though it is out of range.
        # A < 0: r .5 is clipped to .8, gradient 0; r 1.5 and 4 are not. In range (r 1.1, A 2): -2.2.
        # d loss / d log pi = -r A wherever the clip does not hold.
        x, old, a = six_actions()
        loss, grad = with_gradient(clipped_policy_loss(x, old, a), x)
        assert_close(loss, f64([-1.2, -0.5, 1.5, 0.8, 4.0, -2.2]))
        assert_close(grad, f64([0, -0.5, 1.5, 0, 4.0, -2.2]))

    def test_the_two_sides_may_differ(self):
        x, old, a = six_actions()
        loss, grad = with_gradient(clipped_policy_loss(x, old, a, clip_range=0.6, clip_range_high=0.05), x)
        assert_close(loss, f64([-1.05, -0.5, 1.5, 0.5, 4.0, -2.1]))
        assert_close(grad, f64([0, -0.5, 1.5, 0.5, 4.0, 0]))
        upper_zero = clipped_policy_loss(x, old, a, clip_range=0.6, clip_range_high=0.0)  # 0 is a range, not "unset"
        assert_close(upper_zero.detach(), f64([-1.0, -0.5, 1.5, 0.5, 4.0, -2.0]))

    def test_dual_clip_bounds_bad_actions_alone(self):
        x, old, a = six_actions()
        loss, grad = with_gradient(clipped_policy_loss(x, old, a, dual_clip=3.0), x)
        assert_close(loss, f64([-1.2, -0.5, 1.5, 0.8, 3.0, -2.2]))
        assert_close(grad, f64([0, -0.5, 1.5, 0, 0, -2.2]))
        good = clipped_policy_loss(f64([5.0]), f64([0.0]), f64([1.0]), clip_range=1e9, dual_clip=3.0)
        assert_close(good, f64([-math.exp(5)]))  # r 148 with A > 0 stays as it is

    @given(seeds)
    def test_an_endless_range_is_the_unclipped_policy_gradient(self, seed):
        g = torch.Generator().manual_seed(seed)
        new, old, a = (torch.randn(8, generator=g, dtype=torch.float64) for _ in range(3))
        new.requires_grad_()
        loss, grad = with_gradient(clipped_policy_loss(new, old, a, clip_range=1e9), new)
        ratio = (new - old).exp().detach()
        assert_close(loss, -ratio * a)
        assert_close(grad, -ratio * a)

    @given(seeds)
    def test_at_ratio_1_the_gradient_is_a2c_s(self, seed):
        g = torch.Generator().manual_seed(seed)
        new, a = (torch.randn(8, generator=g, dtype=torch.float64) for _ in range(2))
        new.requires_grad_()
        for loss in (
            clipped_policy_loss(new, new.detach(), a),
            clipped_policy_loss(new, new.detach(), a, dual_clip=2.0),
            penalty_policy_loss(new, new.detach(), a, beta=3.0),
        ):
            assert_close(with_gradient(loss, new)[1], with_gradient(policy_gradient_loss(new, a), new)[1])

    @given(seeds, st.floats(0.01, 0.9))
    def test_the_gradient_dies_in_two_cases_and_no_other(self, seed, eps):
        g = torch.Generator().manual_seed(seed)
        new, old, a = (torch.randn(20, generator=g, dtype=torch.float64) for _ in range(3))
        new.requires_grad_()
        loss, grad = with_gradient(clipped_policy_loss(new, old, a, clip_range=eps), new)
        for r, advantage, slope, value in zip((new - old).exp().tolist(), a.tolist(), grad, loss, strict=True):
            killed = (advantage > 0 and r > 1 + eps) or (advantage < 0 and r < 1 - eps)
            assert (slope == 0) == killed
            assert value >= -r * advantage - 1e-12  # the clip is pessimistic: never better than unclipped

    def test_no_range_at_all_leaves_only_the_way_back(self):
        x, old, a = six_actions()
        loss, grad = with_gradient(clipped_policy_loss(x, old, a, clip_range=0.0), x)
        assert_close(loss, f64([-1.0, -0.5, 1.5, 1.0, 4.0, -2.0]))
        assert_close(grad, f64([0, -0.5, 1.5, 0, 4.0, 0]))

    @pytest.mark.parametrize("dual_clip", [None, 3.0])
    def test_gradcheck_away_from_the_kinks(self, dual_clip):
        x, old, a = six_actions()
        old.requires_grad_()
        a.requires_grad_()
        assert torch.autograd.gradcheck(lambda *xs: clipped_policy_loss(*xs, dual_clip=dual_clip), (x, old, a))

    @pytest.mark.parametrize("drift", [100.0, -100.0, 1e4])
    @pytest.mark.parametrize("advantage", [1.0, -1.0])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_a_100_nat_drift_is_finite(self, drift, advantage, dtype):
        new = torch.tensor([drift], dtype=dtype, requires_grad=True)
        old, a = torch.zeros(1, dtype=dtype), torch.tensor([advantage], dtype=dtype)
        for loss in (clipped_policy_loss(new, old, a), penalty_policy_loss(new, old, a, beta=1.0)):
            value, grad = with_gradient(loss, new)
            assert torch.isfinite(value).all()
            assert torch.isfinite(grad).all()

    def test_the_ratio_is_exact_within_20_nats_and_stops_there(self):
        ratio = probability_ratio(f64([19.5, -19.5, 30, -30]), f64([0, 0, 0, 0]))
        assert_close(ratio.log(), f64([19.5, -19.5, 20, -20]))

    def test_errors(self):
        x = torch.zeros(4)
        with pytest.raises(ValueError, match=r"old_logprobs \(4, 1\) and logprobs \(4,\)"):
            clipped_policy_loss(x, x[:, None], x)
        with pytest.raises(ValueError, match=r"advantages \(4, 1\) and logprobs \(4,\)"):
            clipped_policy_loss(x, x, x[:, None])
        with pytest.raises(ValueError, match=r"clip_range=-0\.1"):
            clipped_policy_loss(x, x, x, clip_range=-0.1)
        with pytest.raises(ValueError, match=r"clip_range_high=-0\.1"):
            clipped_policy_loss(x, x, x, clip_range_high=-0.1)
        for wrong in (1.0, 0.5):
            with pytest.raises(ValueError, match=f"dual_clip must be above 1, got {wrong}"):
                clipped_policy_loss(x, x, x, dual_clip=wrong)


class TestCISPO:
    def test_by_hand(self):
        x, old, a = six_actions()
        loss, grad = with_gradient(cispo_policy_loss(x, old, a, clip_range_high=0.2), x)
        weights = f64([1.2, 0.5, 1.2, 0.5, 1.2, 1.1])  # no lower bound
        assert_close(loss, -weights * a * (f64(RATIOS).log() - 1))
        assert_close(grad, -weights * a)

    @given(seeds)
    def test_an_endless_cap_is_the_unclipped_policy_gradient_and_ratio_1_a2c(self, seed):
        g = torch.Generator().manual_seed(seed)
        new, old, a = (torch.randn(8, generator=g, dtype=torch.float64) for _ in range(3))
        new.requires_grad_()
        endless = with_gradient(cispo_policy_loss(new, old, a, clip_range_high=1e9), new)[1]
        assert_close(endless, -(new.detach() - old).exp() * a)
        same = cispo_policy_loss(new, new.detach(), a, clip_range_high=0.0)
        for x, y in zip(with_gradient(same, new), with_gradient(policy_gradient_loss(new, a), new), strict=True):
            assert_close(x, y)

    def test_errors(self):
        x = torch.zeros(2)
        with pytest.raises(ValueError, match=r"clip_range_high must not be negative, got -0.1"):
            cispo_policy_loss(x, x, x, clip_range_high=-0.1)
        with pytest.raises(ValueError, match=r"advantages \(2, 1\) and logprobs \(2,\)"):
            cispo_policy_loss(x, x, x[:, None], clip_range_high=0.1)


class TestDIS:
    def test_by_hand(self):
        # 1 - .6 < r < 1 + 3.5 holds for all but r 4.5; with .2 on both sides for r 1.1 alone, whatever the sign of A.
        x, sampled, a = six_actions()
        loss, grad = with_gradient(dis_policy_loss(x, sampled, a, clip_range=0.6, clip_range_high=3.5), x)
        assert_close(loss, -f64(RATIOS) * a * (f64(RATIOS).log() - 1))
        assert_close(grad, -f64(RATIOS) * a)
        loss, grad = with_gradient(dis_policy_loss(x, sampled, a), x)
        assert_close(loss, f64([0, 0, 0, 0, 0, -2.2 * (math.log(1.1) - 1)]))
        assert_close(grad, f64([0, 0, 0, 0, 0, -2.2]))

    def test_the_bounds_themselves_are_masked(self):
        x = f64([0.5, 2.0]).log().requires_grad_()
        _, grad = with_gradient(dis_policy_loss(x, 0 * x, f64([1.0, 1.0]), clip_range=0.5, clip_range_high=1.0), x)
        assert_close(grad, f64([0, 0]))

    @given(seeds)
    def test_inside_the_range_it_is_cispo_and_at_ratio_1_a2c(self, seed):
        g = torch.Generator().manual_seed(seed)
        new, old, a = (torch.randn(8, generator=g, dtype=torch.float64) for _ in range(3))
        new.requires_grad_()
        pairs = [
            (dis_policy_loss(new, old, a, clip_range=1.0, clip_range_high=1e9), (new, old, 1e9)),
            (dis_policy_loss(new, new.detach(), a), (new, new.detach(), 1e9)),
        ]
        for masked, (x, before, high) in pairs:
            capped = cispo_policy_loss(x, before, a, clip_range_high=high)
            for left, right in zip(with_gradient(masked, new), with_gradient(capped, new), strict=True):
                assert_close(left, right)

    def test_errors(self):
        x = torch.zeros(2)
        with pytest.raises(ValueError, match=r"clip_range=0.2, clip_range_high=-0.1"):
            dis_policy_loss(x, x, x, clip_range_high=-0.1)
        with pytest.raises(ValueError, match=r"sampled_logprobs \(2, 1\) and logprobs \(2,\)"):
            dis_policy_loss(x, x[:, None], x)


class TestOtherPolicyLosses:
    def test_penalty_by_hand(self):
        # -r A + beta ((r - 1) - log r); its gradient is -r A + beta (r - 1).
        x, old, a = six_actions()
        loss, grad = with_gradient(penalty_policy_loss(x, old, a, beta=0.5), x)
        ra = [1.5, 0.5, -1.5, -0.5, -4.0, 2.2]
        assert_close(loss, f64([-y + 0.5 * (r - 1 - math.log(r)) for y, r in zip(ra, RATIOS, strict=True)]))
        assert_close(grad, f64([-1.25, -0.75, 1.75, 0.25, 5.5, -2.15]))

    def test_penalty_without_weight_is_the_unclipped_surrogate(self):
        x, old, a = six_actions()
        assert_close(penalty_policy_loss(x, old, a, beta=0.0), clipped_policy_loss(x, old, a, clip_range=1e9))

    def test_penalty_pulls_back_toward_the_old_policy(self):
        x, old, _ = six_actions()
        _, grad = with_gradient(penalty_policy_loss(x, old, torch.zeros_like(old), beta=1.0), x)
        assert torch.equal(grad.sign(), (x - old).detach().sign())

    def test_policy_gradient_by_hand(self):
        x = f64([-1.0, -2.0]).requires_grad_()
        loss, grad = with_gradient(policy_gradient_loss(x, f64([3.0, -0.5])), x)
        assert_close(loss, f64([3.0, -1.0]))
        assert_close(grad, f64([-3.0, 0.5]))

    def test_gradcheck(self):
        x, old, a = six_actions()
        old.requires_grad_()
        assert torch.autograd.gradcheck(lambda x, old: penalty_policy_loss(x, old, a, beta=0.7), (x, old))
        assert torch.autograd.gradcheck(lambda x: policy_gradient_loss(x, a), x)

    def test_errors(self):
        x = torch.zeros(4)
        for wrong in [(x[:, None], x), (x, x[:, None])]:
            with pytest.raises(ValueError, match=r"\(4, 1\) and logprobs \(4,\)"):
                penalty_policy_loss(x, *wrong, beta=1.0)
        with pytest.raises(ValueError, match=r"advantages \(4, 1\) and logprobs \(4,\)"):
            policy_gradient_loss(x, x[:, None])


class TestValueLoss:
    def test_by_hand(self):
        v = f64([1.0, 5.0]).requires_grad_()
        loss, grad = with_gradient(clipped_value_loss(v, None, f64([3.0, 4.0])), v)
        assert_close(loss, f64([2.0, 0.5]))  # half the square
        assert_close(grad, f64([-2.0, 1.0]))

    def test_clipping_by_hand(self):
        # Old value 0, range .5, target 2. V: .2 inside the range; 1 clipped to .5, which is further off: 1.5^2 / 2, no
        # gradient; 4 clipped to .5: 1.125 against 2, so the gradient stays; -1 clipped to -.5: 4.5 against 3.125.
        v = f64([0.2, 1.0, 4.0, -1.0]).requires_grad_()
        loss, grad = with_gradient(clipped_value_loss(v, f64([0.0] * 4), f64([2.0] * 4), clip_range=0.5), v)
        assert_close(loss, f64([1.62, 1.125, 2.0, 4.5]))
        assert_close(grad, f64([-1.8, 0, 2.0, -3.0]))

    def test_the_range_is_around_the_old_value(self):
        loss = clipped_value_loss(f64([12.0]), f64([10.0]), f64([14.0]), clip_range=0.5)
        assert_close(loss, f64([0.5 * 3.5**2]))

    def test_a_critic_that_moved_the_wrong_way_keeps_its_gradient(self):
        # Clamping the loss instead of the value would leave a far-off critic without any gradient.
        v = f64([100.0]).requires_grad_()
        _, grad = with_gradient(clipped_value_loss(v, f64([0.0]), f64([0.0]), clip_range=0.2), v)
        assert_close(grad, f64([100.0]))

    @given(seeds)
    def test_limits(self, seed):
        g = torch.Generator().manual_seed(seed)
        v, old, target = (torch.randn(8, generator=g, dtype=torch.float64) for _ in range(3))
        plain = clipped_value_loss(v, None, target)
        assert_close(clipped_value_loss(v, old, target, clip_range=1e9), plain)
        assert_close(clipped_value_loss(v, old, target), plain)
        assert torch.all(clipped_value_loss(v, old, target, clip_range=0.1) >= plain)
        frozen = clipped_value_loss(v, old, target, clip_range=0.0)
        assert_close(frozen, 0.5 * torch.maximum((v - target) ** 2, (old - target) ** 2))

    def test_gradcheck(self):
        v, old, target = f64([0.2, 1.0, 4.0, -1.0]), f64([0.0] * 4), f64([2.0] * 4)
        inputs = [x.requires_grad_() for x in (v, old, target)]
        assert torch.autograd.gradcheck(lambda *xs: clipped_value_loss(*xs, clip_range=0.5), inputs)

    def test_errors(self):
        x = torch.zeros(4)
        with pytest.raises(ValueError, match=r"returns \(4, 1\) and values \(4,\)"):
            clipped_value_loss(x, None, x[:, None])
        with pytest.raises(ValueError, match=r"old_values \(4, 1\) and values \(4,\)"):
            clipped_value_loss(x, x[:, None], x)
        with pytest.raises(ValueError, match="old_values=None"):
            clipped_value_loss(x, None, x, clip_range=0.2)
        with pytest.raises(ValueError, match=r"clip_range=-0\.2, old_values=given"):
            clipped_value_loss(x, x, x, clip_range=-0.2)


def ragged(seed, rows=4, steps=6):
    g = torch.Generator().manual_seed(seed)
    loss = torch.randn(rows, steps, generator=g, dtype=torch.float64)
    return loss, torch.rand(rows, steps, generator=g) > 0.4


class TestAggregation:
    loss = f64([[1, 2, 100], [6, 100, 100], [100, 100, 100]])
    mask = torch.tensor([[True, True, False], [True, False, False], [False] * 3])

    @pytest.mark.parametrize(
        # (1 + 2 + 6) / 3; ((1 + 2) / 2 + 6) / 2; ((1 + 2) + 6) / 2: the empty row is no row.
        ("mode", "expected", "count"),
        [("token_mean", 3.0, 3), ("sequence_mean", 3.75, 2), ("sequence_sum", 4.5, 2)],
    )
    def test_by_hand(self, mode, expected, count):
        assert aggregate_loss(self.loss, self.mask, mode).item() == expected
        assert loss_denominator(self.mask, mode) == count
        # Twice the denominator halves the loss; a tensor will do.
        assert aggregate_loss(self.loss, self.mask, mode, denominator=2 * count).item() == expected / 2
        assert aggregate_loss(self.loss, self.mask, mode, denominator=torch.tensor(2 * count)).item() == expected / 2

    def test_default_mode(self):
        assert aggregate_loss(self.loss, self.mask) == 3
        assert loss_denominator(self.mask) == 3

    @pytest.mark.parametrize("mode", AGGREGATIONS)
    def test_nothing_to_average_is_0(self, mode):
        x = self.loss.clone().requires_grad_()
        out = aggregate_loss(x, torch.zeros_like(self.mask), mode)
        out.backward()
        assert out == 0
        assert torch.all(x.grad == 0)
        # A microbatch of padding inside a larger batch, and a denominator of 0, are 0 as well.
        for denominator in (5, 0, 0.0, torch.tensor(0)):
            assert aggregate_loss(self.loss, torch.zeros_like(self.mask), mode, denominator=denominator) == 0

    @given(seeds, st.sampled_from(AGGREGATIONS), st.integers(1, 4))
    def test_parts_with_the_global_count_sum_to_the_whole(self, seed, mode, size):
        loss, mask = ragged(seed)
        loss.requires_grad_()
        whole = aggregate_loss(loss, mask, mode)
        count = loss_denominator(mask, mode)
        parts = [
            aggregate_loss(a, b, mode, denominator=count)
            for a, b in zip(loss.split(size), mask.split(size), strict=True)
        ]
        assert_close(sum(parts), whole)
        assert_close(torch.autograd.grad(sum(parts), loss)[0], torch.autograd.grad(whole, loss)[0])

    def test_the_mean_of_means_is_not_the_mean(self):
        # Rows of 2 and 1 tokens: (1.5 + 6) / 2 = 3.75 is not (1 + 2 + 6) / 3 = 3.
        means = [aggregate_loss(self.loss[i : i + 1], self.mask[i : i + 1]) for i in range(2)]
        assert sum(means) / 2 == 3.75

    @given(seeds, st.sampled_from(AGGREGATIONS))
    def test_padding_order_and_empty_rows_change_nothing(self, seed, mode):
        loss, mask = ragged(seed)
        expected = aggregate_loss(loss, mask, mode)
        order = torch.randperm(4)
        assert_close(aggregate_loss(loss[order], mask[order], mode), expected)
        padded = torch.full((6, 10), float("nan"), dtype=torch.float64)
        padded[1:5, 3:9] = loss
        wide = torch.zeros(6, 10, dtype=torch.bool)
        wide[1:5, 3:9] = mask
        padded = padded.requires_grad_()
        out = aggregate_loss(padded, wide, mode)
        out.backward()
        assert_close(out.detach(), expected)
        assert torch.all(padded.grad[~wide] == 0)

    @pytest.mark.parametrize("mode", AGGREGATIONS)
    def test_rows_are_axis_0_whatever_follows(self, mode):
        loss, mask = ragged(1, rows=3, steps=8)
        assert_close(aggregate_loss(loss.view(3, 2, 4), mask.view(3, 2, 4), mode), aggregate_loss(loss, mask, mode))

    def test_a_vector_has_a_mean_and_no_rows(self):
        assert aggregate_loss(self.loss[0], self.mask[0]) == 1.5
        for mode in AGGREGATIONS[1:]:
            with pytest.raises(ValueError, match=rf"{mode} needs rows.*\(3,\)"):
                aggregate_loss(self.loss[0], self.mask[0], mode)
            with pytest.raises(ValueError, match=rf"{mode} needs rows.*\(3,\)"):
                loss_denominator(self.mask[0], mode)

    def test_errors(self):
        with pytest.raises(ValueError, match=r"loss \(3, 3\) and mask \(3, 1\)"):
            aggregate_loss(self.loss, self.mask[:, :1])
        with pytest.raises(ValueError, match="bool"):
            aggregate_loss(self.loss, self.mask.float())
        with pytest.raises(ValueError, match="bool"):
            loss_denominator(self.mask.float())
        for function in (
            lambda mode: aggregate_loss(self.loss, self.mask, mode),
            lambda m: loss_denominator(self.mask, m),
        ):
            with pytest.raises(ValueError, match="'mean'; known: token_mean, sequence_mean, sequence_sum"):
                function("mean")


def batch(seed=0, rows=4, steps=5, dtype=torch.float64, device="cpu", mask=None):
    """What a policy says and what was recorded; new and old differ by a few tenths of a nat."""
    g = torch.Generator().manual_seed(seed)

    def draw():
        return torch.randn(rows, steps, generator=g, dtype=torch.float64).to(device, dtype)

    old_logprobs = draw() - 2
    mask = (torch.rand(rows, steps, generator=g) > 0.3).to(device) if mask is None else mask
    new = PolicyOutput(*[x.requires_grad_() for x in (old_logprobs + 0.3 * draw(), draw(), draw().abs())])
    return new, Experience(old_logprobs, draw(), draw(), draw(), mask)


def config(objective="clip", **changes):
    return PPOConfig(objective=objective, **({"target_kl": 0.01} | changes))


def gradients(loss, new):
    """Gradients of the total, 0 where a tensor plays no part."""
    leaves = [x for x in (new.logprobs, new.values, new.entropy) if x is not None]
    return torch.autograd.grad(loss.total, leaves, allow_unused=True, materialize_grads=True)


LN = math.log
# Sums over the six actions, each derived in the tests of the loss concerned.
BY_HAND = {
    "clip": (2.4, [0, -0.5, 1.5, 0, 4.0, -2.2]),
    "adaptive_clip": (2.4, [0, -0.5, 1.5, 0, 4.0, -2.2]),
    "dual_clip": (1.4, [0, -0.5, 1.5, 0, 0, -2.2]),
    # Weights r up to 1.2: w A = 1.2, .5, -1.2, -.5, -1.2, 2.2 with sum 1, and log pi = log r - 1, so that
    # sum -w A log pi = 1 + 1.2 ln 4 - 2.2 ln 1.1 (what ln 1.5 and ln .5 add cancels). No slope is 0.
    "cispo": (1 + 1.2 * LN(4) - 2.2 * LN(1.1), [-1.2, -0.5, 1.2, 0.5, 1.2, -2.2]),
    # Only r 1.1 lies within .8 to 1.2: -1.1 * 2 * (ln 1.1 - 1).
    "dis": (2.2 * (1 - LN(1.1)), [0, 0, 0, 0, 0, -2.2]),
    # sum -r A = 1.8; sum (r - 1) = 3.1; product of the ratios = 1.5 * .5 * 1.5 * .5 * 4 * 1.1 = 2.475
    "penalty": (1.8 + 0.5 * (3.1 - LN(2.475)), [-1.25, -0.75, 1.75, 0.25, 5.5, -2.15]),
    # log pi = log r - 1 and sum A = 1: sum -A log r = ln 4 - 2 ln 1.1, and + 1
    "a2c": (LN(4) - 2 * LN(1.1) + 1, [-1, -1, 1, 1, 1, -2]),
    "reinforce": (LN(4) - 2 * LN(1.1) + 1, [-1, -1, 1, 1, 1, -2]),
}


class TestPPOLoss:
    @pytest.mark.parametrize("objective", OBJECTIVES)
    def test_every_objective_by_hand(self, objective):
        x, old, a = six_actions()
        values = f64([1.0, 0, 0, 0, 0, 3.0]).requires_grad_()
        entropy = f64([0.6, 0, 0, 0, 0, 0.6]).requires_grad_()
        returns = f64([0.0, 0, 0, 0, 0, 1.0])
        new = PolicyOutput(x, values, entropy)
        recorded = Experience(old, torch.zeros_like(old), a, returns, torch.ones(6, dtype=torch.bool))
        loss = ppo_loss(new, recorded, config(objective, penalty_beta=0.5, vf_coef=0.4, ent_coef=0.1))
        policy, slope = BY_HAND[objective]
        # Values: (1 + 4) / 2 / 6; REINFORCE has no critic. Entropy: 1.2 / 6, a bonus, so it is taken off.
        value = 0.0 if objective == "reinforce" else 2.5 / 6
        assert_close(loss.policy.item(), policy / 6)
        assert_close(loss.value.item(), value)
        assert_close(loss.entropy.item(), 0.2)
        assert_close(loss.total.item(), policy / 6 + 0.4 * value - 0.1 * 0.2)
        by_logprobs, by_values, by_entropy = gradients(loss, new)
        assert_close(by_logprobs, f64(slope) / 6)
        assert_close(by_values, f64([1.0, 0, 0, 0, 0, 2.0]) * 0.4 / 6 * (objective != "reinforce"))
        assert_close(by_entropy, torch.full((6,), -0.1 / 6, dtype=torch.float64))

    def test_settings_reach_the_losses(self):
        x, old, a = six_actions()
        v = f64([0.2, 1.0, 4.0, -1.0, 0, 0])
        recorded = Experience(old, 0 * v, a, torch.full_like(v, 2.0), torch.ones(6, dtype=torch.bool))
        new = PolicyOutput(x, v)
        low = ppo_loss(new, recorded, config(clip_range=0.6, clip_range_high=0.05))
        assert_close(low.policy.item(), (-1.05 - 0.5 + 1.5 + 0.5 + 4.0 - 2.1) / 6)
        assert_close(ppo_loss(new, recorded, config("dual_clip", dual_clip=2.0)).policy.item(), 0.4 / 6)
        # As in TestValueLoss: 1.62, 1.125, 2, 4.5, and twice 2 for V = 0.
        assert_close(ppo_loss(new, recorded, config(clip_range_vf=0.5)).value.item(), (1.62 + 1.125 + 2 + 4.5 + 4) / 6)
        assert_close(ppo_loss(new, recorded, config()).value.item(), (1.62 + 0.5 + 2 + 4.5 + 4) / 6)

    @pytest.mark.parametrize("objective", ["clip", "adaptive_clip", "penalty", "a2c", "reinforce"])
    def test_dual_clip_belongs_to_its_objective(self, objective):
        new, old = batch()
        losses = [ppo_loss(new, old, config(objective, dual_clip=c)).total for c in (1.01, 50.0)]
        assert torch.equal(*losses)

    def test_total_is_policy_plus_value_minus_entropy(self):
        # The sum is minimised: a larger entropy must make it smaller.
        new, old = batch(1)
        loss = ppo_loss(new, old, config(vf_coef=0.7, ent_coef=0.3))
        assert_close(loss.total, loss.policy + 0.7 * loss.value - 0.3 * loss.entropy)
        assert_close(loss.entropy, masked_mean(new.entropy, old.mask))

    @pytest.mark.parametrize("mode", AGGREGATIONS)
    @pytest.mark.parametrize("objective", OBJECTIVES)
    def test_the_chosen_aggregation_serves_all_parts(self, objective, mode):
        new, old = batch(2)
        loss = ppo_loss(new, old, config(objective, loss_aggregation=mode))
        assert_close(loss.entropy, aggregate_loss(new.entropy, old.mask, mode))
        if objective == "reinforce":
            assert loss.value == 0
        else:
            assert_close(loss.value, aggregate_loss(clipped_value_loss(new.values, None, old.returns), old.mask, mode))
        if objective in ("a2c", "reinforce"):
            per_action = policy_gradient_loss(new.logprobs, old.advantages)
            assert_close(loss.policy, aggregate_loss(per_action, old.mask, mode))

    @given(seeds, st.sampled_from(OBJECTIVES), st.sampled_from(AGGREGATIONS), st.integers(1, 4))
    def test_gradients_are_equal_over_every_split_into_microbatches(self, seed, objective, mode, size):
        new, old = batch(seed)
        settings = config(objective, loss_aggregation=mode, ent_coef=0.1, clip_range_vf=0.2)
        whole = ppo_loss(new, old, settings)
        count = loss_denominator(old.mask, mode)
        parts = []
        for rows in torch.arange(4).split(size):
            part = PolicyOutput(new.logprobs[rows], new.values[rows], new.entropy[rows])
            parts.append(ppo_loss(part, old[rows], settings, denominator=count))
        for name in ("total", "policy", "value", "entropy"):
            assert_close(sum(getattr(part, name) for part in parts), getattr(whole, name))
        leaves = [new.logprobs, new.values, new.entropy]
        split = torch.autograd.grad(
            sum(part.total for part in parts), leaves, allow_unused=True, materialize_grads=True
        )
        for a, b in zip(split, gradients(whole, new), strict=True):
            assert_close(a, b)

    @pytest.mark.parametrize("objective", OBJECTIVES)
    @pytest.mark.parametrize("garbage", [float("nan"), float("inf"), -1e30])
    @pytest.mark.parametrize("mode", AGGREGATIONS)
    def test_garbage_under_the_mask_changes_no_value_and_no_gradient(self, objective, garbage, mode):
        settings = config(objective, loss_aggregation=mode, ent_coef=0.1, clip_range_vf=0.2)
        outs = []
        for fill in (0.0, garbage):
            new, old = batch(5)
            dirty = [x.detach().masked_fill(~old.mask, fill) for x in (new.logprobs, new.values, new.entropy)]
            facts = [x.masked_fill(~old.mask, fill) for x in (old.logprobs, old.values, old.advantages, old.returns)]
            new = PolicyOutput(*[x.requires_grad_() for x in dirty])
            loss = ppo_loss(new, Experience(*facts, old.mask), settings)
            outs.append((loss, gradients(loss, new)))
        (clean, clean_grads), (loss, grads) = outs
        assert torch.isfinite(loss.total)
        assert torch.equal(loss.total, clean.total)
        for a, b in zip(clean_grads, grads, strict=True):
            assert torch.equal(a, b)
            assert torch.all(b[~old.mask] == 0)

    @given(seeds, st.sampled_from(OBJECTIVES))
    def test_order_of_rows_and_padding_change_nothing(self, seed, objective):
        new, old = batch(seed)
        settings = config(objective, ent_coef=0.1)
        order = torch.randperm(4)
        expected = ppo_loss(new, old, settings).total
        shuffled = PolicyOutput(new.logprobs[order], new.values[order], new.entropy[order])
        assert_close(ppo_loss(shuffled, old[order], settings).total, expected)

        def pad(x):
            return torch.nn.functional.pad(x, (2, 3, 0, 1), value=False if x.dtype == torch.bool else 7.0)

        padded = PolicyOutput(pad(new.logprobs), pad(new.values), pad(new.entropy))
        fields = (old.logprobs, old.values, old.advantages, old.returns, old.mask)
        assert_close(ppo_loss(padded, Experience(*map(pad, fields)), settings).total, expected)

    def test_an_empty_minibatch_is_0_with_gradients_of_0(self):
        new, old = batch(6, mask=torch.zeros(4, 5, dtype=torch.bool))
        loss = ppo_loss(new, old, config(ent_coef=0.1))
        assert loss.total == 0
        assert all(torch.all(g == 0) for g in gradients(loss, new))

    def test_without_a_critic_the_value_loss_is_0(self):
        new, old = batch(7)
        bare = ppo_loss(
            PolicyOutput(new.logprobs), Experience(old.logprobs, None, old.advantages, None, old.mask), config()
        )
        assert bare.value == 0
        assert bare.entropy == 0
        assert torch.equal(bare.total, bare.policy)
        # The rollout's values are only needed to clip.
        unclipped = Experience(old.logprobs, None, old.advantages, old.returns, old.mask)
        assert torch.equal(ppo_loss(new, unclipped, config()).total, ppo_loss(new, old, config()).total)

    def test_reinforce_ignores_critic_and_old_policy(self):
        new, old = batch(8)
        elsewhere = Experience(old.logprobs - 3, None, old.advantages, None, old.mask)
        plain = PolicyOutput(new.logprobs)
        assert torch.equal(
            ppo_loss(new, elsewhere, config("reinforce")).total, ppo_loss(plain, old, config("reinforce")).total
        )

    def test_entropy_is_reported_even_without_weight(self):
        new, old = batch(9)
        loss = ppo_loss(new, old, config(ent_coef=0.0))
        assert loss.entropy > 0
        assert torch.all(gradients(loss, new)[2] == 0)

    def test_missing_facts_are_errors(self):
        new, old = batch(10)
        with pytest.raises(ValueError, match=r"ent_coef=0.1 needs new.entropy"):
            ppo_loss(PolicyOutput(new.logprobs), old, config(ent_coef=0.1))
        with pytest.raises(ValueError, match=r"old.returns is None"):
            ppo_loss(new, Experience(old.logprobs, old.values, old.advantages, None, old.mask), config())
        with pytest.raises(ValueError, match="old_values=None"):
            bare = Experience(old.logprobs, None, old.advantages, old.returns, old.mask)
            ppo_loss(new, bare, config(clip_range_vf=0.2))

    @pytest.mark.parametrize(
        "field", ["values", "entropy", "old_logprobs", "old_values", "advantages", "returns", "mask"]
    )
    def test_every_shape_is_checked(self, field):
        new, old = batch(11)
        parts = {"logprobs": new.logprobs, "values": new.values, "entropy": new.entropy}
        facts = {name: getattr(old, name) for name in ("logprobs", "values", "advantages", "returns", "mask")}
        target, name = (facts, field.removeprefix("old_")) if field not in ("values", "entropy") else (parts, field)
        target[name] = target[name][:, :1]
        with pytest.raises(ValueError, match=rf"{field} \(4, 1\) and logprobs \(4, 5\)"):
            ppo_loss(PolicyOutput(**parts), Experience(**facts), config())

    def test_mask_must_be_bool_and_the_objective_known(self):
        new, old = batch(12)
        facts = (old.logprobs, old.values, old.advantages, old.returns)
        with pytest.raises(ValueError, match="mask must be a bool"):
            ppo_loss(new, Experience(*facts, old.mask.float()), config())
        wrong = config()
        object.__setattr__(wrong, "objective", "ppo")  # past the validation
        with pytest.raises(ValueError, match=f"'ppo'; known: {', '.join(OBJECTIVES)}"):
            ppo_loss(new, old, wrong)

    @pytest.mark.parametrize("objective", OBJECTIVES)
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_dtype_and_device_are_kept(self, objective, dtype, device):
        new, old = batch(13, dtype=dtype, device=device)
        loss = ppo_loss(new, old, config(objective, ent_coef=0.1))
        for part in (loss.total, loss.policy, loss.value, loss.entropy):
            assert part.dtype == dtype
            assert part.device.type == device.type
        assert all(g.dtype == dtype and torch.isfinite(g).all() for g in gradients(loss, new))

    @pytest.mark.parametrize("objective", OBJECTIVES)
    def test_inputs_are_left_alone(self, objective):
        new, old = batch(14)
        tensors = [x for x in (*vars(new).values(), *vars(old).values()) if x is not None]
        before = [x.detach().clone() for x in tensors]
        gradients(ppo_loss(new, old, config(objective, ent_coef=0.1, clip_range_vf=0.2)), new)
        for x, y in zip(tensors, before, strict=True):
            assert torch.equal(x, y)


@pytest.mark.parametrize("dtype", DTYPES)
def test_per_action_losses_compute_in_float32_or_better(dtype, device):
    x, old, a, v = (torch.randn(50, dtype=torch.float64).to(device, dtype) for _ in range(4))
    mask = torch.rand(50).to(device) > 0.3
    functions = [
        lambda x, old, a, v: clipped_policy_loss(x, old, a),
        lambda x, old, a, v: clipped_policy_loss(x, old, a, dual_clip=1.5),
        lambda x, old, a, v: cispo_policy_loss(x, old, a, clip_range_high=0.2),
        lambda x, old, a, v: dis_policy_loss(x, old, a, clip_range=0.5),
        lambda x, old, a, v: penalty_policy_loss(x, old, a, beta=0.3),
        lambda x, old, a, v: policy_gradient_loss(x, a),
        lambda x, old, a, v: clipped_value_loss(x, old, v, clip_range=0.2),
        lambda x, old, a, v: aggregate_loss(x, mask),
    ]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for function in functions:
        out = function(x, old, a, v)
        assert out.dtype == dtype
        assert out.device.type == device.type
        assert torch.equal(out, function(*[y.to(wide) for y in (x, old, a, v)]).to(dtype))


def test_a_count_beyond_float16_does_not_overflow():
    loss = torch.full((100_000,), 0.5, dtype=torch.float16)
    assert aggregate_loss(loss, torch.ones(100_000, dtype=torch.bool)) == 0.5
