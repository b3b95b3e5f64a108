"""Proves that each diagnostic equals a direct count over the real actions, padding left out."""

import math

import pytest
import torch
from helpers import f64
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from rlhf_ppo.core import Experience, PolicyOutput, PPOConfig, explained_variance, ppo_diagnostics

seeds = st.integers(0, 10_000)


def observed(ratios, advantages, mask=None, entropy=None):
    """New log-probs at these ratios to old ones of -1, and the record that goes with them."""
    log_ratio = f64(ratios).log()
    mask = torch.ones(len(ratios), dtype=torch.bool) if mask is None else torch.tensor(mask)
    old = torch.full_like(log_ratio, -1.0)
    new = PolicyOutput(log_ratio - 1, None, None if entropy is None else f64(entropy))
    return new, Experience(old, None, f64(advantages), None, mask)


class TestDiagnostics:
    def test_by_hand(self):
        # Killed: (1.5, +) and (.5, -), 2 of 6. Out of range: all but 1.1, 5 of 6. A = 0 is never killed.
        ratios, advantages = [1.5, 0.5, 1.5, 0.5, 4.0, 1.1], [1, 1, 0, -1, -1, 2]
        got = ppo_diagnostics(*observed(ratios, advantages, entropy=[1, 2, 3, 4, 5, 6]))
        assert_close(got["clip_fraction"].item(), 2 / 6)
        assert_close(got["out_of_range_fraction"].item(), 5 / 6)
        assert_close(got["ratio_mean"].item(), 9.1 / 6)
        assert_close(got["max_abs_log_ratio"].item(), math.log(4))
        assert_close(got["entropy"].item(), 3.5)
        assert got["overflow_fraction"] == 0
        # (r - 1) - log r, summed: 3.1 - log(product of the ratios = 2.475)
        assert_close(got["approx_kl"].item(), (3.1 - math.log(2.475)) / 6)

    def test_the_largest_log_ratio_may_be_a_fall(self):
        got = ppo_diagnostics(*observed([0.1, 2.0], [1, 1]))
        assert_close(got["max_abs_log_ratio"].item(), math.log(10))

    @given(seeds, st.floats(0.05, 0.5), st.none() | st.floats(0.05, 0.5))
    def test_clip_fraction_is_the_per_sign_count_over_real_actions(self, seed, eps, high):
        g = torch.Generator().manual_seed(seed)
        logprobs, old, a = (torch.randn(3, 8, generator=g, dtype=torch.float64) for _ in range(3))
        mask = torch.rand(3, 8, generator=g) > 0.4
        mask[0, 0] = True
        got = ppo_diagnostics(
            PolicyOutput(logprobs),
            Experience(old, None, a, None, mask),
            PPOConfig(clip_range=eps, clip_range_high=high),
        )
        top = 1 + (eps if high is None else high)
        killed = outside = 0
        pairs = [(math.exp(x), y) for x, y in zip((logprobs - old)[mask].tolist(), a[mask].tolist(), strict=True)]
        for ratio, advantage in pairs:
            killed += ratio > top if advantage > 0 else ratio < 1 - eps
            outside += not 1 - eps <= ratio <= top
        assert got["clip_fraction"].item() == pytest.approx(killed / len(pairs))
        assert got["out_of_range_fraction"].item() == pytest.approx(outside / len(pairs))
        assert got["ratio_mean"].item() == pytest.approx(sum(r for r, _ in pairs) / len(pairs))
        assert got["approx_kl"].item() == pytest.approx(sum(r - 1 - math.log(r) for r, _ in pairs) / len(pairs))

    def test_default_clip_range_is_ppo_s(self):
        got = ppo_diagnostics(*observed([1.19, 1.21, 0.81, 0.79], [1, 1, -1, -1]))
        assert got["clip_fraction"] == 0.5

    def test_padding_dilutes_nothing(self):
        nan = float("nan")
        real = observed([1.5, 0.5, 1.1], [1.0, -1.0, 2.0], entropy=[1.0, 2.0, 3.0])
        new, old = observed([1.5, 0.5, 1.1, 1, 1], [1, -1, 2, 1, 1], [True] * 3 + [False] * 2, [1, 2, 3, 1, 1])
        for field in (new.logprobs, new.entropy, old.logprobs, old.advantages):
            field[3:] = f64([nan, math.inf])
        got, expected = ppo_diagnostics(new, old), ppo_diagnostics(*real)
        assert got.keys() == expected.keys()
        for name in got:
            assert_close(got[name], expected[name])

    def test_an_unchanged_policy(self):
        got = ppo_diagnostics(*observed([1.0, 1.0], [1, -1]))
        assert {name: value.item() for name, value in got.items()} == {
            "approx_kl": 0,
            "clip_fraction": 0,
            "out_of_range_fraction": 0,
            "ratio_mean": 1,
            "max_abs_log_ratio": 0,
            "overflow_fraction": 0,
        }

    def test_the_edges_belong_to_the_band(self):
        # 1 + 1e-17 is 1 in floating point, so a ratio of 1 lies on both edges: the clip lets its gradient pass.
        got = ppo_diagnostics(*observed([1.0, 1.0], [1, -1]), PPOConfig(clip_range=1e-17))
        assert got["clip_fraction"] == got["out_of_range_fraction"] == 0

    def test_an_advantage_of_0_has_no_gradient_to_kill(self):
        assert ppo_diagnostics(*observed([0.1, 9.0], [0, 0]))["clip_fraction"] == 0

    def test_exactly_20_nats_are_not_clamped(self):
        old = Experience(torch.zeros(2), None, torch.ones(2), None, torch.ones(2, dtype=torch.bool))
        assert ppo_diagnostics(PolicyOutput(torch.tensor([20.0, -20.0])), old)["overflow_fraction"] == 0

    def test_a_100_nat_drift_is_finite_and_counted(self):
        old = Experience(torch.zeros(5), None, torch.ones(5), None, torch.tensor([True] * 4 + [False]))
        got = ppo_diagnostics(PolicyOutput(torch.tensor([100.0, -100.0, 19.0, 0.0, 100.0])), old)
        assert all(torch.isfinite(value) for value in got.values())
        assert got["overflow_fraction"] == 0.5
        assert got["max_abs_log_ratio"] == 100
        assert got["clip_fraction"] == 0.5  # the two that rose, with A > 0

    def test_nothing_real_gives_zeros(self):
        new, old = observed([2.0, 3.0], [1, 1], [False, False], entropy=[1, 1])
        assert all(value == 0 for value in ppo_diagnostics(new, old).values())
        empty = torch.zeros(0)
        got = ppo_diagnostics(PolicyOutput(empty), Experience(empty, None, empty, None, empty.bool()))
        assert all(value == 0 for value in got.values())

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
    def test_scalars_without_gradients_in_float32_or_better(self, dtype, device):
        x = torch.randn(2, 3).to(device, dtype).requires_grad_()
        old = Experience(x.detach() + 0.1, None, x.detach(), None, torch.ones(2, 3, dtype=torch.bool, device=device))
        before = x.detach().clone()
        for value in ppo_diagnostics(PolicyOutput(x, None, x), old).values():
            assert value.shape == ()
            assert not value.requires_grad
            assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            assert value.device.type == device.type
        assert torch.equal(x, before)

    @pytest.mark.parametrize("field", ["old_logprobs", "advantages", "entropy", "mask"])
    def test_every_shape_is_checked(self, field):
        x = torch.zeros(4)
        parts = dict.fromkeys(["old_logprobs", "advantages", "entropy"], x) | {"mask": x > -1}
        parts[field] = parts[field][:, None]
        with pytest.raises(ValueError, match=rf"{field} \(4, 1\) and logprobs \(4,\)"):
            ppo_diagnostics(
                PolicyOutput(x, None, parts["entropy"]),
                Experience(parts["old_logprobs"], None, parts["advantages"], None, parts["mask"]),
            )

    def test_mask_must_be_bool(self):
        x = torch.zeros(4)
        with pytest.raises(ValueError, match="bool"):
            ppo_diagnostics(PolicyOutput(x), Experience(x, None, x, None, x))


