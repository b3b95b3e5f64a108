"""Proves GAE against published vectors, its limits and its flags, and the group advantages against their identities."""

import math

import pytest
import torch
from helpers import f64
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from rlhf_ppo.core import compute_gae, group_normalized_advantages, leave_one_out_advantages

seeds = st.integers(0, 10_000)
unit = st.floats(0, 1)


def at(shape, *steps):
    """A bool tensor of that shape, True at the given (row, step) pairs."""
    flags = torch.zeros(shape, dtype=torch.bool)
    for row, step in steps:
        flags[row, step] = True
    return flags


def trajectory(seed, rows=3, steps=7):
    """Random rewards, values, next values, and flags that end about a third of the steps."""
    g = torch.Generator().manual_seed(seed)
    numbers = [torch.randn(rows, steps, generator=g, dtype=torch.float64) for _ in range(3)]
    flags = [torch.rand(rows, steps, generator=g) < 0.2 for _ in range(2)]
    return [*numbers, *flags]


class TestPublishedVectors:
    @pytest.mark.parametrize(
        ("lam", "expected"),
        [
            (1.0, [[-1.451188, -4.455746, 2.539651, 0.5249, -0.49], [3, 2, 1, 0, -4.9]]),
            (0.7, [[-0.676980, -5.248167, 2.484608, 0.67043, -0.49], [2.2899, 1.73, 1, 0, -4.9]]),
            (0.4, [[0.567319, -6.042124, 2.343120, 0.81596, -0.49], [1.7256, 1.46, 1, 0, -4.9]]),
        ],
    )
    def test_discounts_per_step(self, lam, expected):
        rewards = f64([[0, 0, 1, 0, -0.5], [0, 0, 0, 0, 1]])
        states = f64([[1, 4, -3, -2, -1, -1], [-3, -2, -1, 0, 5, -1]])
        gamma = f64([[0.99] * 5, [0.9, 0.9, 0.9, 0, 0.9]])
        no = at((2, 5))
        advantages, returns = compute_gae(rewards, states[:, :-1], states[:, 1:], no, no, gamma=gamma, gae_lambda=lam)
        # 1e-6: the figures have six decimals, one of them off by one (-.6769795 is printed as -.676980).
        assert_close(advantages, f64(expected), rtol=0, atol=1e-6)
        assert_close(returns, f64(expected) + states[:, :-1], rtol=0, atol=1e-6)

    @pytest.mark.parametrize(
        ("end", "expected"),
        [
            ("terminated", [457.8345, 374.1143, 288.298, 196]),
            ("truncated", [457.0109, 373.2386, 287.3669, 195.01]),
            ("both", [457.8345, 374.1143, 288.298, 196]),  # terminated wins
        ],
    )
    def test_termination_against_truncation(self, end, expected):
        values = f64([[-3, 2, 3, 4]])
        last, no = at((1, 4), (0, 3)), at((1, 4))
        advantages, returns = compute_gae(
            f64([[101, 102, 103, 200]]),
            values,
            f64([[2, 3, 4, -1]]),
            no if end == "truncated" else last,
            no if end == "terminated" else last,
            gamma=0.99,
            gae_lambda=0.95,
        )
        # 5e-5: the figures are printed to four decimals.
        assert_close(advantages, f64([expected]), rtol=0, atol=5e-5)
        assert_close(returns, f64([expected]) + values, rtol=0, atol=5e-5)


def chain_value(*, merged):
    """What a one-state critic learns on an endless chain of reward 1, cut every 8 steps, gamma .98."""
    v, last, no = 0.0, at((1, 8), (0, 7)), at((1, 8))
    ones = torch.ones(1, 8, dtype=torch.float64)
    for _ in range(300):
        _, returns = compute_gae(
            ones, v * ones, v * ones, last if merged else no, no if merged else last, gamma=0.98, gae_lambda=0.95
        )
        v = returns.mean().item()
    return v


def test_endless_chain_is_worth_50_when_the_time_limit_is_a_truncation():
    assert chain_value(merged=False) == pytest.approx(50, abs=1)  # 1 / (1 - .98)


def test_endless_chain_is_worth_less_than_8_when_the_flags_are_merged():
    # The critic then predicts the rewards left before the cut, eight at most: the fault these flags exist to prevent.
    assert 0 < chain_value(merged=True) < 8


