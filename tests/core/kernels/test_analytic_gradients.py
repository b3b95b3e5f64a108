"""Closed-form derivatives against autograd through the losses that they belong to."""

from __future__ import annotations

import math

import pytest
import torch

from rlhf_ppo.core import clipped_policy_loss, clipped_value_loss
from rlhf_ppo.core.kernels.analytic_gradients import clipped_policy_slope, clipped_value_slope


def draw(seed: int, count: int = 400) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(count, generator=generator, dtype=torch.float64) for _ in range(3)]


@pytest.mark.parametrize(
    "settings",
    [
        {"clip_range": 0.2},
        {"clip_range": 0.1, "clip_range_high": 0.4},
        {"clip_range": 0.0},
        {"clip_range": 1.5},
        {"clip_range": 0.2, "dual_clip": 1.4},
    ],
)
@pytest.mark.parametrize("spread", [0.3, 15.0])  # 15: beyond the bound of 20 nats too
def test_policy_slope_is_autograds(settings, spread):
    new, old, advantages = draw(0)
    new = (spread * new).requires_grad_()
    advantages[::7] = 0.0
    loss = clipped_policy_loss(new, old, advantages, **settings)
    expected = torch.autograd.grad(loss.sum(), new)[0]
    slope = clipped_policy_slope(new.detach(), old, advantages, **settings)
    torch.testing.assert_close(slope, expected, rtol=1e-9, atol=1e-12)
    dead = slope[advantages != 0] == 0
    assert dead.any() and not dead.all()


@pytest.mark.parametrize(
    ("ratio", "advantage", "slope"),
    [(1.3, 2.0, 0.0), (0.7, 2.0, -1.4), (1.3, -2.0, 2.6), (0.7, -2.0, 0.0), (1.1, 2.0, -2.2), (0.9, -2.0, 1.8)],
)
def test_only_two_of_four_corners_lose_their_slope(ratio, advantage, slope):
    """Clip range 0.2: d loss / d log pi is -r * A, or 0 for A > 0 above 1.2 and for A < 0 below 0.8."""
    found = clipped_policy_slope(
        torch.tensor([math.log(ratio)]), torch.zeros(1), torch.tensor([advantage]), clip_range=0.2
    )
    assert found.item() == pytest.approx(slope)


@pytest.mark.parametrize("clip_range", [None, 0.0, 0.5, 100.0])
def test_value_slope_is_autograds(clip_range):
    values, old, returns = draw(1)
    values.requires_grad_()
    loss = clipped_value_loss(values, old, returns, clip_range=clip_range)
    expected = torch.autograd.grad(loss.sum(), values)[0]
    slope = clipped_value_slope(values.detach(), old, returns, clip_range=clip_range)
    torch.testing.assert_close(slope, expected, rtol=1e-9, atol=1e-12)


def test_what_is_not_a_number_stays_visible():
    nan = torch.tensor([float("nan")])
    one = torch.ones(1)
    assert clipped_policy_slope(nan, one, one, clip_range=0.2).isnan()
    assert clipped_policy_slope(one, one, nan, clip_range=0.2).isnan()
    assert clipped_value_slope(nan, one, one, clip_range=0.2).isnan()
    assert clipped_value_slope(one, one, nan).isnan()
