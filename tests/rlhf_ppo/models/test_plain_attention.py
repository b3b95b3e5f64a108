"""Causal attention by plain products in bfloat16: what float64 gives, up to the rounding that torch's own makes."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from rlhf_ppo.models.forward.plain_attention import plain_attention


def exact(q, k, v, grad, scale):
    """Attend in float64; returns the result [B, L, H, D] and the three gradients."""
    q, k, v = (x.detach().double().requires_grad_() for x in (q, k, v))
    out = scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True).transpose(1, 2)
    out.backward(grad.double())
    return out, q.grad, k.grad, v.grad


def error(found, right):
    return float((found.detach().double() - right.detach()).norm() / right.detach().norm())


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (3, 1)], ids=str)
@pytest.mark.parametrize("length", [1, 2, 33])
@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("rotated", [False, True])
def test_result_and_gradients_are_float64s_up_to_rounding(heads, length, scale, rotated):
    """Rotary positions give float32 queries and keys, which are rounded as decoding rounds them."""
    generator = torch.Generator().manual_seed(length)
    q, k, v = (torch.randn(2, h, length, 8, generator=generator).bfloat16() for h in (*heads, heads[1]))
    grad = torch.randn(2, length, heads[0], 8, generator=generator).bfloat16()
    right = exact(q, k, v, grad, scale)
    q, k = (x.float() if rotated else x for x in (q, k))
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    out = plain_attention(q, k, v, scale)
    out.backward(grad)
    assert out.dtype == torch.bfloat16 and q.grad.dtype == q.dtype
    # Each of a few products keeps 8 bits.
    assert all(error(a, b) < 0.01 for a, b in zip((out, v.grad), (right[0], right[3]), strict=True))
    if length > 1:  # of a single weight nothing depends on the scores
        assert all(error(a, b) < 0.02 for a, b in zip((q.grad, k.grad), right[1:3], strict=True))


def test_scores_are_not_rounded():
    """Scores of 400 and 401 are the same number in bfloat16, but one token gets e times the other's weight."""
    q = torch.tensor([0.0, 1.0]).view(1, 1, 2, 1).bfloat16()
    k, v = (
        torch.tensor([400.0, 402.0]).view(1, 1, 2, 1).bfloat16(),
        torch.tensor([1.0, 0.0]).view(1, 1, 2, 1).bfloat16(),
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):  # as runs call it
        last = float(plain_attention(q, k, v, 0.5)[0, 1, 0, 0])
    assert last == pytest.approx(1 / (1 + torch.e), rel=0.01)


def test_no_token_sees_a_later_one():
    q, k, v = (torch.randn(1, 2, 6, 4).bfloat16() for _ in range(3))
    before = plain_attention(q, k, v, None)
    k[:, :, 4:], v[:, :, 4:] = 9.0, torch.nan
    after = plain_attention(q, k, torch.where(v.isnan(), 7.0, v), None)
    assert torch.equal(before[:, :4], after[:, :4]) and not torch.equal(before, after)