def test_three_token_response_by_hand():
    # Score 1 on the last token, gamma 1, lambda .5, values .1 .2 .4; next values are .2 .4 and, at the end, nothing.
    # delta = .1, .2, .6;  A2 = .6;  A1 = .2 + .5 * .6 = .5;  A0 = .1 + .5 * .5 = .35. The fourth slot is padding.
    nan = float("nan")
    values = f64([[0.1, 0.2, 0.4, nan]])
    end, no = at((1, 4), (0, 2)), at((1, 4))
    mask = torch.tensor([[True, True, True, False]])
    advantages, returns = compute_gae(
        f64([[0, 0, 1, nan]]), values, f64([[0.2, 0.4, nan, nan]]), end, no, gamma=1.0, gae_lambda=0.5, mask=mask
    )
    assert_close(advantages, f64([[0.35, 0.5, 0.6, 0]]))
    assert_close(returns, f64([[0.45, 0.7, 1.0, 0]]))


def test_zeros_are_numbers_like_any_other():
    zeros, no = torch.zeros(2, 3, dtype=torch.float64), at((2, 3))
    advantages, returns = compute_gae(zeros, zeros, zeros, no, no, gamma=0.9, gae_lambda=0.9)
    assert torch.equal(advantages, zeros)
    assert torch.equal(returns, zeros)
    # Reward 0 with value 2 is a disappointment of 2, not a missing reward; gamma 0 leaves r - V alone.
    ones = torch.ones_like(zeros)
    advantages, _ = compute_gae(zeros, 2 * ones, 9 * ones, no, no, gamma=0.0, gae_lambda=1.0)
    assert_close(advantages, -2 * ones)


@given(seeds, unit)
def test_lambda_0_is_the_td_error(seed, gamma):
    r, v, v_next, terminated, truncated = trajectory(seed)
    advantages, returns = compute_gae(r, v, v_next, terminated, truncated, gamma=gamma, gae_lambda=0.0)
    target = r + gamma * v_next * (~terminated)
    assert_close(returns, target)
    assert_close(advantages, target - v)


@given(seeds, unit)
def test_lambda_1_is_the_monte_carlo_return(seed, gamma):
    # One episode a row: the return from t is sum gamma^k r_(t+k), and V plays no part in it.
    r, v, v_next, _, no = trajectory(seed)
    steps = r.shape[1]
    terminated, no = at(r.shape, *[(row, steps - 1) for row in range(3)]), torch.zeros_like(no)
    v_next = torch.cat([v[:, 1:], v_next[:, -1:]], dim=1)
    _, returns = compute_gae(r, v, v_next, terminated, no, gamma=gamma, gae_lambda=1.0)
    expected = torch.stack([sum(gamma**k * r[:, t + k] for k in range(steps - t)) for t in range(steps)], dim=1)
    assert_close(returns, expected)


@given(seeds, unit, unit)
def test_gae_is_the_weighted_sum_of_td_errors(seed, gamma, lam):
    # A_t = sum_k (gamma lambda)^k delta_(t+k), as far as the episode goes (equation 16).
    r, v, v_next, terminated, truncated = trajectory(seed)
    advantages, _ = compute_gae(r, v, v_next, terminated, truncated, gamma=gamma, gae_lambda=lam)
    delta, _ = compute_gae(r, v, v_next, terminated, truncated, gamma=gamma, gae_lambda=0.0)
    for row in range(r.shape[0]):
        for t in range(r.shape[1]):
            total = 0.0
            for k in range(r.shape[1] - t):
                total += (gamma * lam) ** k * delta[row, t + k].item()
                if terminated[row, t + k] or truncated[row, t + k]:
                    break
            assert advantages[row, t].item() == pytest.approx(total, abs=1e-9)


@given(seeds, st.sampled_from(["terminated", "truncated"]))
def test_nothing_leaks_from_one_episode_into_the_one_before(seed, end):
    r, v, v_next, _, _ = trajectory(seed)
    no, cut = at(r.shape), at(r.shape, (0, 3), (1, 3), (2, 3))
    flags = (cut, no) if end == "terminated" else (no, cut)
    whole, _ = compute_gae(r, v, v_next, *flags, gamma=0.99, gae_lambda=0.9)
    first = [x[:, :4] for x in (r, v, v_next, *flags)]
    second = [x[:, 4:] for x in (r, v, v_next, *flags)]
    parts = [compute_gae(*part, gamma=0.99, gae_lambda=0.9)[0] for part in (first, second)]
    assert_close(whole, torch.cat(parts, dim=1))
    uncut, _ = compute_gae(r, v, v_next, no, no, gamma=0.99, gae_lambda=0.9)
    assert not torch.allclose(uncut[:, :4], whole[:, :4])