class TestExplainedVariance:
    def test_by_hand(self):
        returns = f64([1.0, 2.0, 3.0, 6.0])  # mean 3, variance 14 / 4
        assert explained_variance(returns, returns) == 1
        assert explained_variance(torch.full_like(returns, 3.0), returns) == 0  # any constant explains nothing
        assert explained_variance(torch.full_like(returns, -8.0), returns) == 0
        # Errors 0, 0, 0, 3: variance 9/4 - 9/16 = 27/16; 1 - (27/16) / (14/4).
        assert_close(explained_variance(f64([1.0, 2.0, 3.0, 3.0]), returns).item(), 1 - 27 / 56)
        assert_close(explained_variance(-returns, returns).item(), -3.0)  # worse than a constant

    @given(seeds, st.floats(0.1, 10), st.floats(-10, 10))
    def test_a_constant_offset_and_a_common_scale_change_nothing(self, seed, scale, shift):
        g = torch.Generator().manual_seed(seed)
        values, returns = (torch.randn(20, generator=g, dtype=torch.float64) for _ in range(2))
        expected = explained_variance(values, returns)
        assert_close(explained_variance(scale * values + shift, scale * returns), expected)

    def test_garbage_under_the_mask_does_not_count(self):
        values, returns = f64([1.0, 2.0, 3.0, 3.0, 0, 9]), f64([1.0, 2.0, 3.0, 6.0, 0, 9])
        values[4:], returns[4:] = float("nan"), float("inf")
        got = explained_variance(values, returns, torch.arange(6) < 4)
        assert_close(got.item(), 1 - 27 / 56)
        assert explained_variance(values, returns, torch.zeros(6, dtype=torch.bool)) == 0

    @pytest.mark.parametrize("value", [0.0, 0.1, 3.3, 1000.1, -12345.67])
    @pytest.mark.parametrize("count", [1, 3, 7, 1000])
    def test_returns_that_do_not_vary_give_0_in_float32(self, value, count):
        # Their variance is rounding error rather than 0; dividing by it gave figures of -1e16.
        assert explained_variance(torch.randn(count), torch.full((count,), value)) == 0

    def test_small_true_variation_counts(self):
        returns = torch.tensor([1000.0, 1000.01, 1000.02])
        # 1e-2: float32 knows 1000.01 to 3e-5, so the spread to a few tenths of a percent.
        assert_close(explained_variance(torch.zeros(3), returns), torch.tensor(0.0), rtol=0, atol=1e-2)
        assert explained_variance(returns, returns) == 1
        tiny = f64([0.0, 1e-9, 2e-9])
        assert_close(explained_variance(tiny, tiny).item(), 1.0)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
    def test_dtype_and_device_are_kept(self, dtype, device):
        values, returns = (torch.randn(30).to(device, dtype) for _ in range(2))
        out = explained_variance(values, returns)
        assert out.dtype == dtype
        assert out.device.type == device.type
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        assert torch.equal(out, explained_variance(values.to(wide), returns.to(wide)).to(dtype))

    def test_errors_and_inputs_left_alone(self):
        x, y = torch.randn(4), torch.randn(4)
        before = x.clone(), y.clone()
        explained_variance(x, y)
        assert torch.equal(x, before[0])
        assert torch.equal(y, before[1])
        with pytest.raises(ValueError, match=r"returns \(4, 1\) and values \(4,\)"):
            explained_variance(x, y[:, None])
        with pytest.raises(ValueError, match=r"mask \(1,\) and values \(4,\)"):
            explained_variance(x, y, torch.ones(1, dtype=torch.bool))
        with pytest.raises(ValueError, match="bool"):
            explained_variance(x, y, torch.ones(4))


def test_returns_equal_up_to_rounding_do_not_vary():
    """Without a floor under their spread the share was -2e17."""
    returns = torch.tensor([0.1, 0.1 + 1e-8, 0.1 - 1e-8, 0.1]) * 3
    returns[0] = torch.nextafter(returns[0], torch.tensor(1.0))
    assert returns.var() > 0 and explained_variance(torch.arange(4.0), returns) == 0
    small = 1e-3 * torch.tensor([1.0, 2.0, 4.0])
    assert explained_variance(small, small) == 1
