"""Diagnostics: policy change, clipped share and explained variance."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_ppo.core.config import PPOConfig
from rlhf_ppo.core.kl import MAX_LOG_RATIO, kl_estimate
from rlhf_ppo.core.masked import keep, masked_mean, masked_var
from rlhf_ppo.core.ratios import pool_old_logprobs, probability_ratio
from rlhf_ppo.core.types import Experience, PolicyOutput, compute_dtype, require_bool, require_same_shape, result_dtype


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor | None = None) -> Tensor:
    """Compute ``1 - Var(returns - values) / Var(returns)``: 1 is a perfect critic, 0 one that predicts a constant.

    Args:
        values: [*] predictions.
        returns: [*] observed returns.
        mask: [*] bool; default: everything counts.
    Returns:
        [] the share; 0 when the returns do not vary, or by no more than rounding.
    Raises:
        ValueError: shapes differ, or the mask is not bool.
    """
    require_same_shape(values=values, returns=returns, mask=mask)
    mask = torch.ones_like(values, dtype=torch.bool) if mask is None else mask
    dtype = compute_dtype(values)
    v, r = values.to(dtype), returns.to(dtype)
    spread = masked_var(r, mask)
    varies = spread > (4 * torch.finfo(dtype).eps * masked_mean(r.abs(), mask)) ** 2
    share = 1 - masked_var(r - v, mask) / torch.where(varies, spread, torch.ones_like(spread))
    return torch.where(varies, share, torch.zeros_like(share)).to(result_dtype(values))


@torch.no_grad()
def ppo_diagnostics(new: PolicyOutput, old: Experience, config: PPOConfig | None = None) -> dict[str, Tensor]:
    """Compute diagnostics of one minibatch, over its True actions.

    Args:
        new: the current policy on the recorded actions, [*].
        old: the recorded facts, [*].
        config: its clip ranges and ratio level decide what counts as clipped; default: PPOConfig().
    Returns:
        Scalars: approx_kl (nats per action, k3 of old against new), clip_fraction (share of actions whose gradient
        the clip removed: A > 0 with r > 1 + eps_high, or A < 0 with r < 1 - eps; cispo: whose weight r was capped at
        1 + eps_high; dis: with r outside the band, where r is to the sampler's log-probs), out_of_range_fraction (r
        outside the band whatever A's sign), ratio_mean, max_abs_log_ratio
        (nats), overflow_fraction (|log r| beyond 20, where it is clamped), and entropy (nats) when it was computed.
        r is pooled by ``config.ratio_level``; approx_kl and max_abs_log_ratio are per action.
    Raises:
        ValueError: shapes differ, the mask is not bool, or ratio_level='turn' without old.turns.
    """
    require_same_shape(
        logprobs=new.logprobs, old_logprobs=old.logprobs, advantages=old.advantages, entropy=new.entropy, mask=old.mask
    )
    require_bool(mask=old.mask)
    config = config or PPOConfig()
    mask = old.mask
    high = config.clip_range if config.clip_range_high is None else config.clip_range_high
    dtype = compute_dtype(new.logprobs)
    logprobs, old_logprobs, advantages = (keep(x.to(dtype), mask) for x in (new.logprobs, old.logprobs, old.advantages))
    log_ratio = logprobs - old_logprobs
    compared = keep(old.compared_logprobs(config).to(dtype), mask)
    pooled = pool_old_logprobs(logprobs, compared, mask, level=config.ratio_level, turns=old.turns)
    ratio = probability_ratio(logprobs, pooled)
    above, below = ratio > 1 + high, ratio < 1 - config.clip_range
    if config.objective == "cispo":
        killed = above
    elif config.objective == "dis":
        killed = above | below
    else:
        killed = ((advantages > 0) & above) | ((advantages < 0) & below)

    def share(flags: Tensor) -> Tensor:
        return masked_mean(flags.to(dtype), mask)

    diagnostics = {
        "approx_kl": masked_mean(kl_estimate(old_logprobs, logprobs, "k3"), mask),
        "clip_fraction": share(killed),
        "out_of_range_fraction": share(above | below),
        "ratio_mean": masked_mean(ratio, mask),
        "max_abs_log_ratio": log_ratio.abs().max() if log_ratio.numel() else log_ratio.sum(),
        "overflow_fraction": share((logprobs - pooled).abs() > MAX_LOG_RATIO),
    }
    if new.entropy is not None:
        diagnostics["entropy"] = masked_mean(keep(new.entropy.to(dtype), mask), mask)
    return diagnostics