def test_next_value_counts_after_a_truncation_and_not_after_a_termination():
    one = f64([[1.0]])
    yes, no = torch.tensor([[True]]), torch.tensor([[False]])
    for terminated, truncated, expected in [(no, yes, 1 + 0.5 * 10 - 1), (yes, no, 0), (yes, yes, 0), (no, no, 5)]:
        advantages, _ = compute_gae(one, one, 10 * one, terminated, truncated, gamma=0.5, gae_lambda=0.9)
        assert_close(advantages.item(), float(expected))


def test_next_values_where_terminated_are_never_read():
    r, v, v_next, terminated, truncated = trajectory(5)
    assert terminated.any()
    clean = compute_gae(r, v, v_next, terminated, truncated, gamma=0.9, gae_lambda=0.9)
    dirty = compute_gae(
        r, v, v_next.masked_fill(terminated, float("nan")), terminated, truncated, gamma=0.9, gae_lambda=0.9
    )
    for a, b in zip(clean, dirty, strict=True):
        assert torch.equal(a, b)


@given(seeds, st.integers(1, 6))
def test_tool_tokens_and_padding_are_skipped_as_if_they_were_not_there(seed, gaps):
    r, v, v_next, terminated, truncated = trajectory(seed, rows=1)
    gamma, lam = torch.rand(r.shape, dtype=r.dtype), torch.rand(r.shape, dtype=r.dtype)
    compact = compute_gae(r, v, v_next, terminated, truncated, gamma=gamma, gae_lambda=lam)
    real = torch.arange(7)
    keep = torch.randperm(7 + gaps)[:7].sort().values
    mask = at((1, 7 + gaps), *[(0, int(i)) for i in keep])

    def spread(x, fill):
        out = torch.full((1, 7 + gaps), fill, dtype=x.dtype)
        out[:, keep] = x[:, real]
        return out

    nan = float("nan")
    gapped = compute_gae(
        *[spread(x, nan) for x in (r, v, v_next)],
        spread(terminated, True),  # flags under the mask mean nothing either
        spread(truncated, True),
        gamma=spread(gamma, nan),
        gae_lambda=spread(lam, nan),
        mask=mask,
    )
    for got, expected in zip(gapped, compact, strict=True):
        assert_close(got[:, keep], expected)
        assert torch.all(got[~mask] == 0)


def test_nan_in_masked_slots_reaches_no_gradient():
    r, v, v_next, terminated, truncated = trajectory(11)
    mask = torch.rand(r.shape) > 0.4
    grads = []
    for fill in (0.0, float("nan")):
        leaves = [x.masked_fill(~mask, fill).requires_grad_() for x in (r, v, v_next)]
        advantages, returns = compute_gae(*leaves, terminated, truncated, gamma=0.9, gae_lambda=0.8, mask=mask)
        (advantages.sum() + returns.square().sum()).backward()
        grads.append([x.grad for x in leaves])
    for clean, dirty in zip(*grads, strict=True):
        assert torch.equal(clean, dirty)
        assert torch.all(dirty[~mask] == 0)


