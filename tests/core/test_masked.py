"""Proves that masked statistics equal the plain ones over the real entries, and that nothing else ever counts."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from rlhf_ppo.core import masked_mean, masked_var, masked_whiten

STATISTICS = [masked_mean, masked_var, masked_whiten]
GARBAGE = [float("nan"), float("inf"), -1e30]
seeds = st.integers(0, 10_000)


def sample(seed, shape=(4, 6), dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=dtype), torch.rand(shape, generator=generator) > 0.4


def test_numbers_by_hand():
    # Kept: 1, 2, 6. Mean 3; variance (4 + 1 + 9) / 3.
    x = torch.tensor([[1.0, 2.0], [50.0, 6.0]], dtype=torch.float64)
    mask = torch.tensor([[True, True], [False, True]])
    std = (14 / 3 + 1e-8) ** 0.5
    assert_close(masked_mean(x, mask).item(), 3.0)
    assert_close(masked_var(x, mask).item(), 14 / 3)
    assert_close(masked_whiten(x, mask), torch.tensor([[-2 / std, -1 / std], [0, 3 / std]], dtype=torch.float64))
    assert_close(masked_mean(x, mask, dim=1), torch.tensor([1.5, 6.0], dtype=torch.float64))
    assert_close(masked_mean(x, mask, dim=0), torch.tensor([1.0, 4.0], dtype=torch.float64))
    assert_close(masked_var(x, mask, dim=1), torch.tensor([0.25, 0.0], dtype=torch.float64))
    assert_close(masked_var(x, mask, dim=(0, 1)), masked_var(x, mask))


@given(seeds)
def test_equal_to_torch_over_the_kept_entries(seed):
    x, mask = sample(seed)
    mask[0, 0] = True
    kept = x[mask]
    assert_close(masked_mean(x, mask), kept.mean())
    assert_close(masked_var(x, mask), kept.var(correction=0))
    for row, (mean, var) in enumerate(zip(masked_mean(x, mask, dim=-1), masked_var(x, mask, dim=-1), strict=True)):
        if mask[row].any():
            assert_close(mean, x[row][mask[row]].mean())
            assert_close(var, x[row][mask[row]].var(correction=0))


@given(seeds, st.sampled_from(GARBAGE))
def test_what_lies_outside_the_mask_changes_no_value_and_no_gradient(seed, garbage):
    clean, mask = sample(seed)
    dirty = torch.where(mask, clean, garbage)
    weights = torch.randn(clean.shape, dtype=clean.dtype)
    for statistic in STATISTICS:
        x, y = clean.clone().requires_grad_(), dirty.clone().requires_grad_()
        a, b = statistic(x, mask), statistic(y, mask)
        assert torch.equal(a, b), statistic
        for out, leaf in ((a, x), (b, y)):
            (out * weights if out.ndim else out).sum().backward()
            assert torch.all(leaf.grad[~mask] == 0), statistic
        assert torch.equal(x.grad, y.grad), statistic


@given(seeds)
def test_padding_and_order_change_nothing(seed):
    x, mask = sample(seed)
    padded_x = torch.cat([torch.full((4, 2), 9.0), x, torch.full((4, 3), -9.0)], dim=1)
    padded_mask = torch.cat([torch.zeros(4, 2), mask, torch.zeros(4, 3)], dim=1).bool()
    order = torch.randperm(4)
    for statistic in (masked_mean, masked_var):
        assert_close(statistic(padded_x, padded_mask), statistic(x, mask))
        assert_close(statistic(x[order], mask[order]), statistic(x, mask))
    assert_close(masked_whiten(padded_x, padded_mask)[:, 2:-3], masked_whiten(x, mask))
    assert_close(masked_whiten(x[order], mask[order]), masked_whiten(x, mask)[order])


@given(seeds, st.floats(0.5, 100), st.floats(-100, 100))
def test_whitening_gives_mean_0_and_std_1_whatever_the_scale(seed, scale, shift):
    x, mask = sample(seed)
    mask[0, :2] = True
    white = masked_whiten(x * scale + shift, mask)
    kept = white[mask]
    # 1e-6: the 1e-8 beside a variance of at least about 1e-2 takes that much off the std.
    assert_close(kept.mean(), torch.zeros((), dtype=kept.dtype))
    assert_close(kept.std(correction=0).item(), 1.0, rtol=0, atol=1e-6)
    assert torch.all(white[~mask] == 0)


def test_advantages_drop_the_mean_and_rewards_keep_it():
    x, mask = sample(3)
    x += 5
    shifted, kept = masked_whiten(x, mask)[mask], masked_whiten(x, mask, shift_mean=False)[mask]
    assert_close(shifted.mean(), torch.zeros((), dtype=x.dtype))
    assert_close(kept.mean(), x[mask].mean())
    assert_close(kept - kept.mean(), shifted)
    assert torch.all(masked_whiten(x, mask, shift_mean=False)[~mask] == 0)


def test_no_value_one_value_and_two():
    x = torch.tensor([3.0, 7.0, float("nan")])
    none, one, two = (torch.arange(3) < n for n in range(3))
    assert masked_mean(x, none) == 0
    assert masked_var(x, none) == 0
    assert torch.equal(masked_whiten(x, none), torch.zeros(3))
    # One value: the sample std (divided by n - 1) would be NaN; here it whitens to 0, or stays itself.
    assert masked_var(x, one) == 0
    assert torch.equal(masked_whiten(x, one), torch.zeros(3))
    assert torch.equal(masked_whiten(x, one, shift_mean=False), torch.tensor([3.0, 0, 0]))
    # Two values, mean 5 and std 2, whiten to -1 and 1.
    assert_close(masked_whiten(x, two), torch.tensor([-1.0, 1.0, 0.0]))


@pytest.mark.parametrize("value", [0.0, 0.1, 3.3, 1000.1, -12345.67])
@pytest.mark.parametrize("count", [3, 7, 1000])
def test_equal_values_whiten_to_0_in_float32(value, count):
    # The rounded mean of equal values misses them by an ulp or two: 1e-4 at 1000, as large as the sqrt of 1e-8.
    x = torch.full((count,), value)
    assert_close(masked_whiten(x, torch.ones(count, dtype=torch.bool)), torch.zeros(count))


def test_equal_values_have_no_variance_row_by_row():
    x = torch.tensor([[0.1], [1000.1]]).expand(2, 7)
    assert torch.equal(masked_var(x, torch.ones(2, 7, dtype=torch.bool), dim=1), torch.zeros(2))


def test_one_whole_is_whitened_and_its_shards_are_not():
    # Shards [0, 2] and [10, 12]: each alone would whiten to [-1, 1] and forget that the second is better.
    x, mask = torch.tensor([0.0, 2.0, 10.0, 12.0]), torch.ones(4, dtype=torch.bool)
    whole = masked_whiten(x, mask)
    assert whole[:2].max() < 0 < whole[2:].min()
    assert_close(masked_whiten(x[2:], mask[2:]), torch.tensor([-1.0, 1.0]))


def test_empty_tensors():
    x, mask = torch.zeros(2, 0), torch.zeros(2, 0, dtype=torch.bool)
    assert masked_mean(x, mask) == 0
    assert torch.equal(masked_mean(x, mask, dim=1), torch.zeros(2))
    assert masked_whiten(x, mask).shape == (2, 0)


@pytest.mark.parametrize("statistic", STATISTICS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dtype_and_device_are_kept_and_half_precision_computes_in_float32(statistic, dtype, device):
    x, mask = sample(1, shape=(3, 500))
    x, mask = (x + 30).to(device, dtype), mask.to(device)
    out = statistic(x, mask)
    assert out.dtype == dtype
    assert out.device.type == device.type
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert torch.equal(out, statistic(x.to(wide), mask).to(dtype))


def test_a_sum_beyond_float16_does_not_overflow():
    x = torch.full((4000,), 100.0, dtype=torch.float16)  # the sum, 400000, exceeds float16's 65504
    mask = torch.ones(4000, dtype=torch.bool)
    assert masked_mean(x, mask) == 100
    # +-10: mean 0, variance 100, and again a sum of 400000
    assert masked_var(torch.tensor([10.0, -10.0], dtype=torch.float16).repeat(2000), mask) == 100


def test_integers_and_bools_give_float32():
    mask = torch.tensor([True, True, False])
    assert_close(masked_mean(torch.tensor([1, 2, 9]), mask), torch.tensor(1.5))
    assert_close(masked_mean(torch.tensor([True, False, True]), mask), torch.tensor(0.5))


@pytest.mark.parametrize("statistic", STATISTICS)
def test_errors_and_inputs_left_alone(statistic):
    x, mask = sample(0)
    before = x.clone(), mask.clone()
    statistic(x, mask)
    assert torch.equal(x, before[0])
    assert torch.equal(mask, before[1])
    with pytest.raises(ValueError, match=r"x \(4, 6\) and mask \(4, 1\)"):
        statistic(x, mask[:, :1])
    with pytest.raises(ValueError, match="bool"):
        statistic(x, mask.float())


@pytest.mark.parametrize("statistic", STATISTICS)
def test_gradients(statistic):
    x, mask = sample(7, shape=(2, 4))
    assert torch.autograd.gradcheck(lambda x: statistic(x, mask), x.requires_grad_())
