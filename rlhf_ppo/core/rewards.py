"""Rewards per token: the score on a response's last token, minus the KL to the reference at each token."""

from __future__ import annotations

from torch import Tensor

from rlhf_ppo.core.masked import keep, last_true
from rlhf_ppo.core.types import compute_dtype, require_bool, require_same_shape, result_dtype


def kl_penalized_rewards(scores: Tensor, kl: Tensor, mask: Tensor, kl_coef: float | Tensor) -> Tensor:
    """Compute rewards per token: ``-kl_coef * kl_t``, plus the score.

    Args:
        scores: [B], one per response, added on its last True step; or [B, T], one per token.
        kl: [B, T] per-token KL estimates.
        mask: [B, T] bool, True on response tokens.
        kl_coef: coefficient of the KL, may be 0.
    Returns:
        [B, T] rewards, 0 where masked; a row without a True step is all zero.
    Raises:
        ValueError: shapes do not fit, or the mask is not bool.
    Source: Ziegler et al., "Fine-Tuning Language Models from Human Preferences" (2019), equation 2.
    """
    require_same_shape(mask=mask, kl=kl)
    require_bool(mask=mask)
    if kl.ndim != 2 or scores.shape not in (kl.shape, kl.shape[:1]):
        raise ValueError(f"scores {tuple(scores.shape)} must be [B] or [B, T] for kl [B, T] {tuple(kl.shape)}")
    if isinstance(kl_coef, Tensor) and not _broadcasts(kl_coef, kl):
        raise ValueError(f"kl_coef {tuple(kl_coef.shape)} does not broadcast to kl [B, T] {tuple(kl.shape)}")
    dtype = compute_dtype(kl)
    rewards = -kl_coef * keep(kl.to(dtype), mask)
    scores = scores.to(dtype)
    return (rewards + (on_last_step(scores, mask) if scores.ndim == 1 else keep(scores, mask))).to(result_dtype(kl))


def on_last_step(scores: Tensor, mask: Tensor) -> Tensor:
    """Return [B, T] with each score [B] on the last True step of its row, and 0 elsewhere."""
    return keep(scores[:, None].expand(mask.shape), last_true(mask))


def _broadcasts(x: Tensor, like: Tensor) -> bool:
    sizes = zip(reversed(x.shape), reversed(like.shape), strict=False)
    return x.ndim <= like.ndim and all(size in (1, whole) for size, whole in sizes)