def test_an_all_true_mask_is_the_default_and_an_all_false_one_gives_zeros():
    inputs = trajectory(2)
    plain = compute_gae(*inputs, gamma=0.9, gae_lambda=0.9)
    masked = compute_gae(*inputs, gamma=0.9, gae_lambda=0.9, mask=torch.ones(3, 7, dtype=torch.bool))
    nothing = compute_gae(*inputs, gamma=0.9, gae_lambda=0.9, mask=torch.zeros(3, 7, dtype=torch.bool))
    for a, b, c in zip(plain, masked, nothing, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(c, torch.zeros_like(c))


@given(seeds)
def test_rows_are_independent(seed):
    inputs = trajectory(seed)
    order = torch.randperm(3)
    whole = compute_gae(*inputs, gamma=0.9, gae_lambda=0.9)[0]
    shuffled = compute_gae(*[x[order] for x in inputs], gamma=0.9, gae_lambda=0.9)[0]
    assert_close(shuffled, whole[order])


def test_gamma_and_lambda_broadcast():
    inputs = trajectory(4)
    plain = compute_gae(*inputs, gamma=0.9, gae_lambda=0.8)[0]
    for shape in [(), (1,), (7,), (3, 1), (3, 7)]:
        full = compute_gae(*inputs, gamma=torch.full(shape, 0.9, dtype=torch.float64), gae_lambda=f64(0.8))[0]
        assert_close(full, plain)
    per_row = compute_gae(*inputs, gamma=f64([[0.9], [0.5], [0.0]]), gae_lambda=0.8)[0]
    assert_close(per_row[0], plain[0])
    assert_close(per_row[1], compute_gae(*inputs, gamma=0.5, gae_lambda=0.8)[0][1])
    for name in ("gamma", "gae_lambda"):
        with pytest.raises(ValueError, match=rf"{name} \(4,\) does not broadcast to \[B, T\] \(3, 7\)"):
            compute_gae(*inputs, **({"gamma": 0.9, "gae_lambda": 0.9} | {name: torch.ones(4)}))


def test_no_steps_give_no_advantages():
    empty, no = torch.zeros(2, 0), torch.zeros(2, 0, dtype=torch.bool)
    for out in compute_gae(empty, empty, empty, no, no, gamma=0.9, gae_lambda=0.9):
        assert out.shape == (2, 0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dtype_and_device_are_kept(dtype, device):
    numbers, flags = trajectory(6)[:3], trajectory(6)[3:]
    numbers, flags = [x.to(device, dtype) for x in numbers], [x.to(device) for x in flags]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    got = compute_gae(*numbers, *flags, gamma=0.99, gae_lambda=0.95)
    exact = compute_gae(*[x.to(wide) for x in numbers], *flags, gamma=0.99, gae_lambda=0.95)
    for a, b in zip(got, exact, strict=True):
        assert a.dtype == dtype
        assert a.device.type == device.type
        assert torch.equal(a, b.to(dtype))


def test_integer_rewards_give_float32():
    r, no = torch.tensor([[1, 2]]), at((1, 2))
    advantages, _ = compute_gae(r, torch.zeros(1, 2), torch.zeros(1, 2), no, no, gamma=0.5, gae_lambda=1.0)
    assert_close(advantages, torch.tensor([[2.0, 2.0]]))


def test_errors_and_inputs_left_alone():
    names = ["rewards", "values", "next_values", "terminated", "truncated"]
    inputs = trajectory(8)
    before = [x.clone() for x in inputs]
    mask = torch.rand(3, 7) > 0.3
    compute_gae(*inputs, gamma=0.9, gae_lambda=0.9, mask=mask)
    for x, y in zip(inputs, before, strict=True):
        assert torch.equal(x, y)
    for i, name in enumerate(names[1:], start=1):
        changed = [*inputs[:i], inputs[i][..., None], *inputs[i + 1 :]]
        with pytest.raises(ValueError, match=rf"{name} \(3, 7, 1\) and rewards \(3, 7\)"):
            compute_gae(*changed, gamma=0.9, gae_lambda=0.9)
    with pytest.raises(ValueError, match=r"mask \(3, 1\) and rewards \(3, 7\)"):
        compute_gae(*inputs, gamma=0.9, gae_lambda=0.9, mask=mask[:, :1])
    for i in (3, 4):
        with pytest.raises(ValueError, match=f"{names[i]} must be a bool"):
            compute_gae(*[x.double() if j == i else x for j, x in enumerate(inputs)], gamma=0.9, gae_lambda=0.9)
    with pytest.raises(ValueError, match="mask must be a bool"):
        compute_gae(*inputs, gamma=0.9, gae_lambda=0.9, mask=mask.int())
    with pytest.raises(ValueError, match=r"\[B, T\].*\(7,\)"):
        compute_gae(*[x[0] for x in inputs], gamma=0.9, gae_lambda=0.9)


class TestGroups:
    def test_by_hand(self):
        # Groups [1, 2, 6] and [0, 0, 3]. Leave one out: 1 - 4, 2 - 3.5, 6 - 1.5; 0 - 1.5, 0 - 1.5, 3 - 0.
        scores = f64([1, 2, 6, 0, 0, 3])
        assert_close(leave_one_out_advantages(scores, 3), f64([-3, -1.5, 4.5, -1.5, -1.5, 3]))
        # Group normalised: means 3 and 1, variances 14/3 and 2.
        centred = f64([-2, -1, 3, -1, -1, 2])
        std = (f64([14 / 3] * 3 + [2] * 3) + 1e-8).sqrt()
        assert_close(group_normalized_advantages(scores, 3, scale_by_std=False), centred)
        assert_close(group_normalized_advantages(scores, 3), centred / std)

    @given(seeds, st.integers(1, 4), st.integers(2, 6), st.floats(-50, 50))
    def test_identities(self, seed, groups, size, shift):
        scores = torch.randn(groups * size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        loo = leave_one_out_advantages(scores, size)
        centred = group_normalized_advantages(scores, size, scale_by_std=False)
        # s - (S - s) / (G - 1) = G / (G - 1) * (s - S / G)
        assert_close(loo, centred * size / (size - 1))
        for advantages in (loo, centred, group_normalized_advantages(scores, size)):
            assert_close(advantages.view(groups, size).sum(1), torch.zeros(groups, dtype=torch.float64))
        # A baseline common to the group changes nothing, and groups do not see each other.
        assert_close(leave_one_out_advantages(scores + shift, size), loo)
        per_group = [leave_one_out_advantages(g, size) for g in scores.view(groups, size)]
        assert_close(torch.cat(per_group), loo)

    def test_by_hand_with_missing_scores(self):
        # Groups [1, -, 6], [-, -, 3] and [-, -, -]: two to compare, one alone, none.
        scores = f64([1, math.nan, 6, math.inf, math.nan, 3, 0, 0, 0])
        mask = torch.tensor([True, False, True, False, False, True, False, False, False])
        loo = leave_one_out_advantages(scores, 3, mask=mask)
        assert_close(loo, f64([-5, 0, 5, 0, 0, 0, 0, 0, 0]))
        centred = group_normalized_advantages(scores, 3, scale_by_std=False, mask=mask)
        assert_close(centred, f64([-2.5, 0, 2.5, 0, 0, 0, 0, 0, 0]))
        assert_close(group_normalized_advantages(scores, 3, mask=mask), centred / math.sqrt(6.25 + 1e-8))

    @given(seeds, st.integers(2, 5))
    def test_missing_scores_leave_a_smaller_group(self, seed, size):
        g = torch.Generator().manual_seed(seed)
        scores = torch.randn(size + 2, generator=g, dtype=torch.float64)
        mask = torch.ones(size + 2, dtype=torch.bool)
        mask[torch.randperm(size + 2, generator=g)[:2]] = False
        for function in (leave_one_out_advantages, group_normalized_advantages):
            got = function(scores, size + 2, mask=mask)
            assert_close(got[mask], function(scores[mask], size))
            assert torch.all(got[~mask] == 0)

    def test_std_of_each_group_is_1(self):
        out = group_normalized_advantages(torch.randn(12, dtype=torch.float64) * 7 + 3, 4)
        # 1e-6: the 1e-8 under the root.
        assert_close(out.view(3, 4).std(dim=1, correction=0), torch.ones(3, dtype=torch.float64), rtol=0, atol=1e-6)

    @pytest.mark.parametrize("value", [0.0, 0.1, 1000.1])
    @pytest.mark.parametrize("size", [2, 3, 7])
    def test_equal_scores_give_0_in_float32(self, value, size):
        scores = torch.full((2 * size,), value)
        assert_close(group_normalized_advantages(scores, size), torch.zeros(2 * size))
        # 1e-6 of the score: the group's sum is rounded.
        assert_close(leave_one_out_advantages(scores, size), torch.zeros(2 * size), rtol=0, atol=1e-6 * (1 + value))

    def test_each_group_is_centred_on_its_own(self):
        # Exactly 0 only if what rounding left of each mean is taken away group by group.
        scores = torch.cat([torch.full((7,), x) for x in (0.1, 1000.1)])
        assert_close(group_normalized_advantages(scores, 7), torch.zeros(14))

    @pytest.mark.parametrize("function", [leave_one_out_advantages, group_normalized_advantages])
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
    def test_dtype_and_device(self, function, dtype, device):
        scores = (torch.randn(8) * 3).to(device, dtype)
        out = function(scores, 4)
        assert out.dtype == dtype
        assert out.device.type == device.type
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        assert torch.equal(out, function(scores.to(wide), 4).to(dtype))

    @pytest.mark.parametrize("function", [leave_one_out_advantages, group_normalized_advantages])
    def test_errors(self, function):
        with pytest.raises(ValueError, match=r"\(6, 1\)"):
            function(torch.zeros(6, 1), 2)
        with pytest.raises(ValueError, match="at least 2, got 1"):
            function(torch.zeros(6), 1)
        with pytest.raises(ValueError, match=r"6 scores .* group_size=4"):
            function(torch.zeros(6), 4)
        with pytest.raises(ValueError, match=r"mask \(3,\) and scores \(6,\)|scores \(6,\) and mask \(3,\)"):
            function(torch.zeros(6), 2, mask=torch.ones(3, dtype=torch.bool))
        with pytest.raises(ValueError, match="bool"):
            function(torch.zeros(6), 2, mask=torch.ones(6))
        scores = torch.randn(6)
        before = scores.clone()
        assert function(scores, 2).shape == (6,)
        assert torch.equal(scores, before)
        assert function(torch.tensor([1, 3]), 2).dtype == torch.float32
